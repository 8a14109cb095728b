"""16-bit weights survive their code: every bit pattern, of any size, by every decoder."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import load_file

import offload.demo
from allocations import working_bytes
from coding import NAME, CodedTensor, encode, normal, same_bits
from offload.coding.chunks import CPU_WORKSPACE_BYTES
from offload.coding.lossless import decode_anywhere, decode_on_cpu, pays
from offload.coding.lossless_encode import RUN, Encoder
from offload.coding.lossless_layout import BLOCK
from offload.coding.lossless_numpy import cast_halves
from offload.coding.lossless_packing import LosslessPacking, read_lossless
from offload.coding.tensor_codec import Part

# Infinities that other infinities are made of, in Triton's interpreter
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in cast:RuntimeWarning")
HALVES = (torch.bfloat16, torch.float16)
ALL_BITS = torch.arange(-(2**15), 2**15).to(torch.int16)
DEMO = Path(offload.demo.__file__).parent
RATIO = 0.715


def decoded(code: CodedTensor, decode: Callable[..., None], like: torch.Tensor) -> torch.Tensor:
    found = torch.full_like(like, 7.0)
    decode(code.coded, found)
    return found


def assert_survives(tensor: torch.Tensor) -> CodedTensor:
    code = encode(tensor)
    for decode in (decode_on_cpu, decode_anywhere):
        assert same_bits(decoded(code, decode, tensor), tensor)
    return code


def demo_tensors(model: str) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted((DEMO / model).glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("model", ["target", "draft"])
def test_every_tensor_of_the_bundled_models_survives(model: str, dtype: torch.dtype) -> None:
    for tensor in demo_tensors(model).values():
        assert_survives(tensor.bfloat16().to(dtype))


@pytest.mark.parametrize("dtype", HALVES)
def test_layers_of_the_bundled_target_take_seven_tenths_of_their_bytes(dtype: torch.dtype) -> None:
    layers = [tensor for name, tensor in demo_tensors("target").items() if ".layers." in name and tensor.dim() == 2]
    coded_bytes = sum(encode(tensor.bfloat16().to(dtype)).num_bytes for tensor in layers)
    assert layers and coded_bytes <= RATIO * sum(2 * tensor.numel() for tensor in layers)


@pytest.mark.parametrize("dtype", HALVES)
def test_normal_weights_take_seven_tenths_of_their_bytes(dtype: torch.dtype) -> None:
    assert encode(normal(10**6, dtype)).num_bytes <= RATIO * 2 * 10**6


def test_true_float16_is_not_worth_a_code() -> None:
    tensor = (torch.randn(10**5, generator=torch.Generator().manual_seed(0)) * 0.02).half()
    code = assert_survives(tensor)
    assert not pays(code.codec, tuple(tensor.shape))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("order", ["ascending", "shuffled"])
def test_all_bit_patterns_survive(dtype: torch.dtype, order: str) -> None:
    """Payloads of NaN, infinities, numbers below the normal ones, zeros of both signs."""
    generator = torch.Generator().manual_seed(0)
    bits = ALL_BITS if order == "ascending" else ALL_BITS[torch.randperm(2**16, generator=generator)]
    assert_survives(bits.view(dtype))
    assert_survives(torch.cat([bits.view(dtype), normal(10**5, dtype), bits.view(dtype)]))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, float("inf"), float("nan"), 1e-7, -3e4])
def test_constant_tensors_survive(value: float, dtype: torch.dtype) -> None:
    assert_survives(torch.full((3, BLOCK), value, dtype=dtype))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", [1, 7, 8, 9, 31, BLOCK - 1, BLOCK, BLOCK + 1, 32 * BLOCK + 5, RUN, RUN + 1])
def test_tensors_of_any_size_survive(size: int, dtype: torch.dtype) -> None:
    assert_survives(normal(size, dtype))


def test_rows_of_very_different_scale_survive() -> None:
    scales = torch.logspace(-30, 30, 64)[:, None]
    assert_survives((normal(64 * 1000).float().view(64, 1000) * scales).bfloat16())


def test_halves_are_cast_as_torch_casts_them() -> None:
    """All 65,536, by integers: those that are said to survive do so by torch's conversions, and no others do but NaN."""
    halves = ALL_BITS.view(torch.float16)
    cast = cast_halves(ALL_BITS.numpy().view(np.uint16))
    there = torch.from_numpy(cast.bits.view(np.int16)).view(torch.bfloat16)
    survives = there.half().view(torch.int16) == ALL_BITS
    assert torch.equal(torch.from_numpy(cast.differs), ~survives | halves.isnan())
    assert torch.equal(there[survives & ~halves.isnan()], halves[survives & ~halves.isnan()].bfloat16())
    assert survives.sum() > 2**12


@given(data=st.data(), dtype=st.sampled_from(HALVES))
def test_any_tensor_survives(data: st.DataObject, dtype: torch.dtype) -> None:
    few = data.draw(st.lists(st.integers(-(2**15), 2**15 - 1), min_size=1, max_size=9))
    elements = st.sampled_from(few) | st.integers(-(2**15), 2**15 - 1)
    bits = data.draw(hnp.arrays(np.int16, st.integers(1, 2 * BLOCK + 9), elements=elements, fill=st.sampled_from(few)))
    assert_survives(torch.from_numpy(bits.copy()).view(dtype))


