"""What growing ahead is worth where drafting takes half as long as a pass: rounds with `--grow-ahead auto` and `off`, in turns.

    python tests/bench_ahead.py --output docs/benchmarks/grow_ahead_cpu.json
    python tests/bench_ahead.py --draft same --tree 16:dynamic --steps 14 --link 1.884 --prompts 1 --runs 2 --tokens 160

The bundled target streams over an emulated link, as it is, with dynamic trees of the bundled draft or of a base of the target.
`same` is a small random target of 24 layers that is its own draft, each of whose passes waits until PASS_S are over: as slow as
a real draft on a GPU, whatever its rows, and always right. It shows what a step ahead is worth where it is foreseen. The
planner knows nothing of the wait, so --steps says how many steps there are; over --link 1.884 a pass takes twice as long as a
whole chain of them.
The rate of the link is chosen once, in advance, so that a pass takes twice as long as drafting does without growing ahead. One
engine decodes the same prompts greedily, with the planner's number of steps ahead and with none, in turns, under a plan that
is the same otherwise; what is compared are runs of the same prompt.
Medians over runs, as other work comes and goes; the error is that of the mean of the logarithms of paired ratios.
"""

import argparse
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench_report import described, write_document
from bench_self_draft import prompts_of
from offload import assemble
from offload.assemble import open_engine
from offload.config import EngineSettings
from offload.demo import DRAFT, TARGET, acceptance_at
from offload.engine.engine import Engine
from offload.model.drafter import ModelContext
from offload.planner.plan import plan_run

WAYS = ("off", "auto")
SETTLING = 4  # first rounds of a text, which read the prompt and wake threads
WORDS = 256  # of the random model
AHEAD_ROWS = 256  # of the draft's cache, for steps that were asked for
PASS_S = 0.08  # of a pass of a draft that is the target itself


@dataclass(frozen=True)
class Pair:
    """What is compared, whatever the rate of the link."""

    model: str
    draft: str
    acceptances: tuple[str, ...]
    prompts: tuple[tuple[int, ...], ...]
    tree: str
    slots: int | None


