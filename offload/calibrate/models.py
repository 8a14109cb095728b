"""Seconds of a model's forward passes, one layer at a time, so that it need not fit, nor be there: its weights are noise."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from ..device import Device
from ..planner.hardware import LawTimes, MeasuredModel, ModelTimes, Role, shape_of
from ..source import TypedModel
from .effort import Effort, rising, table_of, typical_s
from .short_model import FEW_LAYERS, MORE_LAYERS, ShortModel, short_models

WAKE_REPEATS = 8  # for one: a small difference of times that vary
LATE_S = 0.01  # how long a layer's weights are waited for, to see what waking up takes: threads that wait are asleep by then
WAKE_ROWS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model to measure, and what it will do: a target takes whole trees, a draft a level at a time."""

    role: Role
    model: TypedModel


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
        with device.translated():
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
