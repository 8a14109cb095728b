"""Tokens per pass of trees that follow the text over those of the best static tree of as many nodes, on the bundled pair.

    python tests/bench_dynamic.py --output docs/benchmarks/dynamic_trees_cpu.json

Contexts are paired: along a text of the target's own, at every few tokens, both kinds of trees are grown and verified below the
same committed tokens. The static tree is the one with the most expected tokens for the acceptance measured at that temperature,
with as many levels as help. What is compared is the expected number of tokens of a pass given its tree and its logits
(`Verdict.expected_tokens`), over the verifier's own randomness; and the number that came. Errors are those of the mean over
texts, as contexts of one text are alike. Tokens of the dynamic trees' estimates go on being counted from context to context, as
in a long session. No clock plays a part.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from bench_report import described, write_document
from bench_self_draft import prompts_of
from offload.assemble import open_engine
from offload.config import EngineSettings, sampling_kind
from offload.demo import DRAFT, TARGET, acceptance_at
from offload.engine.engine import Engine
from offload.planner.hardware_file import find_hardware

NODES = (64, 256)
TEMPERATURES = (0.0, 0.6, 1.0)
LEVELS = 64
EVERY = 4  # tokens between contexts of a text
BARS = {0.0: 1.05, 0.6: 1.05, 1.0: 1.03}
# What a level must bring depends on what it takes. Plans are for a pass that takes a thousand times as long as a level of the
# draft, as with a 70B over PCIe; here all is copied at the memory's rate.
SLOW = replace(find_hardware("l40"), link_bytes_per_s=20e6)


def engine_of(tree: str, temperature: float, stack: ExitStack) -> Engine:
    settings = EngineSettings(
        model=str(TARGET),
        draft_models=(str(DRAFT),),
        device="cpu",
        dtype="float32",
        acceptances=(str(acceptance_at(temperature)),),
        tree=tree,
        sampling=sampling_kind(temperature),
        fixed_plan=True,
        ngram=("off",),
        grow_ahead="off",
        resident_layers=0,
        max_context=1024,  # room enough for what is run and not submitted
    )
    return stack.enter_context(open_engine(settings, hardware=SLOW))


def first_pass(engine: Engine, text: Sequence[int], temperature: float, seed: int) -> dict[str, float]:
    """A pass over a tree below `text`: tokens expected and come, nodes and levels."""
    request = engine.admission.request(
        list(text), max_new_tokens=LEVELS, temperature=temperature, seed=seed, seed_is_chance=True, ignore_eos=True
    )
    generation = engine.run(request)
    step = next(generation)
    generation.stop()
    verdict, shape = step.verdict, step.shape
    return {
        "expected": verdict.expected_tokens,
        "tokens": len(verdict.path),
        "nodes": shape.num_nodes,
        "levels": shape.num_levels,
    }


def texts_of(engine: Engine, prompts: Sequence[Sequence[int]], temperature: float, tokens: int) -> list[tuple[int, list[int]]]:
    """The target's own texts, with the length of the prompt of each."""
    found = []
    for number, prompt in enumerate(prompts):
        report = engine.generate(prompt, max_new_tokens=tokens, temperature=temperature, seed=number, ignore_eos=True)
        found.append((len(prompt), [*prompt, *report.token_ids]))
    return found


def compare(nodes: int, temperature: float, prompts: Sequence[Sequence[int]], tokens: int, every: int) -> dict[str, Any]:
    pairs: list[list[tuple[dict[str, float], dict[str, float]]]] = []
    with ExitStack() as stack:
        static = engine_of(f"{nodes}x{LEVELS}", temperature, stack)
        dynamic = engine_of(f"{nodes}:dynamic", temperature, stack)
        for number, (start, text) in enumerate(texts_of(static, prompts, temperature, tokens)):
            pairs.append([])
            for end in range(start, len(text), every):
                seed = 1000 * number + end
                pairs[-1].append(tuple(first_pass(engine, text[:end], temperature, seed) for engine in (static, dynamic)))  # type: ignore[arg-type]
            print(
                f"T = {temperature:g}, {nodes} nodes, text {number + 1}: {_ratio(pairs[-1:]):.3f}", file=sys.stderr, flush=True
            )
    both = [pair for text in pairs for pair in text]
    kinds = {kind: [pair[place] for pair in both] for place, kind in enumerate(("static", "dynamic"))}
    ratio, error = _ratio(pairs), _jackknife(pairs)
    row: dict[str, Any] = {"nodes": nodes, "temperature": temperature, "contexts": len(both), "texts": len(pairs)}
    for kind, found in kinds.items():
        row |= {f"{kind}_{name}": statistics.fmean(one[name] for one in found) for name in found[0]}
    differences = [statistics.fmean(pair[1]["expected"] - pair[0]["expected"] for pair in text) for text in pairs]
    return row | {
        "difference": statistics.fmean(differences),
        "difference_error": statistics.stdev(differences) / math.sqrt(len(pairs)) if len(pairs) > 1 else None,
        "ratio": ratio,
        "ratio_error": error,
        "bar": BARS.get(temperature),
    }


def _ratio(pairs: Sequence[Sequence[tuple[dict[str, float], dict[str, float]]]]) -> float:
    static, dynamic = (sum(pair[place]["expected"] for text in pairs for pair in text) for place in (0, 1))
    return dynamic / static


def _jackknife(pairs: Sequence[Sequence[tuple[dict[str, float], dict[str, float]]]]) -> float | None:
    """Standard error of the ratio, by leaving out a text at a time."""
    number = len(pairs)
    if number < 2:
        return None
    without = [_ratio([*pairs[:place], *pairs[place + 1 :]]) for place in range(number)]
    mean = statistics.fmean(without)
    return math.sqrt((number - 1) / number * sum((one - mean) ** 2 for one in without))


def table(document: dict[str, Any]) -> str:
    head = "| nodes | temperature | static | dynamic | ratio | bar | levels | contexts |"
    lines = [head, "|---" * 8 + "|"]
    for row in document["rows"]:
        error = f" +- {row['ratio_error']:.3f}" if row["ratio_error"] is not None else ""
        lines.append(
            f"| {row['nodes']} | {row['temperature']:g} | {row['static_expected']:.2f} | {row['dynamic_expected']:.2f} "
            f"| {row['ratio']:.3f}{error} | {row['bar']} | {row['static_levels']:.0f}, {row['dynamic_levels']:.1f} "
            f"| {row['contexts']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", default=",".join(map(str, NODES)))
    parser.add_argument("--temperatures", default=",".join(map(str, TEMPERATURES)))
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=192, help="of each text")
    parser.add_argument("--every", type=int, default=EVERY, help="tokens between contexts")
    parser.add_argument("--quick", action="store_true", help="three short texts: does it run, and which way does it point?")
    parser.add_argument("--output", metavar="FILE")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.prompts, arguments.tokens, arguments.every = 3, 64, 8
    _, prompts = prompts_of(arguments.prompts)
    document = {**described("dynamic_trees"), "rows": []}
    for temperature in map(float, arguments.temperatures.split(",")):
        for nodes in map(int, arguments.nodes.split(",")):
            document["rows"].append(compare(nodes, temperature, prompts, arguments.tokens, arguments.every))
    write_document(document, arguments.output)
    print(table(document))


if __name__ == "__main__":
    main()
