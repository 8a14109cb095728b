"""The bundled pair on the CPU device over its emulated link: what trees make of one and the same stream of weights.

    python tests/bench_demo.py > docs/benchmarks/demo_cpu.json

Runs `run_70b.py --json` on the default prompt, each case in its own process, `--runs` times, and checks that greedy text is
the same for every tree. Medians.
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

ROOT = Path(__file__).resolve().parents[1]
CASES = (
    ("none", 0.0),
    ("auto", 0.0),
    ("4x6:kary", 0.0),
    ("64x10", 0.0),
    ("64:dynamic", 0.0),
    ("256x14", 0.0),
    ("none", 0.6),
    ("auto", 0.6),
)


def run(tree: str, temperature: float) -> Any:
    command = [sys.executable, str(ROOT / "run_70b.py"), "--tree", tree, "--temperature", str(temperature), "--json", "-q"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(tree: str, temperature: float, runs: int) -> dict[str, Any]:
    results = [run(tree, temperature) for _ in range(runs)]
    first = results[0]
    return {
        "tree": tree,
        "temperature": temperature,
        "nodes": first["speculation"]["tree_nodes"],
        "dynamic": first["plan"]["dynamic"],
        "s_per_token": statistics.median(result["timing"]["s_per_token"] for result in results),
        "tokens_per_pass": first["speculation"]["tokens_per_pass"],
        "link_utilisation": statistics.median(result["streaming"]["link_utilisation"] for result in results),
        "predicted_s_per_token": first["plan"]["predicted_s_per_token"],
        "floor_s_per_token": first["plan"]["predicted_pass_s"] / first["speculation"]["tokens_per_pass"],
        "token_ids": first["token_ids"],
        "environment": first["environment"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    rows = [measure(tree, temperature, parser.parse_args().runs) for tree, temperature in CASES]
    greedy = [row.pop("token_ids") for row in rows if row["temperature"] == 0]
    for row in rows:
        row.pop("token_ids", None)
        row["speedup"] = rows[0]["s_per_token"] / row["s_per_token"]
    document = {
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()},
        "environment": rows[0].pop("environment"),
        "emulated_link_bytes_per_s": 100e6,
        "greedy_text_identical": all(tokens == greedy[0] for tokens in greedy),
        "rows": [{key: value for key, value in row.items() if key != "environment"} for row in rows],
    }
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
