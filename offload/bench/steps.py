"""The steps of the suite. Each is a function of the suite's size and of the time that the step may take. It returns what it
measured as JSON, and knows neither other steps nor files nor what is done with the result."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from tree.acceptance import Acceptance
from tree.draft import DraftTree
from tree.optimizer import best_tree
from tree.sampling import SamplingParams
from tree.verify import Method, verify

from ..assemble import open_engine
from ..calibrate.measuring import measure_machine
from ..config import EngineSettings
from ..demo import ACCEPTANCE, PROMPTS, TARGET
from ..device import open_device, pinned
from ..planner.hardware_file import to_json
from ..report.trace import Trace
from ..source import open_drafts, open_target
from ..text.tokenizer import open_tokenizer
from .case_and_outcome import Case, Event, Outcome, outcome_of
from .engines import engines_for, why_not
from .launch import run_isolated
from .machine import describe_gpu, describe_host
from .measure import run_case
from .our_engine import open_our_engine
from .prompts import read_prompts
from .suite_size import SuiteSize
from .summary import percentile, summarise

Row = dict[str, Any]
SuiteStep = Callable[[SuiteSize, float], Row]
LINK_COPIES = 5
VERIFY_RUNS = 5
KNEE = 1.05
TIMELINE_ROUNDS = 2
HARDWARE = "hardware"  # the step whose record is a profile for all others


def link(size: SuiteSize, max_seconds: float) -> Row:
    """Rates of copies by size, with nothing else under way, and how long host memory takes to be mapped and registered."""
    device = open_device(size.settings.device, size.settings.emulate_link_bytes_per_s)
    try:
        largest = max(size.link_bytes)
        buffer, rates, start_s = device.alloc(largest), {}, time.monotonic()
        with pinned(device, largest) as host:
            registered_s = time.monotonic() - start_s
            for num_bytes in size.link_bytes:
                times = []
                for _ in range(LINK_COPIES):
                    ticket = device.copy_async(buffer[:num_bytes], host.tensor[:num_bytes], device.mark())
                    device.drain(ticket)
                    interval = device.interval(ticket)
                    times.append(interval.end_s - interval.start_s)
                rates[str(num_bytes)] = num_bytes / min(times)
            pinned_bytes = host.pinned_bytes
        del buffer
        return {
            "host": describe_host(),
            "gpu": describe_gpu(),
            "bytes_per_s": rates,
            "pinned_bytes": pinned_bytes,
            "registration_bytes": largest,
            "registration_s": registered_s,
        }
    finally:
        device.close()


def hardware(size: SuiteSize, max_seconds: float) -> Row:
    """A quick look at the machine, as a profile: with it all engines of later steps plan, instead of looking for themselves."""
    settings = size.settings
    device_type = "cuda" if size.on_gpu else "cpu"
    target = open_target(settings, device_type)
    drafts = [draft.source for draft in open_drafts(settings, target, device_type)]
    return to_json(measure_machine(settings, target, drafts, sampling_kinds=("greedy", "sampled")))


def utilisation(size: SuiteSize, max_seconds: float) -> Row:
    """Utilisation of the link, by slots, by tree, by resident layers."""
    base = _small(size)
    variants = [replace(base, tree="none", draft_models=(), slots=slots, resident_layers=0) for slots in size.slots]
    variants += [replace(base, tree=tree, slots=3, resident_layers=0) for tree in size.trees if tree != "none"]
    variants += [replace(base, tree=size.trees[-1], slots=3, resident_layers=count) for count in size.residents]
    return _rows(_run_all(size, variants, max_seconds), len(variants))


def pass_time(size: SuiteSize, max_seconds: float) -> Row:
    """Time of a pass by nodes: flat while the stream hides the computing, with a knee where it no longer does."""
    variants = [
        replace(_small(size), tree=f"{nodes}x24" if nodes > 1 else "none", slots=3, resident_layers=0)
        for nodes in size.pass_nodes
    ]
    rows = _run_all(size, variants, max_seconds)
    curve = [(row["facts"]["tree_nodes"], row["facts"]["pass_s"]) for row in rows if row["facts"].get("pass_s")]
    flat_s = min((pass_s for _, pass_s in curve), default=None)
    knee = next((nodes for nodes, pass_s in curve if flat_s and pass_s > KNEE * flat_s), None)
    return {**_rows(rows, len(variants)), "curve": curve, "flat_s": flat_s, "knee_nodes": knee}


def table(size: SuiteSize, max_seconds: float) -> Row:
    """For every budget the planner's choice, greedy and at temperature 0.6, and plain decoding. The first run holds every layer
    in host memory if it can, the others as many as `_small` says."""
    rows: list[Row] = []
    end_s = time.monotonic() + max_seconds
    cases = [(budget, *case) for budget in size.budgets for case in (("ours", 0.0), ("ours", 0.6), ("plain", 0.0))]
    for budget, engine, temperature in cases:
        settings = replace(_small(size) if rows else size.settings, gpu_memory_bytes=budget)
        rows += _run_all(size, [settings], end_s - time.monotonic(), engine=engine, temperature=temperature)
    return _rows(rows, len(cases))


def timeline(size: SuiteSize, max_seconds: float) -> Row:
    """What happened when in the last passes of the planner's choice: spans of lane, name, start and end."""
    trace = Trace()
    end_s = time.monotonic() + max_seconds
    prompt = prompt_ids()
    settings = replace(_small(size), text_tokens=len(prompt) + size.new_tokens)
    with open_engine(settings, trace=trace) as engine:
        for step in engine.stream(prompt, max_new_tokens=size.new_tokens, ignore_eos=True):
            last_s = step.stats.round_s
            if time.monotonic() > end_s:
                break
    shown_s = trace.spans[-1].end_s - TIMELINE_ROUNDS * last_s
    return {"spans": [[s.lane, s.name, s.start_s, s.end_s] for s in trace.spans if s.end_s > shown_s]}


