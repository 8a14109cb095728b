"""What a machine can do: its rates, and seconds of real work measured on it.

Measures nothing (offload/calibrate does) and needs no torch. A model that was not measured is estimated from the rates.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..config import SamplingKind
from .cost import LayerCost, ModelCost, attention_flops, layer_flops

Floats = npt.NDArray[np.float64]
Role = Literal["target", "draft", "host draft"]  # the last computes on the CPU, beside a device that has the target
Task = Literal["draw", "verify"]  # children of a level's nodes, a tree's accepted path

ROWS = (1, 4, 16, 64, 128, 256, 512, 768, 1024, 2048, 4096)
# How often float32 [rows, vocabulary] is read or written: on the way from logits to sampled children; to what verification
# leaves of their probabilities; greedily, to the most probable tokens. A nucleus is sorted for, in four passes over keys and
# ids of eight bytes, and back. Counted in the code, used only where nothing was measured.
SWEEPS: Mapping["Task", Mapping[SamplingKind, int]] = {
    "draw": {"greedy": 6, "sampled": 8, "nucleus": 44},
    "verify": {"greedy": 2, "sampled": 16, "nucleus": 52},
}
# How long decoding a layer takes where nobody has measured: so many times reading what is stored of it and writing what comes
# out, at the rate of the device's memory. Kernels that unpack bits seldom reach half of that rate; plain torch on one core of a
# processor took 8 to 28 times as long into float32, format by format.
DECODE_SWEEPS: Mapping[str, float] = {"cuda": 2.5, "cpu": 15.0}
LEAST_S: Mapping["Task", float] = {"draw": 0.0, "verify": 1e-3}
REQUIRED_RATES = ("link_bytes_per_s", "flops_per_s", "device_memory_bytes_per_s")
RATES = (*REQUIRED_RATES, "pageable_link_bytes_per_s", "disk_bytes_per_s", "device_memory_bytes", "host_memory_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTimes:
    """Seconds of a forward pass by number of rows, with `context_rows` rows in the cache.

    layer_s: one decoder layer, of the kind that there are most of. rest_s: everything outside the layers; for a draft, drawing
    a level's children too, which those of a host draft are measured with. wake_s: what a layer takes longer when it had to
    wait for its weights, as the threads of a CPU go to sleep then.
    """

    context_rows: int
    rows: tuple[int, ...]
    layer_s: tuple[float, ...]
    rest_s: tuple[float, ...]
    wake_s: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.wake_s) and self.wake_s >= 0):
            raise ValueError(f"wake_s is {self.wake_s}, not a number from 0 on")
        _check_table(self.rows, self.layer_s, "layer_s")
        _check_table(self.rows, self.rest_s, "rest_s")

    def layer(self, rows: npt.ArrayLike) -> Floats:
        return interpolate(self.rows, self.layer_s, rows)

    def rest(self, rows: npt.ArrayLike) -> Floats:
        return interpolate(self.rows, self.rest_s, rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredModel:
    """The times of one decoder layer's shape in one role; `shape` as `shape_of` gives it."""

    role: Role
    shape: Mapping[str, int]
    times: tuple[ModelTimes, ...]

    def __post_init__(self) -> None:
        contexts = [table.context_rows for table in self.times]
        if not contexts or contexts != sorted(set(contexts)):
            raise ValueError("the tables of a model are not one for each context, in increasing order")
        if any(table.rows != self.times[0].rows for table in self.times):
            raise ValueError("the tables of a model differ in their rows")


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskTimes:
    """Seconds of a task on logits over a vocabulary, for one kind of sampling, by number of rows."""

    task: Task
    sampling: SamplingKind
    vocab_size: int
    rows: tuple[int, ...]
    task_s: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size is {self.vocab_size}")
        _check_table(self.rows, self.task_s, "task_s")

    def at(self, rows: npt.ArrayLike) -> Floats:
        return interpolate(self.rows, self.task_s, rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeTime:
    """Seconds of decoding a layer that is stored as `weights` says, into `computed_bytes` in a dtype of `dtype_bytes`."""

    weights: str
    dtype_bytes: int
    computed_bytes: int
    layer_s: float

    def __post_init__(self) -> None:
        if self.dtype_bytes < 1 or self.computed_bytes < 1:
            raise ValueError(f"a decoder makes {self.computed_bytes} bytes of numbers of {self.dtype_bytes}")
        if not (math.isfinite(self.layer_s) and self.layer_s > 0):
            raise ValueError(f"a decoder takes {self.layer_s} seconds, not a positive number")


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareProfile:
    """Rates in bytes or floating point operations per second; None where unknown. `facts` is what is kept for people:
    provenance, versions, the link by copy size; `doubts` is what plans made with it say about it. ValueError for a rate that is
    not finite and positive."""

    device_name: str
    device_type: str
    source: str
    published: bool = False
    device_memory_bytes: int | None = None
    host_memory_bytes: int | None = None
    link_bytes_per_s: float
    pageable_link_bytes_per_s: float | None = None
    disk_bytes_per_s: float | None = None
    flops_per_s: float
    device_memory_bytes_per_s: float
    layer_overhead_s: float = 0.0
    models: tuple[MeasuredModel, ...] = ()
    tasks: tuple[TaskTimes, ...] = ()
    decoders: tuple[DecodeTime, ...] = ()
    doubts: tuple[str, ...] = ()
    facts: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in RATES:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}, not a positive number")
        if not (math.isfinite(self.layer_overhead_s) and self.layer_overhead_s >= 0):
            raise ValueError(f"layer_overhead_s is {self.layer_overhead_s}, not a number from 0 on")

    def times(self, model: ModelCost, role: Role, context_rows: int, sampling: SamplingKind) -> ModelTimes:
        """Measured on the model's own layer shape, between the two nearest contexts; else estimated from the rates. A draft
        draws the children of a level by such sampling."""
        measured = [known for known in self.models if known.role == role and known.shape == shape_of(model)]
        times = _at_context(measured[0].times, context_rows) if measured else self._estimate(model, context_rows)
        if role != "draft":
            return times
        draw_s = self.task_times("draw", model.vocab_size, sampling).at(times.rows)
        return replace(times, rest_s=tuple(float(s) for s in np.asarray(times.rest_s) + draw_s))

    def knows(self, model: ModelCost, role: Role) -> bool:
        """Whether `times` are measured."""
        return any(known.role == role and known.shape == shape_of(model) for known in self.models)

    def task_times(self, task: Task, vocab_size: int, sampling: SamplingKind) -> TaskTimes:
        """Measured at the nearest vocabulary and scaled to this one; else estimated from the memory rate."""
        measured = [known for known in self.tasks if (known.task, known.sampling) == (task, sampling)]
        if measured:
            nearest = min(measured, key=lambda known: abs(math.log(known.vocab_size / vocab_size)))
            scale = vocab_size / nearest.vocab_size
            return replace(nearest, vocab_size=vocab_size, task_s=tuple(scale * s for s in nearest.task_s))
        row_s = 4 * vocab_size * SWEEPS[task][sampling] / self.device_memory_bytes_per_s
        task_s = tuple(LEAST_S[task] + row_s * rows for rows in ROWS)
        return TaskTimes(task=task, sampling=sampling, vocab_size=vocab_size, rows=ROWS, task_s=task_s)

    def decode_s(self, model: ModelCost) -> tuple[float, ...]:
        """Seconds of decoding each layer: measured, in proportion to what comes out, else estimated from the memory's rate.
        0 for a layer that is stored as it computes; nothing at all where all are."""
        if not model.is_decoded:
            return ()
        known = self._decoder(model)
        sweep_s = DECODE_SWEEPS.get(self.device_type, DECODE_SWEEPS["cuda"]) / self.device_memory_bytes_per_s

        def layer_s(layer: LayerCost) -> float:
            if known is not None:
                return layer.computed_bytes * known.layer_s / known.computed_bytes
            return (layer.stored_bytes + layer.base_bytes + layer.computed_bytes) * sweep_s

        return tuple(layer_s(layer) if layer.is_decoded else 0.0 for layer in model.layers)

    def knows_decoder(self, model: ModelCost) -> bool:
        """Whether `decode_s` is measured, as far as anything is decoded."""
        return not model.is_decoded or self._decoder(model) is not None

    def _decoder(self, model: ModelCost) -> DecodeTime | None:
        kind = model.weights, model.dtype_bytes
        return next((known for known in self.decoders if (known.weights, known.dtype_bytes) == kind), None)

    def _estimate(self, model: ModelCost, context_rows: int) -> ModelTimes:
        """The roofline: whichever takes longer, reading the weights once or multiplying."""
        memory, compute = self.device_memory_bytes_per_s, self.flops_per_s
        layer = model.common_layer
        layer_bytes = layer.computed_bytes + layer.kv_bytes_per_row * context_rows
        head_bytes = model.vocab_size * model.hidden_size * model.dtype_bytes
        logits_bytes = 4 * model.vocab_size
        layer_s, rest_s = [], []
        for rows in ROWS:
            flops = layer_flops(layer, rows) + attention_flops(model, rows, context_rows)
            layer_s.append(self.layer_overhead_s + max(layer_bytes / memory, flops / compute))
            head_flops = 2 * rows * model.vocab_size * model.hidden_size
            rest_s.append(self.layer_overhead_s + max(head_bytes / memory, head_flops / compute) + rows * logits_bytes / memory)
        return ModelTimes(context_rows=context_rows, rows=ROWS, layer_s=tuple(layer_s), rest_s=tuple(rest_s))