@pytest.mark.parametrize("decode", [decode_on_cpu, decode_anywhere])
@pytest.mark.parametrize("stored", HALVES)
@pytest.mark.parametrize("computed", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_get_what_torch_converts(computed: torch.dtype, stored: torch.dtype, decode: Callable[..., None]) -> None:
    tensor = torch.cat([ALL_BITS.view(stored).nan_to_num(1.0), normal(BLOCK + 5, stored)])
    found = torch.empty(tensor.shape, dtype=computed)
    decode(encode(tensor).coded, found)
    assert torch.equal(found, tensor.to(computed)) and torch.equal(found.signbit(), tensor.signbit())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("stored", HALVES)
@pytest.mark.parametrize("size", [3, 3 * BLOCK, 2 * BLOCK + 77])
def test_the_kernel_makes_the_bits_of_its_twin(size: int, stored: torch.dtype, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    code = encode(torch.cat([ALL_BITS.view(stored).nan_to_num(1.0)[::9], normal(size, stored)]))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    expected, found = (torch.empty(code.codec.parts[0].shape, dtype=dtype) for _ in range(2))
    decode_anywhere(code.coded, expected)
    assert code.codec.kernel is not None
    found = found.to(device)
    code.codec.kernel({name: part.to(device) for name, part in code.parts.items()}, found)
    assert same_bits(found.cpu(), expected)


def test_the_kernel_keeps_every_bit_pattern() -> None:
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype in HALVES:
        for tensor in (ALL_BITS.view(dtype), normal(1, dtype)):
            code, found = encode(tensor), torch.zeros(tensor.shape, dtype=dtype, device=device)
            assert code.codec.kernel is not None
            code.codec.kernel({name: part.to(device) for name, part in code.parts.items()}, found)
            assert same_bits(found.cpu(), tensor)


@pytest.mark.parametrize("part", ["weight_offsets", "weight_escapes", "weight_positions", "weight_base", "weight_codes"])
def test_damage_changes_weights_and_nothing_else(part: str) -> None:
    """A file that lies makes no decoder read or write outside of what it is given."""
    generator = torch.Generator().manual_seed(0)
    tensor = ALL_BITS.view(torch.float16)
    code = encode(tensor)
    damaged = code.parts[part]
    low, high = (0, 256) if damaged.dtype == torch.uint8 else (-(2**31), 2**31)
    damaged.copy_(torch.randint(low, high, damaged.shape, generator=generator))
    assert code.codec.kernel is not None
    for decode in (code.codec.decode, code.codec.kernel, lambda _, found: decode_anywhere(code.coded, found)):
        guarded = torch.full((3, tensor.numel()), 7.0, dtype=torch.float16)
        decode(code.parts, guarded[1])
        assert guarded[0].eq(7).all() and guarded[2].eq(7).all()


def test_a_tensor_that_changes_under_the_encoder_is_refused() -> None:
    tensor = normal(10**5)
    with Encoder(1) as encoder:
        survey = encoder.survey(tensor)
        code = encode(tensor)
        assert survey is not None
        for changed in (tensor * 1e9, torch.zeros_like(tensor)):
            with pytest.raises(ValueError, match="changed"):
                encoder.encode(changed, survey, code.coded)


def test_tensors_without_weights_have_no_code() -> None:
    with Encoder(1) as encoder:
        assert encoder.survey(torch.empty(0, dtype=torch.bfloat16)) is None


def test_decoders_keep_within_their_workspace() -> None:
    code = encode(normal(300 * BLOCK))
    found = torch.empty(300 * BLOCK, dtype=torch.bfloat16)
    assert working_bytes(lambda: decode_anywhere(code.coded, found)) <= CPU_WORKSPACE_BYTES


def parts_beside(code: CodedTensor) -> dict[str, Part]:
    return {part.name: part for part in code.codec.parts}


def test_a_packing_finds_the_codec_from_the_parts_that_are_there() -> None:
    for dtype in HALVES:
        tensor = normal(5 * BLOCK, dtype)
        tensor[7] = float("nan")
        code = encode(tensor.view(5, BLOCK))
        beside = {**parts_beside(code), "bias": Part(name="bias", shape=(5,), dtype=dtype)}
        assert LosslessPacking().codec_of(NAME, (5, BLOCK), beside) == code.codec
        assert LosslessPacking().codec_of("layer.up_proj.bias", (5,), beside) is None


@pytest.mark.parametrize("name", [part.name for part in encode(normal(BLOCK)).codec.parts])
def test_parts_that_are_missing_or_misshapen_are_named(name: str) -> None:
    code = encode(normal(5 * BLOCK))
    beside = parts_beside(code)
    wrong = Part(name=name, shape=(*beside[name].shape, 3), dtype=beside[name].dtype)
    with pytest.raises(ValueError, match=name):
        LosslessPacking().codec_of(NAME, (5, BLOCK), {**beside, name: wrong})
    if name != "weight_codes":  # without which it is stored as it is
        del beside[name]
        with pytest.raises(ValueError, match=f"{name} is missing"):
            LosslessPacking().codec_of(NAME, (5, BLOCK), beside)


def test_a_later_version_of_the_code_is_refused() -> None:
    assert read_lossless({"quant_method": "treestream_lossless", "version": 1}).name
    with pytest.raises(ValueError, match="has version 2"):
        read_lossless({"quant_method": "treestream_lossless", "version": 2})
