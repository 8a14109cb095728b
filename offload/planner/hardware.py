"""What a machine can do: its rates, and seconds of real work measured on it.

Measures nothing (offload/calibrate.py does) and needs no torch. A model that was not measured is estimated from the rates.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from .cost import ModelCost, attention_flops, layer_flops

Floats = npt.NDArray[np.float64]
Role = Literal["target", "draft"]

ROWS = (1, 4, 16, 64, 128, 256, 512, 768, 1024, 2048, 4096)
# How often verification reads or writes float32 [nodes, vocabulary] on its way from logits to residual laws, and drawing
# children its law; counted in the code, used only where nothing was measured.
VERIFY_SWEEPS, DRAW_SWEEPS = 16, 8
REQUIRED_RATES = ("link_bytes_per_s", "flops_per_s", "device_memory_bytes_per_s")
RATES = (*REQUIRED_RATES, "pageable_link_bytes_per_s", "disk_bytes_per_s", "device_memory_bytes", "host_memory_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTimes:
    """Seconds of a forward pass by number of rows, with `context_rows` rows in the cache.

    layer_s: one decoder layer. rest_s: everything outside the layers; for a draft, drawing a level's children too.
    """

    context_rows: int
    rows: tuple[int, ...]
    layer_s: tuple[float, ...]
    rest_s: tuple[float, ...]

    def __post_init__(self) -> None:
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
class VerifyTimes:
    """Seconds from a tree's logits to accepted tokens on the host, by number of nodes."""

    vocab_size: int
    nodes: tuple[int, ...]
    verify_s: tuple[float, ...]

    def __post_init__(self) -> None:
        _check_table(self.nodes, self.verify_s, "verify_s")

    def at(self, nodes: npt.ArrayLike) -> Floats:
        return interpolate(self.nodes, self.verify_s, nodes)


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareProfile:
    """Rates in bytes or floating point operations per second; None where unknown. `facts` is what is kept for people:
    provenance, versions, the link by copy size. ValueError for a rate that is not finite and positive."""

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
    verify: tuple[VerifyTimes, ...] = ()
    facts: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in RATES:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}, not a positive number")
        if not (math.isfinite(self.layer_overhead_s) and self.layer_overhead_s >= 0):
            raise ValueError(f"layer_overhead_s is {self.layer_overhead_s}, not a number from 0 on")

    def times(self, model: ModelCost, role: Role, context_rows: int) -> ModelTimes:
        """Measured on the model's own layer shape, between the two nearest contexts; else estimated from the rates."""
        for measured in self.models:
            if measured.role == role and measured.shape == shape_of(model):
                return _at_context(measured.times, context_rows)
        return self._estimate(model, role, context_rows)

    def verify_times(self, vocab_size: int) -> VerifyTimes:
        """Measured at the nearest vocabulary and scaled to this one; else estimated from the memory rate."""
        if self.verify:
            nearest = min(self.verify, key=lambda times: abs(math.log(times.vocab_size / vocab_size)))
            scale = vocab_size / nearest.vocab_size
            return VerifyTimes(vocab_size=vocab_size, nodes=nearest.nodes, verify_s=tuple(scale * s for s in nearest.verify_s))
        sweep_s = 4 * vocab_size * VERIFY_SWEEPS / self.device_memory_bytes_per_s
        return VerifyTimes(vocab_size=vocab_size, nodes=ROWS, verify_s=tuple(1e-3 + sweep_s * nodes for nodes in ROWS))

    def _estimate(self, model: ModelCost, role: Role, context_rows: int) -> ModelTimes:
        """The roofline: whichever takes longer, reading the weights once or multiplying."""
        memory, compute = self.device_memory_bytes_per_s, self.flops_per_s
        kv_bytes = model.kv_bytes_per_row / model.num_layers * context_rows
        head_bytes = model.vocab_size * model.hidden_size * model.dtype_bytes
        draw_bytes = 4 * model.vocab_size * (DRAW_SWEEPS if role == "draft" else 1)
        layer_s, rest_s = [], []
        for rows in ROWS:
            flops = layer_flops(model, rows) + attention_flops(model, rows, context_rows)
            layer_s.append(self.layer_overhead_s + max((model.layer_bytes + kv_bytes) / memory, flops / compute))
            head_flops = 2 * rows * model.vocab_size * model.hidden_size
            rest_s.append(self.layer_overhead_s + max(head_bytes / memory, head_flops / compute) + rows * draw_bytes / memory)
        return ModelTimes(context_rows=context_rows, rows=ROWS, layer_s=tuple(layer_s), rest_s=tuple(rest_s))


def shape_of(model: ModelCost) -> dict[str, int]:
    """What the time of a forward pass depends on: the sizes of one layer and of the head."""
    names = ("hidden_size", "intermediate_size", "num_heads", "head_dim", "vocab_size", "dtype_bytes", "layer_bytes")
    return {name: getattr(model, name) for name in names}


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

    return ModelTimes(context_rows=context_rows, rows=tables[0].rows, layer_s=between("layer_s"), rest_s=between("rest_s"))


def _check_table(points: Sequence[int], values: Sequence[float], name: str) -> None:
    if not points or len(points) != len(values):
        raise ValueError(f"{name} has {len(values)} values for {len(points)} points")
    if any(after <= before for before, after in itertools.pairwise(points)) or points[0] < 1:
        raise ValueError(f"the points of {name} do not increase from 1 on")
    if not all(math.isfinite(value) and value >= 0 for value in values):
        raise ValueError(f"{name} holds a time that is not a number from 0 on")
