"""The first run of the bundled pair while other processes burn the cores: is there a tree, and is the prediction right?

    python tests/bench_busy.py --burners 2 --repeats 4 --markdown
    python tests/bench_busy.py --burners 2 --repeats 6 --then-idle > docs/benchmarks/busy_cpu.json

Every run is a process of its own that does what `run_70b.py` without flags does, with its quick look at a machine that is busy
from before it begins. SETTLING rounds after the first, the prediction that then holds is compared with the rounds that
follow. With --then-idle the others end when the model is loaded, and every such run stands beside one whose plan was made
without them, in turn; both are compared over the same tokens of the same text, which begin where both have had SETTLING
rounds. The figures are of a machine whose other load is nobody's to choose: the load average is printed beside them.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from offload.assemble import open_engine
from offload.cli.flags_to_settings import engine_settings
from offload.cli.generate import Asked
from offload.cli.parser import DEMO_PROMPT, parse_arguments
from offload.report.report import environment

SETTLING = 20
TOKENS = 900
BURNER = "while True: sum(range(10000))"


def first_run(flags: list[str], num_burners: int, then_idle: bool) -> dict[str, Any]:
    """`run_70b.py FLAGS` without the text, and its rounds: seconds, tokens, and the plan that each ran under. Beside so many
    burners, which end when it is loaded where it is `then_idle`."""
    import torch

    arguments = parse_arguments(["generate", "--max-new-tokens", str(TOKENS), "--ignore-eos", *flags])
    asked = Asked(DEMO_PROMPT, arguments)
    rounds: list[dict[str, Any]] = []
    began_s = time.monotonic()
    settings = engine_settings(arguments, emulate_demo_link=True)
    with burning(num_burners) as burners, open_engine(settings, expect=asked.expect, admit=asked.admit) as engine:
        loaded_s = time.monotonic() - began_s
        if then_idle:
            end(burners)
        assert asked.request is not None
        planned = engine.plan
        generation = engine.run(asked.request)
        for step in generation:
            rounds.append(
                {
                    "nodes": step.shape.num_nodes,
                    "round_s": step.stats.round_s,
                    "tokens": step.stats.emitted_tokens,
                    "predicted_round_s": engine.plan.prediction.round_s,
                    "predicted_s_per_token": engine.plan.prediction.s_per_token,
                    "planned_nodes": engine.plan.tree.num_nodes,
                }
            )
        report = generation.result()
        plan = report.to_json()["plan"]
        threads = torch.get_num_threads()
    later = rounds[SETTLING:-1]
    s_per_token = sum(one["round_s"] for one in later) / sum(one["tokens"] for one in later)
    return {
        "load": os.getloadavg()[0],
        "loading_s": loaded_s,
        "threads": threads,
        "first_tree_nodes": planned.tree.num_nodes,
        "tree_nodes": report.plan.tree.num_nodes,
        "replanned": plan.get("replanned"),  # type: ignore[attr-defined]
        "tokens_per_pass": report.stats.tokens_per_pass,
        "s_per_token": report.stats.s_per_token,
        "first_predicted_s_per_token": planned.prediction.s_per_token,
        "settled_s_per_token": s_per_token,
        "settled_predicted_s_per_token": later[0]["predicted_s_per_token"],
        "off": s_per_token / later[0]["predicted_s_per_token"] - 1,
        "round_off": sum(one["round_s"] for one in later) / len(later) / later[0]["predicted_round_s"] - 1,
        "line": report.line(),
        "rounds": rounds,
    }


@contextmanager
def burning(num_burners: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    burners = [subprocess.Popen([sys.executable, "-c", BURNER]) for _ in range(num_burners)]
    try:
        yield burners
    finally:
        end(burners)


def end(burners: list[subprocess.Popen[bytes]]) -> None:
    for burner in burners:
        burner.kill()
        burner.wait()


def own_process(*arguments: Any) -> dict[str, Any]:
    with multiprocessing.get_context("spawn").Pool(1) as process:
        return process.apply(first_run, arguments)


def settled(first: dict[str, Any], second: dict[str, Any]) -> tuple[float, float]:
    """Seconds per token of both over the same tokens: those after which both have had SETTLING rounds."""
    begin = max(sum(one["tokens"] for one in run["rounds"][: SETTLING + 1]) for run in (first, second))

    def s_per_token(run: dict[str, Any]) -> float:
        seconds = tokens = before = 0.0
        for one in run["rounds"][:-1]:
            if before >= begin:
                seconds, tokens = seconds + one["round_s"], tokens + one["tokens"]
            before += one["tokens"]
        return seconds / tokens

    return s_per_token(first), s_per_token(second)


def beside_idle(flags: list[str], num_burners: int, repeats: int) -> list[dict[str, Any]]:
    """Pairs of runs: one loaded while others burn the cores, one without; which comes first changes."""
    pairs = []
    for number in range(repeats):
        kinds = [num_burners, 0] if number % 2 == 0 else [0, num_burners]
        runs = {burners: own_process(flags, burners, True) for burners in kinds}
        busy_s, idle_s = settled(runs[num_burners], runs[0])
        pairs.append({"busy": runs[num_burners], "idle": runs[0], "s_per_token": [busy_s, idle_s], "ratio": busy_s / idle_s})
        print(f"{busy_s:.4f} s/token after a busy look, {idle_s:.4f} after an idle one: {busy_s / idle_s:.3f}", file=sys.stderr)
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--burners", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--then-idle", action="store_true")
    arguments, flags = parser.parse_known_args()
    if arguments.then_idle:
        pairs = beside_idle(flags, arguments.burners, arguments.repeats)
        ratios = sorted(one["ratio"] for one in pairs)
        document = {
            "command": " ".join(["python", *sys.argv]),
            "burners": arguments.burners,
            "median_ratio": statistics.median(ratios),
            "ratios": ratios,
            "pairs": pairs,
            "environment": {**environment("cpu"), "cores": os.cpu_count(), "machine": platform.processor()},
        }
        print(json.dumps(document, indent=1))
        return
    runs = []
    for _ in range(arguments.repeats):
        runs.append(own_process(flags, arguments.burners, False))
        if arguments.markdown:
            one = runs[-1]
            print(
                f"| {one['load']:.1f} | {one['threads']} | {one['first_tree_nodes']} to {one['tree_nodes']} | "
                f"{one['replanned']} | {one['tokens_per_pass']:.1f} | {one['s_per_token']:.4f} | "
                f"{one['first_predicted_s_per_token']:.4f} | {one['settled_s_per_token']:.4f} | "
                f"{one['settled_predicted_s_per_token']:.4f} | {one['off'] * 100:+.0f} % | "
                f"{one['round_off'] * 100:+.0f} % | {one['loading_s']:.1f} |",
                flush=True,
            )
    print(json.dumps({"burners": arguments.burners, "runs": runs, "environment": environment("cpu")}))


if __name__ == "__main__":
    main()
