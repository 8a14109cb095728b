"""Measures what a machine does with real work: copies over the link, reads from disk, and forward passes of the very layers
that will run, one at a time, so that a model need not fit, nor be there: its weights are noise.
"""

import itertools
import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch

from .device import Device
from .effort import Effort, rising, table_of, typical_s
from .law_times import measure_drawing, measure_verification
from .planner.cost import layer_flops
from .planner.hardware import HardwareProfile, LawTimes, MeasuredModel, ModelTimes, Role, shape_of
from .short_model import FEW_LAYERS, MORE_LAYERS, ShortModel, short_models
from .source import TypedModel
from .weights.checkpoint import Checkpoint
from .weights.disk_speed import measure_disk

DISK_BYTES = 8 * 2**30
BUSY_PRODUCTS = 8  # of 1024 x 1024 matrices, beside a copy
COPY_S = 0.01  # a copy beside what is measured, at most: the last one is waited for
MOST_PIECES = 64  # of the memory that is copied beside
WAKE_REPEATS = 8  # for one: a small difference of times that vary
LATE_S = 0.01  # how long a layer's weights are waited for, to see what waking up takes: threads that wait are asleep by then
WAKE_ROWS = 16


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
    # Without a link to emulate, a CPU copies with the cores that compute, whenever they have time.
    beside_copies = not device.host_addressable or link_bytes_per_s is not None
    if link_bytes_per_s is None:
        progress("link")
        link_bytes_per_s = measure_link(device, effort.copy_bytes, effort.repeats)
    cost = subjects[0].model.cost
    models = []
    with _busy_link(device, effort.copy_bytes, link_bytes_per_s) if beside_copies else nullcontext():
        progress("drawing and verification")
        laws = [
            measure(device, cost.vocab_size, effort, law_kind)
            for measure in (measure_drawing, measure_verification)
            for law_kind in effort.laws
        ]
        for subject in subjects:
            progress(f"{subject.role} layers")
            models.append(measure_model(device, subject, effort, laws[0]))
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


@contextmanager
def _busy_link(device: Device, num_bytes: int, link_bytes_per_s: float) -> Iterator[None]:
    """Copies one after another, as they are in a run: what is computed beside them is slower for it."""
    piece_bytes = max(int(link_bytes_per_s * COPY_S), 1)
    num_bytes = min(num_bytes, MOST_PIECES * piece_bytes)
    source, slot, over = device.pin(num_bytes, ()), device.alloc(num_bytes), threading.Event()
    source.tensor.fill_(1)  # pages that nobody has written to are all the same one
    pieces = list(zip(slot.split(piece_bytes), source.tensor.split(piece_bytes), strict=True))
    before = device.mark()

    def copy() -> None:
        for dst, src in itertools.cycle(pieces):
            if over.is_set():
                return
            device.drain(device.copy_async(dst, src, before))

    thread = threading.Thread(target=copy, name="treestream-busy-link", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        source.close()


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


def measure_model(device: Device, subject: Subject, effort: Effort, drawing: LawTimes) -> MeasuredModel:
    """Seconds of one layer and of the rest of a forward pass, by rows and context. A draft's levels are timed with the
    drawing of children between them, of which `drawing` is taken off again."""
    if subject.role == "draft":  # whose root cannot have more children than there are tokens
        effort = replace(effort, rows=tuple(rows for rows in effort.rows if rows <= subject.model.cost.vocab_size))
    few, more = short_models(device, subject.model, subject.role, effort)
    beside = drawing if subject.role == "draft" else None
    with closing(few), closing(more):
        tables = [_times_at(device, few, more, context_rows, effort, beside) for context_rows in effort.contexts]
        if device.host_addressable:  # a GPU waits without going to sleep
            tables = [replace(table, wake_s=_wake_s(device, few, table.context_rows, effort)) for table in tables]
    return MeasuredModel(role=subject.role, shape=shape_of(subject.model.cost), times=_same_rows(tables))


def _times_at(
    device: Device, few: ShortModel, more: ShortModel, context_rows: int, effort: Effort, drawing: LawTimes | None
) -> ModelTimes:
    def seconds_at(rows: int) -> list[float]:
        return typical_s(device, [model.work(rows, context_rows, effort.laws[0]) for model in (few, more)], effort)

    measured, (few_s, more_s) = table_of(effort.rows, seconds_at, effort)
    layer_s = rising([max((m - f) / (MORE_LAYERS - FEW_LAYERS), 1e-9) for f, m in zip(few_s, more_s, strict=True)])
    drawn_s = drawing.at(measured).tolist() if drawing is not None else [0.0] * len(measured)
    # Not made to rise: a remainder of noise among many rows would pull down those of few.
    rest_s = [max(f - FEW_LAYERS * layer - drawn, 0.0) for f, layer, drawn in zip(rising(few_s), layer_s, drawn_s, strict=True)]
    return ModelTimes(context_rows=context_rows, rows=measured, layer_s=layer_s, rest_s=tuple(rest_s))


def _wake_s(device: Device, model: ShortModel, context_rows: int, effort: Effort) -> float:
    """What a layer takes longer when its weights come late."""
    rows = min(WAKE_ROWS, max(effort.rows))
    works = [model.waiting(rows, context_rows, late_s) for late_s in (0.0, LATE_S)]
    at_once_s, late_s = typical_s(device, works, replace(effort, point_s=0.0, repeats=WAKE_REPEATS * effort.repeats))
    return max(late_s - at_once_s, 0.0)


def _same_rows(tables: Sequence[ModelTimes]) -> tuple[ModelTimes, ...]:
    """A longer context takes longer, so its table may have ended earlier: cut the others to it."""
    shared = min(len(table.rows) for table in tables)
    return tuple(
        replace(table, rows=table.rows[:shared], layer_s=table.layer_s[:shared], rest_s=table.rest_s[:shared])
        for table in tables
    )
