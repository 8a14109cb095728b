"""Measures what a machine does with real work: copies over the link, reads from disk, and forward passes of the very layers
that will run, one at a time, so that a model need not fit, nor be there: its weights are noise.
"""

import statistics
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import torch

from tree.draft import DraftTree
from tree.sampling import law
from tree.shape import TreeShape
from tree.verify import verify

from .device import Device
from .planner.cost import layer_flops
from .planner.hardware import HardwareProfile, MeasuredModel, ModelTimes, Role, VerifyTimes, shape_of
from .short_model import FEW_LAYERS, MORE_LAYERS, PARAMS, ShortModel, short_models
from .source import TypedModel
from .weights.checkpoint import Checkpoint
from .weights.disk_speed import measure_disk

DISK_BYTES = 8 * 2**30
BUSY_PRODUCTS = 8  # of 1024 x 1024 matrices, beside a copy


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much to measure. A row of a table ends at the first point that takes longer than `longest_s`."""

    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    repeats: int
    longest_s: float
    copy_bytes: int
    disk_s: float


QUICK = Effort(rows=(1, 4, 16, 64, 256, 1024), contexts=(512,), repeats=2, longest_s=0.1, copy_bytes=2**26, disk_s=0.3)
FULL = Effort(
    rows=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 2048, 4096),
    contexts=(64, 1024, 4096),
    repeats=3,
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
    progress("verification")
    cost = subjects[0].model.cost
    verify_times = measure_verification(device, cost.vocab_size, effort)
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
        verify=(verify_times,),
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
    with closing(few), closing(more):
        tables = [_times_at(device, few, more, context_rows, effort) for context_rows in effort.contexts]
    return MeasuredModel(role=subject.role, shape=shape_of(subject.model.cost), times=_same_rows(tables))


def _times_at(device: Device, few: ShortModel, more: ShortModel, context_rows: int, effort: Effort) -> ModelTimes:
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
    return ModelTimes(context_rows=context_rows, rows=tuple(rows_measured), layer_s=tuple(layer_s), rest_s=tuple(rest_s))


def measure_verification(device: Device, vocab_size: int, effort: Effort) -> VerifyTimes:
    """Seconds from logits to an accepted path on the host, of trees with sampled children, by number of nodes."""
    generator = torch.Generator(device.torch_device).manual_seed(0)
    nodes, seconds = [], []
    for num_nodes in effort.rows:
        width = min(vocab_size, 8)
        shape = TreeShape((-1, *(node // width for node in range(num_nodes - 1))))
        logits = torch.randn(num_nodes, vocab_size, device=device.torch_device, generator=generator)
        laws = law(logits, PARAMS)
        token_ids = torch.tensor([(node - 1) % width if node else 0 for node in range(num_nodes)])
        draft = DraftTree(shape, device.upload(token_ids), laws)
        work = partial(verify, draft, logits, PARAMS, generator, method="traversal")
        seconds.append(_median_s(device, work, effort))
        nodes.append(num_nodes)
        if seconds[-1] > effort.longest_s:
            break
    return VerifyTimes(vocab_size=vocab_size, nodes=tuple(nodes), verify_s=tuple(seconds))


def _median_s(device: Device, work: Callable[[], object], effort: Effort) -> float:
    """Seconds of `work`, warmed up; what takes longer than `longest_s` is not repeated."""
    times = []
    for _ in range(effort.repeats + 1):
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
        ModelTimes(
            context_rows=table.context_rows,
            rows=table.rows[:shared],
            layer_s=table.layer_s[:shared],
            rest_s=table.rest_s[:shared],
        )
        for table in tables
    )