def shape_of(model: ModelCost) -> dict[str, int]:
    """What the time of a forward pass depends on: the sizes of one layer and of the head."""
    names = ("hidden_size", "intermediate_size", "num_heads", "head_dim", "vocab_size", "dtype_bytes")
    return {**{name: getattr(model, name) for name in names}, "layer_bytes": model.common_layer.computed_bytes}


def interpolate(points: Sequence[int], values: Sequence[float], at: npt.ArrayLike) -> Floats:
    """Piecewise linear; beyond the last point on the line through the last two, never falling."""
    x = np.asarray(at, dtype=np.float64)
    inside = np.interp(x, points, values)
    if len(points) < 2:
        return np.asarray(inside)
    slope = max((values[-1] - values[-2]) / (points[-1] - points[-2]), 0.0)
    return np.asarray(inside + slope * np.maximum(x - points[-1], 0.0))


def _at_context(tables: Sequence[ModelTimes], context_rows: int) -> ModelTimes:
    """Linear between the tables of the nearest contexts: attention reads the cache once."""
    contexts = [table.context_rows for table in tables]

    def between(name: Literal["layer_s", "rest_s"]) -> tuple[float, ...]:
        columns = zip(*(getattr(table, name) for table in tables), strict=True)
        return tuple(float(interpolate(contexts, column, context_rows)) for column in columns)

    wake_s = max(table.wake_s for table in tables)
    layer_s, rest_s = between("layer_s"), between("rest_s")
    return ModelTimes(context_rows=context_rows, rows=tables[0].rows, layer_s=layer_s, rest_s=rest_s, wake_s=wake_s)


def _check_table(points: Sequence[int], values: Sequence[float], name: str) -> None:
    if not points or len(points) != len(values):
        raise ValueError(f"{name} has {len(values)} values for {len(points)} points")
    if any(after <= before for before, after in itertools.pairwise(points)) or points[0] < 1:
        raise ValueError(f"the points of {name} do not increase from 1 on")
    if not all(math.isfinite(value) and value >= 0 for value in values):
        raise ValueError(f"{name} holds a time that is not a number from 0 on")
