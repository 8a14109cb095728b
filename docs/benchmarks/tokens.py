"""Tokens per pass of the demo pair: the optimal tree of a size against independent chains of the same number of nodes.

    python docs/benchmarks/tokens.py --temperatures 0,0.6,1.0 --markdown

For each temperature and verifier: acceptance is measured on one set of prompts, in two rounds (a broad tree, then the best
tree by the first round's counts). For each size the optimal tree and the number of chains are then chosen by that profile,
never after the fact, both within the same levels, and decode other prompts with other seeds, on the CPU, from resident
layers. A text is a fixed number of passes, so that no pass is cut short by a text's end. At temperature 0 every verifier is
the same walk; there a seed samples how the prompt goes on for a while, and what is decoded after that is the text.

The standard error is that of a mean over texts, since the passes of one text are alike. "expected" is the mean of what the
verifiers themselves expect given tree and logits (Rao-Blackwell), which is less noisy. One JSON object on the last line;
`--markdown` prints a table before it; files of earlier runs given with `--merge` are put together and measured no more.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import offload
from offload.cli.profile import read_prompts
from offload.demo import DRAFT, PROMPTS, TARGET
from offload.engine.engine import Step
from offload.report.report import environment
from tree.acceptance import Acceptance, AcceptanceCounter
from tree.optimizer import best_tree, expected_tokens
from tree.shape import TreeShape
from tree.verify import METHODS

SIZES = {16: 6, 64: 5, 256: 4, 768: 3}  # nodes: seeds per prompt; small trees are cheap and their differences small
LEVELS = 32
PASSES_PER_TEXT = 6
GREEDY_PROMPT_TOKENS = 32  # of the target itself, sampled at temperature 1
OPENINGS = (  # of texts that no profile was measured on
    "Fellow citizens of the Senate:",
    "The state of our finances is",
    "I recommend to the Congress that",
    "Our farmers have had",
    "The treaty with Great Britain",
    "My administration has worked to",
    "Every child in America deserves",
    "The revenue for the fiscal year ending",
)
# A broad tree to begin with: many ranks are tried near the root, and the first children of first children far down.
BROAD = best_tree(Acceptance((tuple(0.38 * rank**-1.5 for rank in range(1, 65)),)), 256, 16)
PROFILE_ROUNDS = (range(1000, 1003), range(2000, 2009))  # seeds per prompt
PROFILE_NODES = 128  # of the second round
LEAST_TRIED = 100  # times, for a level to have a vector of its own
MAX_NEW_TOKENS, MAX_CONTEXT = 800, 1024 + max(SIZES)  # more tokens than the passes take, within the pair's window of 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    verifier: str
    temperature: float

    @property
    def name(self) -> str:
        return self.verifier if self.temperature else "greedy"


def texts_to_decode(setting: Setting, prompts: Sequence[str], seeds: Sequence[int]) -> list[tuple[str | list[int], int]]:
    """Every prompt with every seed; at temperature 0, the same for all trees, every prompt as it goes on by every seed."""
    texts = list(itertools.product(prompts, seeds))
    if setting.temperature:
        return list(texts)
    with offload.load(str(TARGET), device="cpu", tree="none") as engine:
        options: dict[str, Any] = {"max_new_tokens": GREEDY_PROMPT_TOKENS, "temperature": 1.0, "ignore_eos": True}
        reports = [(engine.generate(prompt, seed=seed, **options), seed) for prompt, seed in texts]
    return [([*report.prompt_token_ids, *report.token_ids], seed) for report, seed in reports]


def decode(setting: Setting, shape: TreeShape, prompts: Sequence[str], seeds: Sequence[int]) -> Iterator[list[Step]]:
    """The first passes over `shape` of each text, prompt by prompt."""
    texts = texts_to_decode(setting, prompts, seeds)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tree.json"
        file.write_text(json.dumps(shape.to_json()), encoding="utf-8")
        options: dict[str, Any] = {"tree": str(file), "verifier": setting.verifier, "max_context": MAX_CONTEXT}
        with offload.load(str(TARGET), draft_model=str(DRAFT), device="cpu", **options) as engine:
            request: dict[str, Any] = {"temperature": setting.temperature, "ignore_eos": True}
            for prompt, seed in texts:
                stream = engine.stream(prompt, max_new_tokens=MAX_NEW_TOKENS, seed=seed, **request)
                yield list(itertools.islice(stream, PASSES_PER_TEXT))


def measure_acceptance(setting: Setting) -> Acceptance:
    """By level and rank, from the counts of both rounds."""
    counter, shape, total = AcceptanceCounter(), BROAD, 0
    for seeds in PROFILE_ROUNDS:
        for steps in decode(setting, shape, read_prompts(PROMPTS), seeds):
            total += len(steps)
            for step in steps:
                counter.add(step.shape, step.verdict.path)
        shape = best_tree(counter.to_acceptance("", per_level=True, least_tried=LEAST_TRIED), PROFILE_NODES, LEVELS)
    return counter.to_acceptance(f"measured over {total} passes", per_level=True, least_tried=LEAST_TRIED)


def contenders(acceptance: Acceptance, num_nodes: int) -> Iterator[tuple[str, TreeShape]]:
    """The optimal tree, and of all sets of chains with as many nodes and levels at most the one expected to yield most."""
    yield "optimal", best_tree(acceptance, num_nodes, LEVELS)
    chains = {width: independent_chains(width, num_nodes) for width in range(1, num_nodes)}
    fitting = {width: shape for width, shape in chains.items() if shape.num_levels <= LEVELS}
    width = max(fitting, key=lambda width: expected_tokens(fitting[width], acceptance))
    yield f"{width} chains", fitting[width]


def independent_chains(width: int, num_nodes: int) -> TreeShape:
    """`width` chains below one root, of equal length or one node longer."""
    return TreeShape((-1, *(max(0, node - width) for node in range(1, num_nodes))))


def measure(setting: Setting, shape: TreeShape, num_seeds: int) -> dict[str, object]:
    counts, expected = [], []  # means over each text
    for steps in decode(setting, shape, OPENINGS, range(num_seeds)):
        assert len(steps) == PASSES_PER_TEXT and all(step.shape == shape for step in steps)
        counts.append(statistics.fmean(len(step.verdict.path) for step in steps))
        expected.append(statistics.fmean(step.verdict.expected_tokens for step in steps))
    return {
        "texts": len(counts),
        "passes": len(counts) * PASSES_PER_TEXT,
        "tokens_per_pass": statistics.fmean(counts),
        "standard_error": statistics.stdev(counts) / len(counts) ** 0.5,
        "expected": statistics.fmean(expected),
        "expected_standard_error": statistics.stdev(expected) / len(counts) ** 0.5,
        "expected_by_text": expected,
    }


def sweep(settings: list[Setting], sizes: list[int], num_seeds: int | None) -> Iterator[dict[str, object]]:
    for setting in settings:
        acceptance = measure_acceptance(setting)
        about = {"verifier": setting.name, "temperature": setting.temperature}
        yield {**about, "acceptance": acceptance.to_json()}
        for num_nodes in sizes:
            for name, shape in contenders(acceptance, num_nodes):
                tree = {"nodes": shape.num_nodes, "tree": name, "levels": shape.num_levels}
                tree["predicted"] = expected_tokens(shape, acceptance)
                row = {**about, **tree, **measure(setting, shape, num_seeds or SIZES[num_nodes])}
                print(json.dumps(row), file=sys.stderr, flush=True)
                yield row


def markdown(rows: list[dict[str, Any]]) -> str:
    """Mean and standard error of the optimal tree and of the chains, by nodes, temperature, verifier."""
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if "tree" in row:
            cells.setdefault((row["temperature"], row["verifier"], row["nodes"]), []).append(row)
    lines = ["| T | verifier | nodes | optimal | chains | | optimal, expected | chains, expected | |", "|---" * 9 + "|"]
    for (temperature, verifier, nodes), (optimal, chains) in sorted(cells.items()):
        line = f"| {temperature:g} | {verifier} | {nodes} "
        for value, error in (("tokens_per_pass", "standard_error"), ("expected", "expected_standard_error")):
            best, other = (f"{row[value]:.2f} +- {row[error]:.2f}" for row in (optimal, chains))
            label = f" ({chains['tree']})" if value == "tokens_per_pass" else ""
            line += f"| {best} | {other}{label} | {optimal[value] / chains[value] - 1:+.0%} "
        lines.append(line + "|")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--temperatures", default="0,0.6,1.0")
    parser.add_argument("--verifiers", default=",".join(METHODS), help="above temperature 0")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--seeds", type=int, help="per prompt; by default more of them for smaller trees")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--merge", type=Path, nargs="+", help="JSON of runs over different temperatures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # tiny models: threads wait for each other longer than they compute
    settings = []
    for temperature in map(float, arguments.temperatures.split(",")):
        verifiers = arguments.verifiers.split(",") if temperature else METHODS[:1]
        settings += [Setting(verifier=verifier, temperature=temperature) for verifier in verifiers]
    if arguments.merge:
        runs = [json.loads(file.read_text(encoding="utf-8")) for file in arguments.merge]
    else:
        rows = list(sweep(settings, [int(size) for size in arguments.sizes.split(",")], arguments.seeds))
        runs = [{"environment": environment("cpu"), "rows": rows}]
    if arguments.markdown:
        print(markdown([row for run in runs for row in run["rows"]]) + "\n")
    print(json.dumps(runs[0] if len(runs) == 1 else {"runs": runs}))


if __name__ == "__main__":
    main()
