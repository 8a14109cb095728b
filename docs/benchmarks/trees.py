"""Trees by the numbers: how long it takes to find and to verify one, and how many tokens a pass of the demo pair yields.

    python docs/benchmarks/trees.py --parts optimise,verify --markdown
    python docs/benchmarks/trees.py --parts tokens --target DIR --draft DIR

optimise: `best_tree` for 4096 nodes within 32 levels. verify: 768 nodes, vocabulary 32000, random float32 logits, on the CPU
and on a GPU if there is one. tokens: tokens per pass of optimal trees against chains of about as many nodes, the best of
several numbers of chains, on the CPU with resident layers. One JSON object on the last line; `--markdown` prints a table
before it. Times are medians of `--runs` runs; the limits beside them are those of the design. A pass that a text's end cut
short counts as it is.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import offload
from offload.demo import DRAFT, TARGET
from offload.report import environment
from tree.acceptance import Acceptance
from tree.draft import grow
from tree.optimizer import best_tree, expected_tokens
from tree.sampling import SamplingParams
from tree.shape import TreeShape
from tree.verify import METHODS, verify

PARTS = ("optimise", "verify", "tokens")
PUBLISHED = Path(__file__).parents[2] / "profiles/acceptance/llama-3-8b__llama-3-70b__cnn__published.json"
OPTIMISE_LIMIT_S = 0.050
VERIFY_LIMIT_S = 0.01 * 136.9e9 / 25e9  # 1 % of a pass: Llama-2-70B's layers in 16 bit at 25 GB/s
VOCAB_SIZE = 32_000
SIZES, LEVELS = (16, 64, 256, 768), 18
NUM_CHAINS, CHAIN_LEVELS = (1, 2, 4, 8, 16, 24, 32, 48), range(3, 49)
TEMPERATURES = (0.0, 0.6, 1.0)
PROMPTS = ("Fellow citizens of the Senate:", "The state of our finances is", "I recommend to the Congress that")


def median_s(run: Callable[[], object], runs: int) -> float:
    run()  # warm
    times = []
    for _ in range(runs):
        start_s = time.perf_counter()
        run()
        times.append(time.perf_counter() - start_s)
    return statistics.median(times)


def measure_optimise(acceptance: Acceptance, runs: int) -> dict[str, object]:
    seconds = median_s(lambda: best_tree(acceptance, 4096, 32), runs)
    return {"nodes": 4096, "levels": 32, "median_s": seconds, "limit_s": OPTIMISE_LIMIT_S, "runs": runs}


# -- verify --------------------------------------------------------------------------------------------------------------


class RandomModel:
    """Draft and target of the same Zipf-like law, each with its own noise at every node."""

    def __init__(self, device: str) -> None:
        self.generator = torch.Generator(device).manual_seed(0)
        self.base = -torch.arange(1, VOCAB_SIZE + 1, device=device).float().log() * 1.5

    def rows(self, count: int) -> torch.Tensor:
        return self.base + torch.randn(count, VOCAB_SIZE, generator=self.generator, device=self.base.device)

    def begin(self, shape: TreeShape) -> torch.Tensor:
        return self.rows(1)

    def expand(self, nodes: tuple[int, ...], token_ids: torch.Tensor) -> torch.Tensor:
        return self.rows(len(nodes))


def measure_verify(acceptance: Acceptance, device: str, runs: int) -> list[dict[str, object]]:
    shape, model = best_tree(acceptance, 768, LEVELS), RandomModel(device)
    cases = [(method, SamplingParams(t, top_p=p)) for method in METHODS for t in (0.6, 1.0) for p in (1.0, 0.9)]
    rows: list[dict[str, object]] = []
    for method, params in [("sample", SamplingParams()), *cases]:
        # As in the engine: `sample` and greedy verification need no draft laws, so their children are chosen.
        drafted = grow(model, 0, shape, params, model.generator, sampled=method != "sample")
        logits = model.rows(shape.num_nodes)
        seconds = median_s(lambda: verify(drafted, logits, params, model.generator, method=method), runs)  # noqa: B023
        settings = {"verifier": name_of(method, params.temperature), "temperature": params.temperature, "top_p": params.top_p}
        rows.append({"device": device, **settings, "median_s": seconds, "limit_s": VERIFY_LIMIT_S, "runs": runs})
    return rows


def name_of(verifier: str, temperature: float) -> str:
    """At temperature 0 every verifier is the same walk along the largest logits."""
    return verifier if temperature else "greedy"


# -- tokens per pass -----------------------------------------------------------------------------------------------------


def contenders(acceptance: Acceptance, num_nodes: int) -> Iterator[tuple[str, TreeShape]]:
    yield "optimal", best_tree(acceptance, num_nodes, LEVELS)
    for width in NUM_CHAINS:
        draft_levels = (num_nodes - 1) // width
        if draft_levels in CHAIN_LEVELS:
            yield f"{width}x{draft_levels}:kary", TreeShape.chains(width, draft_levels)


def tokens_per_pass(arguments: argparse.Namespace, tree: Path, verifier: str) -> dict[float, float]:
    """Tokens emitted / passes, over all prompts and seeds, by temperature; temperature 0 with the first verifier only."""
    result = {}
    models = {"draft_model": str(arguments.draft), "device": "cpu"}
    with offload.load(str(arguments.target), tree=str(tree), verifier=verifier, **models) as engine:
        for temperature in TEMPERATURES if verifier == METHODS[0] else TEMPERATURES[1:]:
            request = {"max_new_tokens": arguments.max_new_tokens, "temperature": temperature, "ignore_eos": True}
            seeds = range(arguments.seeds if temperature else 1)
            stats = [engine.generate(prompt, seed=seed, **request).stats for prompt in PROMPTS for seed in seeds]
            num_passes = sum(len(one.passes) for one in stats)
            result[temperature] = sum(one.tokens_per_pass * len(one.passes) for one in stats) / num_passes
    return result


def measure_tokens(acceptance: Acceptance, arguments: argparse.Namespace, folder: Path) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for num_nodes in arguments.sizes:
        for name, shape in contenders(acceptance, num_nodes):
            file = folder / "tree.json"
            file.write_text(json.dumps(shape.to_json()))
            about = {"size": num_nodes, "tree": name, "nodes": shape.num_nodes, "levels": shape.num_levels}
            about["expected_by_acceptance_file"] = expected_tokens(shape, acceptance)
            for verifier in METHODS:
                for temperature, tokens in tokens_per_pass(arguments, file, verifier).items():
                    settings = {"verifier": name_of(verifier, temperature), "temperature": temperature}
                    rows.append({**about, **settings, "tokens_per_pass": tokens})
            print(f"{num_nodes} nodes, {name}: done", file=sys.stderr)
    return rows


# -- output --------------------------------------------------------------------------------------------------------------


def markdown(result: dict[str, Any]) -> str:
    times = [("best tree of 4096 nodes", result["optimise"])] if "optimise" in result else []
    for row in result.get("verify", ()):
        times.append((f"{row['verifier']}, {row['device']}, T = {row['temperature']}, top-p {row['top_p']}", row))
    lines = ["| what | median | limit |", "|---|---|---|"] if times else []
    lines += [f"| {what} | {row['median_s'] * 1e3:.1f} ms | {row['limit_s'] * 1e3:.0f} ms |" for what, row in times]
    cells: dict[tuple[object, ...], list[tuple[float, str]]] = {}  # the optimal tree first
    for row in result.get("tokens", ()):
        key = (row["size"], row["temperature"], row["verifier"])
        cells.setdefault(key, []).append((row["tokens_per_pass"], row["tree"]))
    lines += ["", "| nodes | T | verifier | optimal | best chains | |", "|---|---|---|---|---|---|"] if cells else []
    for (size, temperature, verifier), ((optimal, _), *others) in cells.items():
        chains, name = max(others)
        lines.append(
            f"| {size} | {temperature} | {verifier} | {optimal:.2f} | {chains:.2f} ({name}) | {optimal / chains - 1:+.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="any of " + ", ".join(PARTS))
    parser.add_argument("--acceptance", type=Path, default=PUBLISHED, help="what optimal trees are optimal for")
    parser.add_argument("--target", type=Path, default=TARGET)
    parser.add_argument("--draft", type=Path, default=DRAFT)
    parser.add_argument("--runs", type=int, default=20, help="per time")
    parser.add_argument("--sizes", type=lambda text: tuple(map(int, text.split(","))), default=SIZES)
    parser.add_argument("--seeds", type=int, default=3, help="per prompt, above temperature 0")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    if set(parts) - set(PARTS):
        parser.error(f"--parts {arguments.parts}: any of {', '.join(PARTS)}")
    torch.set_num_threads(arguments.threads)
    acceptance = Acceptance.from_json(arguments.acceptance.read_text(encoding="utf-8"))
    result: dict[str, Any] = {"environment": environment("cpu"), "threads": arguments.threads, "acceptance": acceptance.source}
    if "optimise" in parts:
        result["optimise"] = measure_optimise(acceptance, arguments.runs)
    if "verify" in parts:
        devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
        result["verify"] = [row for device in devices for row in measure_verify(acceptance, device, arguments.runs)]
    if "tokens" in parts:
        with tempfile.TemporaryDirectory() as folder:
            result["tokens"] = measure_tokens(acceptance, arguments, Path(folder))
    if arguments.markdown:
        print(markdown(result) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
