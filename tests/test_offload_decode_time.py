"""What decoding takes is measured with the codec that runs, and only of what passes decode."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from offload.calibrate import QUICK, Subject, measure_hardware
from offload.calibrate.decoding import TIMES, measure_decoding
from offload.calibrate.stopwatch import Stopwatch
from offload.coding.tensor_codec import Part, TensorCodec
from offload.device.cpu import CpuDevice
from offload.doctor.decoding import time_decoding
from offload.doctor.facts import Check, DecodeFacts
from offload.source import check_source
from offload.typed_model import TypedModel

Models = Callable[..., Path]
BRIEF = replace(QUICK, repeats=1, point_s=0.0, rows=(1, 2), contexts=(8,))
SEEN: list[tuple[int, int]] = []  # addresses of what was decoded, and where to


@dataclass(frozen=True, slots=True)
class Halves:
    """Looks values up by indexes, of which there are two: others would be out of its table."""

    def __call__(self, parts: Mapping[str, torch.Tensor], parameter: torch.Tensor) -> None:
        SEEN.append((parts["index"].data_ptr(), parameter.data_ptr()))
        parameter.copy_(torch.tensor([0.5, 1.0])[parts["index"].long()])


@pytest.fixture
def coded_model(models: Models) -> TypedModel:
    """Whose query projections are indexes, in bytes, in the last three of its four layers."""
    model = check_source(str(models(num_layers=4)), "--model", "float32", "cpu").model
    name, shape = "self_attn.q_proj.weight", model.architecture.layer_shapes[0]["self_attn.q_proj.weight"]
    codec = TensorCodec(format="halves", parts=(Part(name="index", shape=shape, dtype=torch.uint8),), decode=Halves())
    packed = {f"{model.architecture.prefix}.{layer}.{name}": codec for layer in (1, 2, 3)}
    return replace(model, weights="halves", packed=packed)


def test_a_layer_that_is_decoded_is_timed_with_its_own_codec_on_contents_that_it_may_have(coded_model: TypedModel) -> None:
    SEEN.clear()
    device = CpuDevice()
    found = measure_decoding(Stopwatch(device, BRIEF), coded_model)
    device.close()
    assert found is not None and found.layer_s > 0
    assert (found.weights, found.dtype_bytes) == ("halves", 4)
    assert found.computed_bytes == coded_model.codecs[3].computed.num_bytes
    stored, computed = zip(*SEEN, strict=True)
    assert len(SEEN) % TIMES == 0
    assert len(set(stored)) == 3, "out of as many buffers as there are layers, so that no cache holds them"
    assert len(set(computed)) == 1, "into one, as in a pass"


def test_a_look_at_the_machine_times_the_targets_decoder_and_the_plan_takes_that(coded_model: TypedModel) -> None:
    device = CpuDevice()
    subjects = [Subject(role="target", model=coded_model), Subject(role="draft", model=coded_model)]
    hardware = measure_hardware(device, subjects, BRIEF)
    device.close()
    (decoder,) = hardware.decoders  # a draft is decoded once, while it is loaded
    assert hardware.knows_decoder(coded_model.cost)
    assert hardware.decode_s(coded_model.cost) == pytest.approx((0.0, *[decoder.layer_s] * 3))


def test_a_model_that_is_stored_as_it_computes_has_no_decoder_to_time(models: Models) -> None:
    model, device = check_source(str(models()), "--model", "float32", "cpu").model, CpuDevice()
    assert measure_decoding(Stopwatch(device, BRIEF), model) is None
    device.close()


def test_a_doctor_times_the_decoder_of_a_model_and_tells_of_one_that_fails(coded_model: TypedModel, models: Models) -> None:
    device = CpuDevice()
    timed = time_decoding(device, coded_model)
    assert isinstance(timed, DecodeFacts) and timed.layer_s > 0
    assert (timed.weights, timed.stored_bytes) == ("halves", coded_model.codecs[3].stored.num_bytes)

    def fail(parts: Mapping[str, torch.Tensor], parameter: torch.Tensor) -> None:
        raise RuntimeError("no compiler\nwas found")

    packed = {name: replace(codec, decode=fail) for name, codec in coded_model.packed.items()}
    failed = time_decoding(device, replace(coded_model, packed=packed))
    assert isinstance(failed, Check) and failed.value == "halves: no compiler"
    assert "--decode-kernels none" in str(failed.cure) and failed.exit_code == 0
    assert time_decoding(device, replace(coded_model, packed={})) is None
    device.close()