def pair_of(arguments: argparse.Namespace, stack: ExitStack) -> Pair:
    draft, tree, slots = arguments.draft, arguments.tree, arguments.slots
    if arguments.steps is not None:
        asked = {"ahead_steps": arguments.steps, "ahead_rows": AHEAD_ROWS}
        planned = patch.object(assemble, "plan_run", lambda *given, **named: replace(plan_run(*given, **named), **asked))
        stack.enter_context(planned)
    if draft == "same":
        model = random_model(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        stack.enter_context(slow_passes())
        draws = random.Random(0)
        prompts = tuple(tuple(draws.randrange(WORDS) for _ in range(16)) for _ in range(arguments.prompts))
        return Pair(str(model), str(model), (), prompts, tree, slots)
    acceptance = acceptance_at(0.0, None if draft == "bundled" else draft.removeprefix("self:"))
    draft_model = str(DRAFT) if draft == "bundled" else draft
    return Pair(str(TARGET), draft_model, (str(acceptance),), prompts_of(arguments.prompts)[1], tree, slots)


@contextmanager
def slow_passes() -> Iterator[None]:
    """Passes of drafts over a tree take PASS_S."""
    expand = ModelContext.expand

    def slow(text: ModelContext, parents: Sequence[int], token_ids: torch.Tensor) -> torch.Tensor:
        end_s = time.perf_counter() + PASS_S
        found = expand(text, parents, token_ids)
        time.sleep(max(end_s - time.perf_counter(), 0.0))
        return found

    with patch.object(ModelContext, "expand", slow):
        yield


def random_model(folder: Path) -> Path:
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=64, intermediate_size=176, num_hidden_layers=24, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight *= 50.0  # it is sure of what it says, as it would else learn in every text anew that it may be
    model.save_pretrained(folder)
    return folder


def engine_of(pair: Pair, link: float, stack: ExitStack) -> Engine:
    settings = EngineSettings(
        model=pair.model,
        draft_models=(pair.draft,),
        device="cpu",
        dtype="float32",
        codec="none",
        acceptances=pair.acceptances,
        tree=pair.tree,
        slots=pair.slots,
        resident_layers=0,
        fixed_plan=True,
        ngram=("off",),
        emulate_link_bytes_per_s=link,
    )
    return stack.enter_context(open_engine(settings))


def run(engine: Engine, ahead_steps: int, prompt: tuple[int, ...], tokens: int) -> dict[str, Any]:
    """Under the engine's plan but for the number of steps that drafts take ahead."""
    fallbacks = engine.loop.fallbacks
    assert fallbacks is not None
    engine.loop.follow(replace(engine.plan, ahead_steps=ahead_steps), fallbacks)
    engine.forget()
    generation = engine.stream(prompt, max_new_tokens=tokens, ignore_eos=True)
    for _ in generation:
        pass
    passes = generation.stats.passes[SETTLING:-1]
    seconds, num_bytes = sum(one.round_s for one in passes), sum(one.bytes_streamed for one in passes)
    return {
        "token_ids": list(generation.token_ids),
        "round_s": seconds / len(passes),
        "draft_s": statistics.fmean(one.draft_s for one in passes),
        "pass_s": statistics.fmean(one.pass_s for one in passes),
        "tokens_per_pass": statistics.fmean(one.emitted_tokens for one in passes),
        "nodes_per_pass": statistics.fmean(one.num_nodes for one in passes),
        "foreseen_nodes": statistics.fmean(one.foreseen_nodes for one in passes),
        "ahead_nodes": statistics.fmean(one.ahead_nodes for one in passes),
        "link_bytes_per_s": num_bytes / seconds,
        "passes": len(passes),
    }


def link_for(pair: Pair, tokens: int, share: float) -> float:
    """The rate at which drafting without growing ahead takes `share` of a pass."""
    link = 100e6
    for _ in range(2):  # drafting beside copies takes longer than without
        with ExitStack() as stack:
            engine = engine_of(pair, link, stack)
            found = run(engine, 0, pair.prompts[0], tokens)
            link = engine.plan.bytes_per_pass / (found["draft_s"] / share)
    return link


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    tokens = arguments.tokens
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with ExitStack() as stack:
        pair = pair_of(arguments, stack)
        link = arguments.link * 1e6 if arguments.link else link_for(pair, tokens, arguments.share)
        engine = engine_of(pair, link, stack)
        plan, steps = engine.plan, {"off": 0, "auto": engine.plan.ahead_steps}
        for number in range(arguments.runs):
            for prompt in pair.prompts:
                for way in WAYS if number % 2 else WAYS[::-1]:
                    runs[way].append(run(engine, steps[way], prompt, tokens))
            shown = {way: statistics.median(one["round_s"] for one in found) for way, found in runs.items()}
            print(
                f"run {number + 1}: " + ", ".join(f"{way} {s:.4f} s" for way, s in shown.items()), file=sys.stderr, flush=True
            )
    pairs = list(zip(runs["auto"], runs["off"], strict=True))
    logarithms = [math.log(ahead["round_s"] / off["round_s"]) for ahead, off in pairs]
    error = statistics.stdev(logarithms) / math.sqrt(len(logarithms)) if len(logarithms) > 1 else None
    rows = []
    for way, found in runs.items():
        names = [name for name in found[0] if name != "token_ids"]
        row = {name: statistics.median(one[name] for one in found) for name in names}
        rows.append({"grow_ahead": way, **row, "link_utilisation": row["link_bytes_per_s"] / link})
    return {
        "draft": arguments.draft,
        "tree": pair.tree,
        "emulated_link_bytes_per_s": link,
        "ahead_steps": plan.ahead_steps,
        "predicted_round_s": plan.prediction.round_s,
        "identical_tokens": all(ahead["token_ids"] == off["token_ids"] for ahead, off in pairs),
        "round_ratio": math.exp(statistics.fmean(logarithms)),
        "round_ratio_error": error,
        "runs": len(pairs),
        "rows": rows,
    }


def table(document: dict[str, Any]) -> str:
    rate = document["emulated_link_bytes_per_s"] / 1e6
    head = ("grow ahead", "round s", "draft s", "pass s", "tokens per pass", "nodes foreseen", "link busy")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in document["rows"]:
        cells = [f"{row[name]:.4f}" for name in ("round_s", "draft_s", "pass_s")]
        cells += [f"{row['tokens_per_pass']:.2f}", f"{row['foreseen_nodes']:.1f} of {row['nodes_per_pass']:.1f}"]
        lines.append("| " + " | ".join([row["grow_ahead"], *cells, f"{row['link_utilisation'] * 100:.1f} %"]) + " |")
    error = f" +- {document['round_ratio_error']:.3f}" if document["round_ratio_error"] is not None else ""
    same = "identical" if document["identical_tokens"] else "DIFFERENT"
    ratio = (
        f"rounds take {document['round_ratio']:.3f}{error} of the time, {same} tokens, {document['ahead_steps']} steps ahead"
    )
    return "\n".join([*lines, "", f"{document['draft']} draft, {document['tree']}, link of {rate:.0f} MB/s: {ratio}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draft", default="bundled", help="bundled, same, or self:int8")
    parser.add_argument("--tree", default="64:dynamic")
    parser.add_argument("--slots", type=int, help="of layers on the device; the planner's own number without it")
    parser.add_argument("--steps", type=int, help="ahead; the planner's own number without it")
    parser.add_argument("--share", type=float, default=0.5, help="of a pass that drafting takes")
    parser.add_argument("--link", type=float, help="MB/s, instead of looking for it")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="one prompt, two runs")
    parser.add_argument("--output", metavar="FILE")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.prompts, arguments.runs, arguments.tokens = 1, 2, 96
    document = {**described("grow_ahead"), **compare(arguments)}
    write_document(document, arguments.output)
    print(table(document))


if __name__ == "__main__":
    main()
