"""The draft that a base is, by its sizes and by the time that it takes."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bases import with_bases
from offload.calibrate import QUICK
from offload.calibrate.models import Subject, measure_model
from offload.calibrate.short_model import short_models, shorter
from offload.calibrate.stopwatch import Stopwatch
from offload.coding.base_kinds import BASE_KINDS
from offload.device.cpu import CpuDevice
from offload.model.base_model import base_architecture
from offload.planner.hardware import TaskTimes, shape_of
from offload.source import check_source
from offload.typed_model import TypedModel, base_draft
from small_models import text_part

Models = Callable[..., Path]
NOTHING_DRAWN = TaskTimes(task="draw", sampling="greedy", vocab_size=97, rows=(1, 2), task_s=(0.0, 0.0))
INT4, INT8 = BASE_KINDS["int4"], BASE_KINDS["int8"]


@pytest.fixture
def target(models: Models) -> TypedModel:
    return with_bases(check_source(str(models("qwen2")), "--model", "float32", "cpu").model, INT4)


def test_what_lies_outside_the_base_is_counted_with_the_target(target: TypedModel) -> None:
    draft = base_draft(target)
    cost, whole = draft.cost, target.cost
    assert cost.is_base and not whole.is_base
    assert cost.outside_bytes == 0 < whole.outside_bytes
    for of_draft, of_target in zip(cost.layers, whole.layers, strict=True):
        assert of_draft.computed_bytes == of_target.base_bytes > 0
        assert of_draft.num_parameters == of_target.num_parameters
        assert of_draft.kv_bytes_per_row == of_target.kv_bytes_per_row
        assert not of_draft.is_decoded and of_draft.base_bytes == 0
    shapes = target.architecture.layer_shapes[0].values()
    assert whole.layers[0].num_parameters == sum(map(math.prod, shapes))


def test_a_base_layer_has_the_tensors_that_the_draft_binds(target: TypedModel) -> None:
    """Codes, scales and zero points of matrices, and all else as it is."""
    draft = base_draft(target)
    architecture = base_architecture(target.architecture, INT4, target.bases, kernels=False)
    for number, layer in enumerate(architecture.model.model.layers):
        codec = draft.codecs[number]
        assert codec.decode is None and codec.stored == target.codecs[number].base
        stored = {field.name: field.shape for field in codec.stored.fields}
        wanted = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
        assert stored == {name: shape for name, shape in wanted.items() if math.prod(shape)}
        assert any(name.endswith("bias") for name in stored)


def test_one_that_is_shorter_is_drafted_alike(target: TypedModel) -> None:
    for num_layers in (1, 5):
        short = shorter(base_draft(target), num_layers)
        assert short.architecture.num_layers == num_layers and short.drafts_from_base
        assert short.cost.layers == base_draft(target).cost.layers[:1] * num_layers
        assert len(short.bases) == 7 * num_layers
        assert not shorter(target, num_layers).drafts_from_base


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_its_levels_are_measured(models: Models, dtype: str) -> None:
    target = with_bases(check_source(str(models()), "--model", dtype, "cpu").model, INT8)
    draft = base_draft(target)
    effort = replace(QUICK, rows=(1, 8, 64), contexts=(64,), repeats=1, point_s=0.0, longest_s=10.0)
    measured = measure_model(Stopwatch(CpuDevice(), effort), Subject(role="draft", model=draft), NOTHING_DRAWN)
    assert measured.shape == shape_of(draft.cost) != shape_of(target.cost)
    (times,) = measured.times
    assert times.rows == (1, 8, 64) and all(seconds > 0 for seconds in times.layer_s)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_noise_in_the_place_of_a_base_computes_numbers(models: Models, dtype: str) -> None:
    """Scales of arbitrary bits would make infinities of it, which take a processor another time than numbers do."""
    draft = base_draft(with_bases(check_source(str(models()), "--model", dtype, "cpu").model, INT8))
    for model in short_models(CpuDevice(), draft, "draft", replace(QUICK, rows=(4,), contexts=(16,))):
        causal_lm = model._model
        (output,) = causal_lm.forward((text_part(causal_lm.cache.segments[0], [1, 2, 3], num_logits=3),))
        assert torch.isfinite(output.logits).all()
        model.close()
