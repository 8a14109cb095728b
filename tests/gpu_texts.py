"""The steps of a GPU session that generate text: first light, and the figure at 70B's shape beside plain and Accelerate."""

import json
import statistics
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from gpu_notes import Notes, Size
from offload.assemble import open_engine
from offload.bench.case_and_outcome import Case
from offload.bench.launch import run_isolated
from offload.bench.steps import prompt_ids
from offload.calibrate.measuring import measure_machine
from offload.config import EngineSettings
from offload.demo import DRAFT, TARGET, acceptance_at
from offload.planner.hardware_file import to_json
from offload.report.report import Report
from offload.report.trace import Trace
from offload.source import check_source

ROUNDS_SHOWN = 2
ROUGH_PROFILE = "l40"  # where nothing is left to choose: measuring takes longer than these runs


def light(size: Size, notes: Notes, seconds: float) -> None:
    end_s = time.monotonic() + seconds
    demo = EngineSettings(
        model=str(TARGET),
        draft_models=(str(DRAFT),),
        device=size.device,
        dtype="float32",
        tree=size.light_tree,
        profile=ROUGH_PROFILE,
    )
    plain = replace(demo, draft_models=(), tree="none", resident_layers=0)
    notes.add("demo, plain", lambda: decode(plain, size, end_s))
    notes.add("demo, greedy", lambda: decode(demo, size, end_s))
    notes.add("demo, sampled", lambda: decode(demo, size, end_s, temperature=0.6))
    notes.add("same text, demo", lambda: same_text(notes, "demo, plain", "demo, greedy"))
    wide = replace(scaled(size, size.light_layers), tree=size.light_tree, resident_layers=2, profile=ROUGH_PROFILE)
    for passes in ("eager", "graphs") if size.device != "cpu" else ("eager",):
        name = f"{size.light_layers} layers, {passes}"
        notes.add(name, partial(decode, replace(wide, draft_passes=passes), size, end_s))
        notes.add(f"same text, {name}", partial(same_text, notes, "demo, plain", name))


def figure(size: Size, notes: Notes, seconds: float) -> None:
    end_s = time.monotonic() + seconds
    ours, trace = scaled(size, size.layers), Trace()
    profile = notes.add("hardware", lambda: measured(ours, notes.folder / "hardware_profile.json"))
    ours = replace(ours, profile=profile)
    found = notes.add("ours", lambda: decode(ours, size, end_s - 0.5 * seconds, trace=trace))
    if found:
        notes.add("two rounds", lambda: last_rounds(trace, found))
    alone = replace(ours, draft_models=(), acceptances=(), tree="none")
    plain = notes.add("plain", lambda: decode(alone, size, end_s - 0.3 * seconds, tokens=3))
    for layers in size.accelerate_layers:
        other = notes.add(f"accelerate, {layers} layers", partial(accelerate, size, layers, end_s))
        if other and other["pass_s"]:
            layer_s = other["pass_s"] / layers
            print(f"Accelerate: {layer_s:.3f} s a layer, so {layer_s * size.layers:.2f} s a token")
            break
    if found and plain and found["figures"]["s_per_token"]:
        print(f"ours : plain = {plain['figures']['s_per_token'] / found['figures']['s_per_token']:.1f}")


def measured(settings: EngineSettings, path: Path) -> str:
    """A quick look at the machine, once for all that is planned with it; the file that has it."""
    kind = "cpu" if settings.device == "cpu" else "cuda"
    target = check_source(settings.model, "--model", settings.dtype, kind)
    drafts = [check_source(name, "--draft-model", settings.dtype, kind) for name in settings.draft_models]
    path.write_text(json.dumps(to_json(measure_machine(settings, target, drafts, sampling_kinds=("greedy",)))))
    return str(path)


def scaled(size: Size, layers: int) -> EngineSettings:
    return EngineSettings(
        model=f"scale:{size.preset}:{layers}",
        draft_models=(str(DRAFT),),
        acceptances=(str(acceptance_at(0)),),
        device=size.device,
        dtype=size.dtype,
        gpu_memory_bytes=size.gpu_memory_bytes,
        host_memory_bytes=size.host_memory_bytes,
    )


