"""The bundled target over an emulated link on which copying dominates: what a base makes of a pass, beside a separate draft and
plain decoding.

    python tests/bench_base_link.py [--runs 3] [--link 2MB/s] > docs/benchmarks/base_link_cpu.json

Runs `run_70b.py --json`, computing in bfloat16, as raw layers travel in what computes; each case in its own process, the cases
in turns, `--runs` times. Medians. Plain cases have a few tokens, as each is a whole pass. Greedy text is compared, as far as
both go; in 16 bit passes of one row and of many may round differently, and flip a near-tie.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from offload.config import base_of_draft
from offload.demo import DRAFT, TARGET, acceptance_at

PROMPT = "The tide turns when"
PLAIN_TOKENS = 12
ROOT = Path(__file__).resolve().parents[1]
# name: draft, codec, tree
CASES: dict[str, tuple[str, str, str]] = {
    "plain": ("none", "none", "none"),
    "plain, coded without loss": ("none", "lossless", "none"),
    "plain, coded beside an int4 base": ("none", "residual", "none"),
    "bundled draft": (str(DRAFT), "none", "auto"),
    "bundled draft, coded without loss": (str(DRAFT), "lossless", "auto"),
    "bundled draft, coded beside an int4 base": (str(DRAFT), "residual", "auto"),
    "self:int8, its remainder": ("self:int8", "residual", "auto"),
    "self:int4, its remainder": ("self:int4", "residual", "auto"),
    "self:int4, raw": ("self:int4", "none", "auto"),
}


def run(draft: str, codec: str, tree: str, arguments: argparse.Namespace) -> Any:
    command = [sys.executable, str(ROOT / "run_70b.py"), "--json", "-q", "--device", "cpu", "--dtype", "bfloat16"]
    command += ["--model", str(TARGET), "--draft-model", draft, "--codec", codec, "--tree", tree]
    num_tokens = PLAIN_TOKENS if tree == "none" else arguments.tokens
    command += ["--emulate-link", arguments.link, "--prompt", PROMPT, "-n", str(num_tokens), "--ignore-eos"]
    if draft != "none":
        command += ["--acceptance", str(acceptance_at(0, base_of_draft(draft)))]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def row_of(name: str, results: list[Any]) -> dict[str, Any]:
    first = results[0]

    def median(section: str, key: str) -> float:
        return float(statistics.median(result[section][key] for result in results))

    streaming, tokens = first["streaming"], first["speculation"]["tokens_per_pass"]
    return {
        "case": name,
        "s_per_token": median("timing", "s_per_token"),
        "tokens_per_pass": tokens,
        "nodes": first["speculation"]["tree_nodes"],
        "levels": first["speculation"]["tree_levels"],
        "bytes_per_pass": streaming["bytes_per_pass"],
        "raw_bytes_per_pass": streaming["raw_bytes_per_pass"],
        "link_utilisation": median("streaming", "link_utilisation"),
        "predicted_round_s": median("plan", "predicted_round_s"),
        "predicted_pass_s": median("plan", "predicted_pass_s"),
        "predicted_draft_s": median("plan", "predicted_draft_s"),
        "measured_round_s": median("timing", "decode_s") / (first["speculation"]["passes"] - 1),
        "replanned": [result["plan"]["replanned"] for result in results],
        "token_ids": first["token_ids"],
        "environment": first["environment"],
    }


def same(text: list[int], other: list[int]) -> bool:
    return all(token == like for token, like in zip(text, other, strict=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=144)
    parser.add_argument("--link", default="2MB/s")
    arguments = parser.parse_args()
    results: dict[str, list[Any]] = {name: [] for name in CASES}
    for _ in range(arguments.runs):  # in turns: the machine changes from minute to minute
        for name, (draft, codec, tree) in CASES.items():
            results[name].append(run(draft, codec, tree, arguments))
    rows = [row_of(name, found) for name, found in results.items()]
    texts = [row.pop("token_ids") for row in rows]
    environment = rows[0]["environment"]
    for row in rows:
        row["weights"] = row.pop("environment")["weights"]
        row["speedup"] = rows[0]["s_per_token"] / row["s_per_token"]
        row["of_raw_bytes"] = row["bytes_per_pass"] / max(row["raw_bytes_per_pass"], 1)
        row["over_predicted"] = row["measured_round_s"] / row["predicted_round_s"] - 1
    document = {
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()},
        "environment": environment,
        "emulated_link": arguments.link,
        "runs": arguments.runs,
        "greedy_text_identical": all(same(text, texts[-1]) for text in texts),
        "rows": rows,
    }
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
