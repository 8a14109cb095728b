"""Measures what a machine does with real work: copies over the link, reads from disk, and forward passes of the very layers
that will run, one at a time, so that a model need not fit, nor be there: its weights are noise.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from tree.draft import DraftTree
from tree.sampling import SamplingParams, law, sample_without_replacement, top_k_tokens
from tree.shape import TreeShape
from tree.verify import verify

from .device import Device
from .planner.cost import layer_flops
from .planner.hardware import HardwareProfile, LawTimes, MeasuredModel, ModelTimes, Role, Task, shape_of
from .short_model import FEW_LAYERS, MORE_LAYERS, ShortModel, short_models
from .source import TypedModel
from .weights.checkpoint import Checkpoint
from .weights.disk_speed import measure_disk

DISK_BYTES = 8 * 2**30
BUSY_PRODUCTS = 8  # of 1024 x 1024 matrices, beside a copy
PARAMS = SamplingParams(temperature=0.6)
BRANCHING = 8  # children of a node
LATE_S = 0.01  # how long a layer's weights are waited for, to see what waking up takes: threads that wait are asleep by then
WAKE_ROWS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much to measure. `laws`: work on laws, sampled (True) or greedy. Work is repeated `repeats` times at least, and for
    `point_s`; a row of a table ends at the first point that takes longer than `longest_s`."""

    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    laws: tuple[bool, ...]
    repeats: int
    point_s: float
    longest_s: float
    copy_bytes: int
    disk_s: float


QUICK = Effort(
    rows=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
    contexts=(512,),
    laws=(False, True),
    repeats=3,
    point_s=0.02,
    longest_s=0.1,
    copy_bytes=2**26,
    disk_s=0.3,
)
FULL = Effort(
    rows=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 2048, 4096),
    contexts=(64, 1024, 4096),
    laws=(False, True),
    repeats=3,
    point_s=0.2,
    longest_s=0.5,
    copy_bytes=2**30,
    disk_s=3.0,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model to measure, and what it will do: a target takes whole trees, a draft a level at a time."""

    role: Role
    model: TypedModel


def measure_hardware(
    device: Device,
    subjects: Sequence[Subject],
    effort: Effort,
    *,
    link_bytes_per_s: float | None = None,
    disk: Checkpoint | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> HardwareProfile:
    """Measure `device` with `subjects`, the target first. `link_bytes_per_s` is taken as it is where it is known, as that
    of an emulated link; `disk` is a checkpoint to read from. `progress` is told what is measured next."""
    if link_bytes_per_s is None:
        progress("link")
        link_bytes_per_s = measure_link(device, effort.copy_bytes, effort.repeats)
    models = []
    for subject in subjects:
        progress(f"{subject.role} layers")
        models.append(measure_model(device, subject, effort))
    progress("drawing and verification")
    cost = subjects[0].model.cost
    laws = [
        measure(device, cost.vocab_size, effort, sampled=sampled)
        for measure in (measure_drawing, measure_verification)
        for sampled in effort.laws
    ]
    if disk is not None:
        progress("disk")
    times = models[0].times[0]
    return HardwareProfile(
        device_name=device.name,
        device_type=device.torch_device.type,
        source="measured",
        device_memory_bytes=device.free_bytes(),
        link_bytes_per_s=link_bytes_per_s,
        disk_bytes_per_s=_disk_bytes_per_s(disk, effort) if disk is not None else None,
        flops_per_s=max(layer_flops(cost, rows) / s for rows, s in zip(times.rows, times.layer_s, strict=True)),
        device_memory_bytes_per_s=cost.layer_bytes / times.layer_s[0],
        models=tuple(models),
        laws=tuple(laws),
    )


def _disk_bytes_per_s(disk: Checkpoint, effort: Effort) -> float:
    speed = measure_disk(disk, effort.disk_s, DISK_BYTES)
    return speed.read_bytes / speed.read_s


def measure_link(device: Device, num_bytes: int, repeats: int) -> float:
    """Bytes per second of one copy of `num_bytes` from pinned host memory, nothing else under way; the best of a few."""
    source, slot = device.pin(num_bytes, ()), device.alloc(num_bytes)
    rates = []
    for _ in range(repeats + 1):
        ticket = device.copy_async(slot, source.tensor, device.mark())
        device.drain(ticket)
        device.wait(ticket)
        interval = device.interval(ticket)
        rates.append(num_bytes / max(interval.end_s - interval.start_s, 1e-9))
    source.close()
    return max(rates)


def measure_copies(device: Device, sizes: Sequence[int], repeats: int) -> dict[str, dict[int, float]]:
    """Median bytes per second by copy size: from pinned memory, from pageable memory, and from pinned memory while the
    device multiplies matrices."""
    pinned, slot = device.pin(max(sizes), ()), device.alloc(max(sizes))
    pageable = torch.zeros(max(sizes), dtype=torch.uint8)
    square = torch.randn(1024, 1024, device=device.torch_device)

    def rate(source: torch.Tensor, num_bytes: int, *, busy: bool) -> float:
        seconds = []
        for _ in range(repeats):
            ticket = device.copy_async(slot[:num_bytes], source[:num_bytes], device.mark())
            if busy:
                for _ in range(BUSY_PRODUCTS):
                    torch.mm(square, square)
            device.drain(ticket)
            device.wait(ticket)
            interval = device.interval(ticket)
            seconds.append(max(interval.end_s - interval.start_s, 1e-9))
        return num_bytes / statistics.median(seconds)

    kinds = {"pinned": (pinned.tensor, False), "pageable": (pageable, False), "pinned, busy device": (pinned.tensor, True)}
    rates = {kind: {size: rate(source, size, busy=busy) for size in sizes} for kind, (source, busy) in kinds.items()}
    pinned.close()
    return rates


def measure_model(device: Device, subject: Subject, effort: Effort) -> MeasuredModel:
    """Seconds of one layer and of the rest of a forward pass, by rows and context."""
    few, more = short_models(device, subject.model, subject.role, max(effort.rows) + max(effort.contexts) + 1)
    tables = []
    for context_rows in effort.contexts:
        rows_measured, layer_s, rest_s = [], [], []
        for rows in effort.rows:
            few_s = _median_s(device, few.work(rows, context_rows), effort)
            more_s = _median_s(device, more.work(rows, context_rows), effort)
            one_layer_s = max((more_s - few_s) / (MORE_LAYERS - FEW_LAYERS), 1e-9)
            rows_measured.append(rows)
            layer_s.append(one_layer_s)
            rest_s.append(max(few_s - FEW_LAYERS * one_layer_s, 0.0))
            if more_s > effort.longest_s:
                break
        tables.append(
            ModelTimes(
                context_rows=context_rows,
                rows=tuple(rows_measured),
                layer_s=tuple(layer_s),
                rest_s=tuple(rest_s),
                wake_s=_wake_s(device, few, context_rows, effort) if subject.role == "target" else 0.0,
            )
        )
    return MeasuredModel(role=subject.role, shape=shape_of(subject.model.cost), times=_same_rows(tables))


def _wake_s(device: Device, model: ShortModel, context_rows: int, effort: Effort) -> float:
    """What a layer takes longer when its weights come late. A GPU waits without going to sleep."""
    if not device.host_addressable:
        return 0.0
    at_once_s = _median_s(device, model.work(WAKE_ROWS, context_rows), effort)
    late_s = _median_s(device, model.work(WAKE_ROWS, context_rows, late_s=LATE_S), effort)
    return max((late_s - at_once_s) / FEW_LAYERS - LATE_S, 0.0)


def measure_drawing(device: Device, vocab_size: int, effort: Effort, *, sampled: bool) -> LawTimes:
    """Seconds from a level's logits to its children, by number of nodes that have any."""
    generator = torch.Generator(device.torch_device).manual_seed(0)

    def drawing(num_rows: int) -> Callable[[], object]:
        logits = torch.randn(num_rows, vocab_size, device=device.torch_device, generator=generator)
        branching = min(BRANCHING, vocab_size)
        if not sampled:
            return partial(top_k_tokens, logits, branching)
        return lambda: sample_without_replacement(law(logits, PARAMS), branching, generator, ranking=logits)

    return _law_times(device, "draw", drawing, vocab_size, effort, sampled=sampled)


