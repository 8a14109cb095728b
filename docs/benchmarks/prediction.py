"""The planner beside reality: predicted and measured passes and seconds per token, and the planner's tree beside a sweep.

    python docs/benchmarks/prediction.py --markdown

The bundled pair on the CPU device over emulated links, greedy, all layers streamed. The machine is measured quickly before
each run, as without --profile; seconds per token are predicted with the tokens per pass that were measured, so that the
model of time is judged and not the text.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from offload.assemble import open_engine
from offload.config import EngineSettings
from offload.demo import DRAFT, PROMPTS, TARGET, acceptance_at
from offload.engine import Engine
from offload.report import environment

CASES = ((50e6, "4x6:kary"), (100e6, "64x10"), (200e6, "16x8"), (400e6, "64x10"))
SWEEP = ("none", "1x4:kary", "8x6", "16x8", "32x8", "48x8", "64x10", "96x10", "128x10", "256x12")
SWEEP_LINK = 200e6
TOKENS = 96


def measure(engine: Engine, prompts: list[str]) -> dict[str, float]:
    """Medians over prompts of steady rounds."""
    passes, rounds, tokens, seconds = [], [], 0, 0.0
    for prompt in prompts:
        engine.forget()
        generation = engine.stream(prompt, max_new_tokens=TOKENS, ignore_eos=True)
        for _ in generation:
            pass
        steady = [one for one in generation.stats.passes[1:-1]]
        passes += [one.pass_s for one in steady]
        rounds += [one.round_s for one in steady]
        tokens += sum(one.emitted_tokens for one in steady)
        seconds += sum(one.round_s for one in steady)
    return {
        "pass_s": statistics.median(passes),
        "round_s": statistics.median(rounds),
        "s_per_token": seconds / tokens,
        "tokens_per_pass": tokens / len(rounds),
    }


def run(link: float, tree: str, prompts: list[str]) -> dict[str, Any]:
    settings = EngineSettings(
        model=str(TARGET),
        draft_models=(str(DRAFT),),
        acceptances=(str(acceptance_at(0.0)),),
        tree=tree,
        device="cpu",
        resident_layers=0,
        emulate_link_bytes_per_s=link,
    )
    with open_engine(settings) as engine:
        predicted, measured = engine.plan.prediction, measure(engine, prompts)
        return {
            "link_bytes_per_s": link,
            "tree": tree,
            "nodes": engine.plan.tree.num_nodes,
            "levels": engine.plan.tree.num_levels,
            "predicted_pass_s": predicted.exposed_pass_s,
            "measured_pass_s": measured["pass_s"],
            "predicted_round_s": predicted.round_s,
            "measured_round_s": measured["round_s"],
            "predicted_s_per_token": predicted.round_s / measured["tokens_per_pass"],
            "predicted_s_per_token_by_profile": predicted.s_per_token,
            "measured_s_per_token": measured["s_per_token"],
            "tokens_per_pass": measured["tokens_per_pass"],
        }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--prompts", type=int, default=4)
    arguments = parser.parse_args()
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()[: arguments.prompts]
    prompts = [json.loads(line)["turns"][0] for line in lines]
    cases = [run(link, tree, prompts) for link, tree in CASES]
    sweep = [run(SWEEP_LINK, tree, prompts) for tree in ("auto", *SWEEP)]
    best = min(sweep[1:], key=lambda row: row["measured_s_per_token"])
    if arguments.markdown:
        print("| link | tree | pass s (predicted) | round s (predicted) | s/token (predicted) |\n|---|---|---|---|---|")
        for row in [*cases, *sweep]:
            print(
                f"| {row['link_bytes_per_s'] / 1e6:.0f} MB/s | {row['tree']} ({row['nodes']}x{row['levels']}) "
                f"| {row['measured_pass_s']:.4f} ({row['predicted_pass_s']:.4f}) "
                f"| {row['measured_round_s']:.4f} ({row['predicted_round_s']:.4f}) "
                f"| {row['measured_s_per_token']:.4f} ({row['predicted_s_per_token']:.4f}) |"
            )
    own = sweep[0]["measured_s_per_token"] / best["measured_s_per_token"]
    print(json.dumps({"cases": cases, "sweep": sweep, "own_over_best": own, "environment": environment("cpu")}))


if __name__ == "__main__":
    main()