def sweep(size: SuiteSize, max_seconds: float) -> Row:
    """Trees around the planner's choice, under the first budget."""
    variants = [replace(_small(size), tree=tree) for tree in size.sweep]
    return _rows(_run_all(size, variants, max_seconds), len(variants))


def baselines(size: SuiteSize, max_seconds: float) -> Row:
    """Accelerate and DeepSpeed at the depths that fit, and the line through them at full depth."""
    end_s = time.monotonic() + max_seconds
    engines = engines_for(("accelerate", "deepspeed"), on_gpu=size.on_gpu)[1:]
    reasons = {engine: why_not(engine, on_gpu=size.on_gpu) for engine in engines}
    left = len(size.depths) * sum(reason is None for reason in reasons.values())
    rows: list[Row] = []
    for engine, reason in reasons.items():
        points: list[tuple[int, float]] = []
        for depth in size.depths if reason is None else ():
            outcome = _run_baseline(size, engine, depth, (end_s - time.monotonic()) / left)
            left -= 1
            times = [s for sample in outcome.samples for s in sample.pass_s[1:]]
            if times:
                points.append((depth, percentile(times, 50) or 0.0))
            reason = outcome.reason
        rows.append({"engine": engine, "reason": reason, "points": points, **fit_line(points, _full_depth(size))})
    complete = all(row["reason"] != "its time was over" for row in rows)
    return {"rows": rows, "complete": complete}


def verification(size: SuiteSize, max_seconds: float) -> Row:
    """Medians of judging one tree, greedy and sampled, on the device that computes."""
    device = open_device(size.settings.device)
    place = device.torch_device
    generator = torch.Generator(place).manual_seed(0)
    shape = best_tree(Acceptance.from_json(ACCEPTANCE.read_text(encoding="utf-8")), size.verify_nodes, 18)
    probabilities = torch.rand(shape.num_nodes, size.verify_vocab, generator=generator, device=place).softmax(-1)
    logits = torch.randn(shape.num_nodes, size.verify_vocab, generator=generator, device=place) * 4
    token_ids = torch.tensor([0, *shape.ranks[1:]], device=place)
    rows = []
    methods: tuple[tuple[Method, float], ...] = (("sample", 0.0), ("traversal", 0.6), ("rejection", 0.6))
    for method, temperature in methods:
        drawn = (False, *(temperature > 0,) * (shape.num_nodes - 1))
        draft = DraftTree(shape, token_ids, probabilities if temperature else None, drawn)
        times = []
        for _ in range(VERIFY_RUNS + 1):
            start_s = time.monotonic()
            verify(draft, logits, SamplingParams(temperature=temperature), generator, method=method)  # ends with a host sync
            times.append(time.monotonic() - start_s)
        rows.append({"method": method if temperature else "greedy", "median_s": percentile(times[1:], 50)})
    device.close()
    return {"nodes": shape.num_nodes, "vocabulary": size.verify_vocab, "rows": rows}