def decode(
    settings: EngineSettings,
    size: Size,
    end_s: float,
    *,
    tokens: int | None = None,
    temperature: float = 0.0,
    trace: Trace | None = None,
) -> dict[str, Any]:
    """One answer, broken off at `end_s`."""
    prompt, tokens = prompt_ids(), tokens or size.tokens
    settings = replace(settings, text_tokens=len(prompt) + tokens, context_tokens=len(prompt) + tokens // 2)
    with open_engine(settings, trace=trace) as engine:
        answer = engine.stream(prompt, max_new_tokens=tokens, temperature=temperature, seed=1, ignore_eos=True)
        for _ in answer:
            if time.monotonic() > end_s:
                break
        report = answer.result()
        print(report.line())
        found = {"figures": figures(report), "report": report.to_json()}
    print(json.dumps(found["figures"]), flush=True)
    return found


def figures(report: Report) -> dict[str, Any]:
    """Medians of the rounds with a whole tree, beside what was predicted. `exposed_s` is what a round takes beyond its bytes
    at the link's own rate: drafting and verification that nothing hid, and a link that stood still."""
    plan, stats = report.plan, report.stats
    steady = [one for one in stats.passes[1:] if one.num_rows >= plan.tree.num_nodes] or stats.passes

    def median(name: str) -> float:
        return float(statistics.median(getattr(one, name) for one in steady))

    link_s = plan.bytes_per_pass / plan.link_bytes_per_s if plan.link_bytes_per_s else 0.0
    times = {name: median(name) for name in ("round_s", "pass_s", "draft_s", "verify_s", "stall_s", "copied_s")}
    return {
        **times,
        "exposed_s": times["round_s"] - link_s,
        "stall_by_layer_s": [statistics.median(column) for column in zip(*(p.stall_by_layer_s for p in steady), strict=True)],
        "predicted_round_s": plan.prediction.round_s,
        "predicted_pass_s": plan.prediction.pass_s,
        "link_utilisation": report.link_utilisation,
        "s_per_token": stats.s_per_token,
        "predicted_s_per_token": plan.prediction.s_per_token,
        "tokens_per_pass": stats.tokens_per_pass,
        "tree_nodes": plan.tree.num_nodes,
        "draft_passes": plan.draft_passes,
        "device_peak_bytes": report.memory.device_peak_bytes,
        "device_ledger_bytes": sum(plan.device_ledger.values()),
    }


def same_text(notes: Notes, expected: str, found: str) -> str:
    """In 16-bit arithmetic a near tie between two tokens can fall either way when a pass has other shapes: it says where."""
    texts = [notes.found(name)["report"]["token_ids"] for name in (expected, found)]
    pairs = list(zip(*texts, strict=False))
    same = next((place for place, (one, other) in enumerate(pairs) if one != other), len(pairs))
    print(f"{found}: {same} of {len(pairs)} tokens as in {expected}")
    if same < len(pairs) or not pairs:
        raise AssertionError(f"{found} parts from {expected} at token {same} of {len(pairs)}")
    return f"{same} of {len(pairs)}"


def last_rounds(trace: Trace, found: dict[str, Any]) -> list[list[Any]]:
    """What happened when in two rounds: spans of lane, name, start and end."""
    shown_s = max(span.end_s for span in trace.spans) - ROUNDS_SHOWN * found["figures"]["round_s"]
    return [
        [span.lane, span.name, span.start_s - shown_s, span.end_s - shown_s] for span in trace.spans if span.end_s > shown_s
    ]


def accelerate(size: Size, layers: int, end_s: float) -> dict[str, Any]:
    settings = replace(scaled(size, layers), draft_models=(), acceptances=(), host_memory_bytes=None)
    left_s = max(end_s - time.monotonic(), 0.0)
    case = Case(
        engine=size.accelerate,
        settings=settings,
        prompts=(prompt_ids(),),
        max_new_tokens=3,
        runs=1,
        warmup=0,
        max_seconds=left_s,
    )
    outcome = run_isolated(case, patient=False)
    times = [seconds for sample in outcome.samples for seconds in sample.pass_s[1:]]
    if outcome.reason:
        print(f"{size.accelerate}, {layers} layers: {outcome.reason}")
    return {"pass_s": statistics.median(times) if times else None, "reason": outcome.reason, "facts": outcome.facts}
