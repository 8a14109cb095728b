"""The packing of a residual folder finds the codec that was written, and says what is wrong where it cannot."""

import pytest
import torch

from coding import NAME
from offload.coding.base_kinds import BASE_KINDS, BaseKind
from offload.coding.residual_packing import ResidualPacking, read_residual
from offload.coding.tensor_codec import Part
from residual_coding import ResidualTensor, normal_matrix, take_apart

INT4 = BASE_KINDS["int4"]
SAID = {"quant_method": "treestream_residual", "version": 1, "bits": 4, "group_size": 64}


def parts_beside(code: ResidualTensor) -> dict[str, Part]:
    return {part.name: part for part in (*code.codec.parts, *code.codec.kept)}


@pytest.mark.parametrize("kind", BASE_KINDS.values(), ids=lambda kind: kind.name)
def test_a_packing_finds_the_codec_from_the_parts_that_are_there(kind: BaseKind) -> None:
    packing = read_residual({**SAID, "bits": kind.bits, "group_size": kind.group})
    assert packing == ResidualPacking(kind) and packing.name == f"16 bit, coded beside a base of {kind.name}"
    true_halves = (torch.randn(5, 1000) * 0.02).half()
    for tensor in (normal_matrix(5, 1000), normal_matrix(5, 1000, torch.float16), true_halves):
        tensor[0, 7] = float("nan")
        code = take_apart(tensor, kind)
        beside = {**parts_beside(code), "bias": Part(name="bias", shape=(5,), dtype=tensor.dtype)}
        assert packing.codec_of(NAME, (5, 1000), beside) == code.codec
        assert packing.codec_of("layer.up_proj.bias", (5,), beside) is None


@pytest.mark.parametrize("name", [*parts_beside(take_apart(normal_matrix(1, 9), INT4))])
def test_parts_that_are_missing_or_misshapen_are_named(name: str) -> None:
    beside = parts_beside(take_apart(normal_matrix(5, 1000), INT4))
    wrong = Part(name=name, shape=(*beside[name].shape, 3), dtype=beside[name].dtype)
    with pytest.raises(ValueError, match=name):
        ResidualPacking(INT4).codec_of(NAME, (5, 1000), {**beside, name: wrong})
    if name != "weight_remainder":  # without which it is stored as it is
        del beside[name]
        with pytest.raises(ValueError, match=f"{name} is missing"):
            ResidualPacking(INT4).codec_of(NAME, (5, 1000), beside)


def test_what_no_encoder_of_ours_wrote_is_refused() -> None:
    beside = parts_beside(take_apart(normal_matrix(5, 1000), INT4))
    half = Part(name="weight_remainder_half", shape=(1,), dtype=torch.int32)
    exceptions = Part(name="weight_exceptions", shape=(0,), dtype=torch.float32)
    packing = ResidualPacking(INT4)
    with pytest.raises(ValueError, match="both a weight_remainder and a weight_remainder_half"):
        packing.codec_of(NAME, (5, 1000), {**beside, half.name: half})
    with pytest.raises(ValueError, match=r"coded as torch\.float32"):
        packing.codec_of(NAME, (5, 1000), {**beside, exceptions.name: exceptions})
    with pytest.raises(ValueError, match=r"coded as torch\.bfloat16"):
        del beside["weight_remainder"]
        packing.codec_of(NAME, (5, 1000), {**beside, half.name: half})
    for shape in ((5000,), (5, 10, 100), (5, 0)):
        with pytest.raises(ValueError, match="is of shape"):
            packing.codec_of(NAME, shape, {half.name: half})


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("version", 2, "has version 2"),
        ("version", None, "has version None"),
        ("bits", 5, "has bits 5, not 8 or 4 or 3"),
        ("bits", "4", "has bits"),
        ("group_size", 32, "has a group_size of 32, and those of 4 bits are of 64"),
        ("group_size", -1, "group_size -1"),
    ],
)
def test_a_config_that_says_something_else_is_refused(field: str, value: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read_residual({**SAID, field: value})