# In order of what matters most, with their shares of the time.
STEPS: Mapping[str, tuple[SuiteStep, int]] = {
    HARDWARE: (hardware, 1),
    "link": (link, 1),
    "table": (table, 8),
    "baselines": (baselines, 4),
    "pass_time": (pass_time, 3),
    "utilisation": (utilisation, 3),
    "sweep": (sweep, 2),
    "timeline": (timeline, 1),
    "verification": (verification, 1),
}


def fit_line(points: list[tuple[int, float]], depth: int) -> Row:
    """Least squares of seconds over layers. `worst` is the largest distance of a point from the line, relative."""
    if len(points) < 2:
        return {"s_per_layer": None, "extrapolated_s_per_token": None, "worst": None}
    mean_x, mean_y = (sum(point[axis] for point in points) / len(points) for axis in (0, 1))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    base = mean_y - slope * mean_x
    worst = max(abs(base + slope * x - y) / y for x, y in points)
    return {"s_per_layer": slope, "extrapolated_s_per_token": base + slope * depth, "depth": depth, "worst": worst}


def _small(size: SuiteSize) -> EngineSettings:
    return replace(size.settings, host_memory_bytes=size.host_bytes, gpu_memory_bytes=size.budgets[0])


def _rows(rows: list[Row], wanted: int) -> Row:
    return {"rows": rows, "complete": len(rows) == wanted}


def _run_all(
    size: SuiteSize, variants: list[EngineSettings], max_seconds: float, *, engine: str = "ours", temperature: float = 0.0
) -> list[Row]:
    """Our engine in this process, one variant after another. A variant for which no time is left is missing. One that was
    refused has a reason and no figures."""
    end_s = time.monotonic() + max_seconds
    rows = []
    for settings in variants:
        if time.monotonic() > end_s:
            break
        case = Case(
            engine=engine,
            settings=settings,
            prompts=(prompt_ids(),),
            max_new_tokens=size.plain_tokens if engine == "plain" or settings.tree == "none" else size.new_tokens,
            runs=1,
            max_seconds=max(end_s - time.monotonic(), 0.0),
            temperature=temperature,
        )
        events: list[Event] = []
        run_case(case, open_our_engine, events.append)
        outcome = outcome_of(engine, events)
        row = summarise([outcome], greedy=False)[0]
        asked = {"tree": settings.tree, "temperature": temperature, "budget_bytes": settings.gpu_memory_bytes}
        rows.append({**asked, **row, "facts": outcome.facts})
    return rows


def _run_baseline(size: SuiteSize, engine: str, depth: int, max_seconds: float) -> Outcome:
    settings = replace(
        size.settings,
        model=f"{size.settings.model}:{depth}",
        gpu_memory_bytes=size.budgets[0],
        emulate_link_bytes_per_s=None,
    )
    tokens = size.baseline_tokens + 1
    case = Case(
        engine=engine, settings=settings, prompts=(prompt_ids(),), max_new_tokens=tokens, runs=1, max_seconds=max_seconds
    )
    return run_isolated(case, patient=False)


def prompt_ids() -> tuple[int, ...]:
    """A prompt of the demo's, which is every scale model's."""
    tokenizer = open_tokenizer(TARGET)
    assert tokenizer is not None
    return tuple(tokenizer.encode(read_prompts(PROMPTS)[0].text))


def _full_depth(size: SuiteSize) -> int:
    from ..scale.preset import parse_scale_name, read_preset

    return int(read_preset(parse_scale_name(size.settings.model, "--model")[0], "--model")["num_hidden_layers"])