def measure_verification(device: Device, vocab_size: int, effort: Effort, *, sampled: bool) -> LawTimes:
    """Seconds from logits to an accepted path on the host, of trees whose children were drawn, by number of nodes."""
    generator = torch.Generator(device.torch_device).manual_seed(0)
    params = PARAMS if sampled else SamplingParams()

    def verification(num_nodes: int) -> Callable[[], object]:
        width = min(vocab_size, BRANCHING)
        shape = TreeShape((-1, *(node // width for node in range(num_nodes - 1))))
        logits = torch.randn(num_nodes, vocab_size, device=device.torch_device, generator=generator)
        token_ids = torch.tensor([(node - 1) % width if node else 0 for node in range(num_nodes)])
        draft = DraftTree(shape, device.upload(token_ids), law(logits, params) if sampled else None)
        return partial(verify, draft, logits, params, generator, method="traversal")

    return _law_times(device, "verify", verification, vocab_size, effort, sampled=sampled)


def _law_times(
    device: Device,
    task: Task,
    work: Callable[[int], Callable[[], object]],
    vocab_size: int,
    effort: Effort,
    *,
    sampled: bool,
) -> LawTimes:
    rows, task_s = [], []
    for num_rows in effort.rows:
        task_s.append(_median_s(device, work(num_rows), effort))
        rows.append(num_rows)
        if task_s[-1] > effort.longest_s:
            break
    return LawTimes(task=task, sampled=sampled, vocab_size=vocab_size, rows=tuple(rows), task_s=tuple(task_s))


def _median_s(device: Device, work: Callable[[], object], effort: Effort) -> float:
    """Seconds of `work`, warmed up; what takes longer than `longest_s` is not repeated."""
    times: list[float] = []
    while len(times) <= effort.repeats or sum(times) < effort.point_s:
        start = device.mark()
        work()
        end = device.mark()
        device.drain(end)
        times.append(device.interval(end).end_s - device.interval(start).end_s)
        if times[-1] > effort.longest_s:
            break
    return statistics.median(times[1:] or times)


def _same_rows(tables: Sequence[ModelTimes]) -> tuple[ModelTimes, ...]:
    """A longer context takes longer, so its table may have ended earlier: cut the others to it."""
    shared = min(len(table.rows) for table in tables)
    return tuple(
        replace(table, rows=table.rows[:shared], layer_s=table.layer_s[:shared], rest_s=table.rest_s[:shared])
        for table in tables
    )
