"""The planner beside reality: predicted and measured passes and seconds per token, and the planner's tree beside a sweep.

    python tests/bench_prediction.py --markdown

The bundled pair on the CPU device over emulated links, greedy, all layers streamed. Every repeat measures the machine anew and
quickly, as a run without --profile does, and then goes through all trees, so that a machine whose speed changes changes it for
all of them. Every run has a process of its own. Seconds per token are predicted with the tokens per pass that were
measured, so that the model of time is judged and not the text. The trees of the sweep are compared over all prompts of the
pair: over two of them, luck with the text decides between trees that are 7 % apart.
"""

import argparse
import json
import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from offload.assemble import open_engine
from offload.calibrate import QUICK, Subject, measure_hardware
from offload.config import EngineSettings
from offload.demo import DRAFT, PROMPTS, TARGET, acceptance_at
from offload.device import open_device
from offload.engine.engine import Engine
from offload.planner.hardware import HardwareProfile
from offload.report.report import environment
from offload.source import check_source

CASES = ((50e6, "4x6:kary"), (100e6, "64x10"), (200e6, "16x8"), (400e6, "64x10"))
SWEEP = ("none", "4x6:kary", "16x8", "32x8", "64x10", "96x10", "128x10", "160x13", "256x12")
SWEEP_LINK = 200e6
TOKENS = 96
MEASURED = ("pass_s", "round_s", "s_per_token")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One tree over one link in one repeat: [predicted, measured] seconds."""

    link_bytes_per_s: float
    tree: str
    nodes: int
    levels: int
    tokens_per_pass: float
    pass_s: tuple[float, float]
    round_s: tuple[float, float]
    s_per_token: tuple[float, float]


def settings_for(link: float, tree: str, prompt_tokens: Sequence[int]) -> EngineSettings:
    return EngineSettings(
        model=str(TARGET),
        draft_models=(str(DRAFT),),
        acceptances=(str(acceptance_at(0.0)),),
        tree=tree,
        device="cpu",
        resident_layers=0,
        emulate_link_bytes_per_s=link,
        text_tokens=max(prompt_tokens) + TOKENS,
        context_tokens=sum(prompt_tokens) // len(prompt_tokens) + TOKENS // 2,
    )


def look_at_the_machine(link: float, context_tokens: int) -> HardwareProfile:
    target = check_source(str(TARGET), "--model", "auto", "cpu").model
    draft = check_source(str(DRAFT), "--draft-model", "auto", "cpu").model
    device = open_device("cpu", link)
    try:
        subjects = [Subject(role="target", model=target), Subject(role="draft", model=draft)]
        effort = replace(QUICK, contexts=(context_tokens,), sampling_kinds=("greedy",))
        return measure_hardware(device, subjects, effort, link_bytes_per_s=link)
    finally:
        device.close()


def run(settings: EngineSettings, hardware: HardwareProfile, prompts: list[list[int]]) -> Row:
    with open_engine(settings, hardware=hardware) as engine:
        steady = [one for prompt in prompts for one in rounds(engine, prompt)]
        tokens_per_pass = sum(one.emitted_tokens for one in steady) / len(steady)
        predicted, shape = engine.plan.prediction, engine.plan.tree
        round_s = statistics.median(one.round_s for one in steady)
        return Row(
            link_bytes_per_s=settings.emulate_link_bytes_per_s or 0.0,
            tree=settings.tree,
            nodes=shape.num_nodes,
            levels=shape.num_levels,
            tokens_per_pass=tokens_per_pass,
            pass_s=(predicted.exposed_pass_s, statistics.median(one.pass_s for one in steady)),
            round_s=(predicted.round_s, round_s),
            s_per_token=(
                predicted.round_s / tokens_per_pass,
                sum(one.round_s for one in steady) / len(steady) / tokens_per_pass,
            ),
        )


def alone(work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` returns, in a process of its own: in a shared one, runs right behind a measurement got slower every time."""
    with multiprocessing.get_context("spawn").Pool(1) as process:
        return process.apply(work, arguments)


def rounds(engine: Engine, prompt: list[int]) -> list[Any]:
    """Those of a steady state: neither the first nor the last, which is cut."""
    engine.forget()
    generation = engine.stream(prompt, max_new_tokens=TOKENS, ignore_eos=True)
    for _ in generation:
        pass
    return generation.stats.passes[1:-1]


def summary(rows: list[Row]) -> dict[str, Any]:
    """Medians over repeats; `off` is the median of measured / predicted - 1."""
    first = rows[0]
    document: dict[str, Any] = {
        "link_bytes_per_s": first.link_bytes_per_s,
        "tree": first.tree,
        "nodes": [row.nodes for row in rows] if len({row.nodes for row in rows}) > 1 else first.nodes,
        "levels": [row.levels for row in rows] if len({row.levels for row in rows}) > 1 else first.levels,
        "tokens_per_pass": statistics.median(row.tokens_per_pass for row in rows),
    }
    for name in MEASURED:
        pairs = [getattr(row, name) for row in rows]
        document[f"predicted_{name}"] = statistics.median(predicted for predicted, _ in pairs)
        document[f"measured_{name}"] = statistics.median(measured for _, measured in pairs)
        document[f"{name}_off"] = statistics.median(measured / predicted - 1 for predicted, measured in pairs)
    return document


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()[: arguments.prompts]
    tokenizer = check_source(str(TARGET), "--model", "auto", "cpu").tokenizer
    assert tokenizer is not None
    prompts = [tokenizer.encode(json.loads(line)["turns"][0]) for line in lines]
    cells = [*CASES, *((SWEEP_LINK, tree) for tree in ("auto", *SWEEP))]
    rows: list[list[Row]] = [[] for _ in cells]
    for _ in range(arguments.repeats):
        known: dict[float, HardwareProfile] = {}
        for place, (link, tree) in enumerate(cells):
            settings = settings_for(link, tree, [len(prompt) for prompt in prompts])
            if link not in known:
                known[link] = alone(look_at_the_machine, link, settings.context_tokens)
            rows[place].append(alone(run, settings, known[link], prompts))
    found = [summary(cell) for cell in rows]
    own, sweep = found[len(CASES)], found[len(CASES) + 1 :]
    best = min(sweep, key=lambda row: row["measured_s_per_token"])
    document = {
        "cases": found[: len(CASES)],
        "own": own,
        "sweep": sweep,
        "own_over_best": own["measured_s_per_token"] / best["measured_s_per_token"],
        "repeats": arguments.repeats,
        "rows": [[asdict(row) for row in cell] for cell in rows],
        "environment": environment("cpu"),
    }
    if arguments.markdown:
        print("| link | tree | pass s (predicted) | off | round s (predicted) | off | s/token (predicted) | off |")
        print("|---|---|---|---|---|---|---|---|")
        for row in found:
            times = " | ".join(
                f"{row[f'measured_{name}']:.4f} ({row[f'predicted_{name}']:.4f}) | {row[f'{name}_off'] * 100:+.1f} %"
                for name in MEASURED
            )
            print(f"| {row['link_bytes_per_s'] / 1e6:.0f} MB/s | {row['tree']} ({row['nodes']}x{row['levels']}) | {times} |")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
