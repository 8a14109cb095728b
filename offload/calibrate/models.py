"""Seconds of a model's forward passes, one layer at a time, so that it need not fit, nor be there: its weights are noise."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from ..planner.hardware import MeasuredModel, ModelTimes, Role, TaskTimes, shape_of
from ..typed_model import TypedModel
from .short_model import FEW_LAYERS, MORE_LAYERS, ShortModel, short_models
from .stopwatch import Stopwatch
from .tables import rising, table_of

WAKE_REPEATS = 8  # for one: a small difference of times that vary
LATE_S = 0.01  # how long a layer's weights are waited for, to see what waking up takes: threads that wait are asleep by then
WAKE_ROWS = 16
LEAST_SHARE = 0.05  # of a pass over MORE_LAYERS that one of them has, had it no rest: below, a difference was noise


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model to measure, and what it will do: a target takes whole trees, a draft a level at a time."""

    role: Role
    model: TypedModel


def measure_model(watch: Stopwatch, subject: Subject, drawing: TaskTimes) -> MeasuredModel:
    """Seconds of one layer and of the rest of a forward pass, by rows and context. A draft's levels are timed with the
    drawing of children between them, of which `drawing` is taken off again."""
    device, effort = watch.device, watch.effort
    if subject.role == "draft":  # whose root cannot have more children than there are tokens
        effort = replace(effort, rows=tuple(rows for rows in effort.rows if rows <= subject.model.cost.vocab_size))
    few, more = short_models(device, subject.model, subject.role, effort)
    beside = drawing if subject.role == "draft" else None
    with closing(few), closing(more):
        tables = [_times_at(watch, few, more, effort.rows, context_rows, beside) for context_rows in effort.contexts]
        if device.host_addressable:  # a GPU waits without going to sleep
            tables = [replace(table, wake_s=_wake_s(watch, few, table.context_rows)) for table in tables]
    return MeasuredModel(role=subject.role, shape=shape_of(subject.model.cost), times=_same_rows(tables))


def _times_at(
    watch: Stopwatch,
    few: ShortModel,
    more: ShortModel,
    rows: Sequence[int],
    context_rows: int,
    drawing: TaskTimes | None,
) -> ModelTimes:
    def seconds_at(num_rows: int) -> list[float]:
        with watch.device.translated():
            works = [model.work(num_rows, context_rows, watch.effort.sampling_kinds[0]) for model in (few, more)]
            return watch.seconds(works, _has_layers)

    measured, (few_s, more_s) = table_of(rows, seconds_at, watch.effort)
    layer_s = layer_times(few_s, more_s)
    drawn_s = drawing.at(measured).tolist() if drawing is not None else [0.0] * len(measured)
    # Not made to rise: a remainder of noise among many rows would pull down those of few.
    rest_s = [max(f - FEW_LAYERS * layer - drawn, 0.0) for f, layer, drawn in zip(rising(few_s), layer_s, drawn_s, strict=True)]
    return ModelTimes(context_rows=context_rows, rows=measured, layer_s=layer_s, rest_s=tuple(rest_s))


def layer_times(few_s: Sequence[float], more_s: Sequence[float]) -> tuple[float, ...]:
    """Seconds of a layer from those of passes over FEW_LAYERS and over MORE_LAYERS, by rows. A difference that is no more than
    noise, or less than nothing, is made up for by those of fewer and of more rows; where they are of no help either, it is
    LEAST_SHARE of the pass: no layer is free."""
    differences = [(more - few) / (MORE_LAYERS - FEW_LAYERS) for few, more in zip(few_s, more_s, strict=True)]
    least_s = [LEAST_SHARE * seconds / MORE_LAYERS for seconds in rising(more_s)]
    return tuple(map(max, rising(differences), least_s))


def _has_layers(seconds: Sequence[float]) -> bool:
    """Whether more layers took longer than few, by more than noise."""
    return (seconds[1] - seconds[0]) / (MORE_LAYERS - FEW_LAYERS) > LEAST_SHARE * seconds[1] / MORE_LAYERS


def _wake_s(watch: Stopwatch, model: ShortModel, context_rows: int) -> float:
    """What a layer takes longer when its weights come late."""
    rows, effort = min(WAKE_ROWS, max(watch.effort.rows)), watch.effort
    works = [model.waiting(rows, context_rows, late_s) for late_s in (0.0, LATE_S)]
    patient = Stopwatch(watch.device, replace(effort, point_s=0.0, repeats=WAKE_REPEATS * effort.repeats))
    at_once_s, late_s = patient.seconds(works)
    return max(late_s - at_once_s, 0.0)


def _same_rows(tables: Sequence[ModelTimes]) -> tuple[ModelTimes, ...]:
    """A longer context takes longer, so its table may have ended earlier: cut the others to it."""
    shared = min(len(table.rows) for table in tables)
    return tuple(
        replace(table, rows=table.rows[:shared], layer_s=table.layer_s[:shared], rest_s=table.rest_s[:shared])
        for table in tables
    )
