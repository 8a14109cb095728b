"""Exactness of sampled text on the real engine: 2e5 rounds and more, chi-square at 1e-4 with Bonferroni.

    python tests/bench_exactness.py --rounds 200000 --seed 12345

A tiny random pair (vocabulary 6), streamed layers, a tree of two chains of two: every text of four tokens takes two to four
rounds. For every verifier, temperatures 0.3, 0.6, 1 and 1.5, top-p 0.8, 0.9 and 1, the frequencies of all 1296 texts are
tested against the target's exact probabilities. Prints one JSON object.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from exactness import run, save_pair
from offload.report.report import environment
from tree.sampling import SamplingParams

CASES = list(itertools.product(("traversal", "rejection", "sample"), (0.3, 0.6, 1.0, 1.5), (0.8, 0.9, 1.0)))
ALPHA = 1e-4
ROUNDS_PER_TEXT = 3.0  # about; the true number is printed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=12345)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    texts = round(arguments.rounds / ROUNDS_PER_TEXT / len(CASES))
    start_s = time.monotonic()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        pair = save_pair(Path(folder))
        for verifier, temperature, top_p in CASES:
            outcome = run(*pair, verifier, SamplingParams(temperature=temperature, top_p=top_p), texts, arguments.seed)
            results.append(
                {
                    "verifier": verifier,
                    "temperature": temperature,
                    "top_p": top_p,
                    "texts": outcome.texts,
                    "rounds": outcome.rounds,
                    "degrees_of_freedom": outcome.degrees,
                    "p_value": outcome.p_value,
                }
            )
            print(results[-1], file=sys.stderr, flush=True)
    least = min(result["p_value"] for result in results)
    document = {
        "environment": environment("cpu"),
        "rounds": sum(result["rounds"] for result in results),
        "seconds": time.monotonic() - start_s,
        "bound": ALPHA / len(CASES),
        "least_p_value": least,
        "passed": least > ALPHA / len(CASES),
        "cases": results,
    }
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
