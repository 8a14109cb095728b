"""Trees by the numbers: how long it takes to find and to verify one.

    python docs/benchmarks/trees.py --markdown

optimise: `best_tree` for 4096 nodes within 32 levels. verify: 768 nodes, vocabulary 32000, random float32 logits, on the CPU
and on a GPU if there is one. One JSON object on the last line; `--markdown` prints a table before it. Times are medians of
`--runs` runs; the limits beside them are those of the design.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from offload.report.report import environment
from tree.acceptance import Acceptance
from tree.draft import grow
from tree.optimizer import best_tree
from tree.sampling import SamplingParams
from tree.shape import TreeShape
from tree.verify import METHODS, verify

PARTS = ("optimise", "verify")
PUBLISHED = Path(__file__).parents[2] / "profiles/acceptance/llama-3-8b__llama-3-70b__cnn__published.json"
OPTIMISE_LIMIT_S = 0.050
VERIFY_LIMIT_S = 0.01 * 136.9e9 / 25e9  # 1 % of a pass: Llama-2-70B's layers in 16 bit at 25 GB/s
VOCAB_SIZE = 32_000
LEVELS = 18


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
        # As in the engine: `sample` and greedy verification need nothing to be drawn, so children are chosen.
        drafted = grow(model, 0, shape, params, model.generator, sampled=method != "sample")
        logits = model.rows(shape.num_nodes)
        seconds = median_s(lambda: verify(drafted, logits, params, model.generator, method=method), runs)  # noqa: B023
        settings = {"verifier": name_of(method, params.temperature), "temperature": params.temperature, "top_p": params.top_p}
        rows.append({"device": device, **settings, "median_s": seconds, "limit_s": VERIFY_LIMIT_S, "runs": runs})
    return rows


def name_of(verifier: str, temperature: float) -> str:
    """At temperature 0 every verifier is the same walk along the largest logits."""
    return verifier if temperature else "greedy"


# -- output --------------------------------------------------------------------------------------------------------------


def markdown(result: dict[str, Any]) -> str:
    times = [("best tree of 4096 nodes", result["optimise"])] if "optimise" in result else []
    for row in result.get("verify", ()):
        times.append((f"{row['verifier']}, {row['device']}, T = {row['temperature']}, top-p {row['top_p']}", row))
    lines = ["| what | median | limit |", "|---|---|---|"] if times else []
    lines += [f"| {what} | {row['median_s'] * 1e3:.1f} ms | {row['limit_s'] * 1e3:.0f} ms |" for what, row in times]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="any of " + ", ".join(PARTS))
    parser.add_argument("--acceptance", type=Path, default=PUBLISHED, help="what optimal trees are optimal for")
    parser.add_argument("--runs", type=int, default=20, help="per time")
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
    if arguments.markdown:
        print(markdown(result) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
