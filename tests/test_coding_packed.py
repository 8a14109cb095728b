"""Packed weights are unpacked to what they were packed from, by plain torch and by kernels, in every dtype, bit for bit."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import packed_models
from allocations import working_bytes
from offload.coding import chunks
from offload.coding.packings import read_packing
from offload.coding.tensor_codec import Part, TensorCodec
from packed_models import EVERY_FORM, FORMS, QUICK_FORMS, in_bytes, powers, random_codes

SHAPES = [(64, 128), (336, 192), (16, 320)]  # blocks of 128 that are whole and cut short, groups of 64
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KERNEL_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Tensors = Mapping[str, torch.Tensor]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def beside(parts: Tensors) -> dict[str, Part]:
    return {name: Part(name=name, shape=tuple(part.shape), dtype=part.dtype) for name, part in parts.items()}


def codec_of(
    quantization: Mapping[str, Any], shape: tuple[int, ...], parts: Tensors, name: str = "layer.weight"
) -> TensorCodec:
    codec = read_packing(quantization, "config.json").codec_of(name, shape, beside(parts))
    assert codec is not None
    return codec


def decoded(codec: TensorCodec, parts: Tensors, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    parameter = torch.full(shape, torch.nan, dtype=dtype)
    codec.decode({part.name: parts[part.name] for part in (*codec.parts, *codec.kept)}, parameter)
    return parameter


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Signs of zeros included."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    size = {2: torch.int16, 4: torch.int32}[found.itemsize]
    assert torch.equal(found.contiguous().view(size), expected.contiguous().view(size))


# Infinities and NaN, in Triton's interpreter
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


# -- what packers know -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", EVERY_FORM)
def test_weights_are_unpacked_exactly_and_rounded_once(form: str) -> None:
    for shape in SHAPES:
        parts, weight = EVERY_FORM[form].pack(*shape, generator())
        codec = codec_of(EVERY_FORM[form].quantization, shape, parts)
        for dtype in DTYPES:
            assert_same_bits(decoded(codec, parts, shape, dtype), weight.to(dtype))


@pytest.mark.parametrize("form", EVERY_FORM)
def test_pieces_of_any_size_make_the_same_weights(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, weight = EVERY_FORM[form].pack(336, 192, generator())
    codec = codec_of(EVERY_FORM[form].quantization, (336, 192), parts)
    monkeypatch.setattr(chunks, "CPU_WORKSPACE_BYTES", 9 * 192 * 24)
    assert_same_bits(decoded(codec, parts, (336, 192), torch.float32), weight)


@pytest.mark.matrix
@pytest.mark.parametrize(
    "form",
    [
        form if form in QUICK_FORMS else pytest.param(form, marks=pytest.mark.slow)
        for form in EVERY_FORM
        if form not in ("nf4", "fp4")
    ],
)
def test_kernels_make_the_bits_of_their_twins(form: str) -> None:
    """The interpreter takes its time: fewer shapes, each in another dtype, and one of rows that are cut short in blocks."""
    pytest.importorskip("triton")
    shapes = [(16, 320), (48, 64), (32, 128), (144, 64)] if "block" in form else [(16, 320), (48, 64), (32, 128)]
    for shape, dtype in zip(shapes, [*DTYPES, torch.bfloat16], strict=False):
        parts, _ = EVERY_FORM[form].pack(*shape, generator(1))
        codec = codec_of(EVERY_FORM[form].quantization, shape, parts)
        assert codec.kernel is not None
        found = torch.full(shape, torch.nan, dtype=dtype, device=KERNEL_DEVICE)
        codec.kernel({part.name: parts[part.name].to(KERNEL_DEVICE) for part in (*codec.parts, *codec.kept)}, found)
        assert_same_bits(found.cpu(), decoded(codec, parts, shape, dtype))


def by_both(codec: TensorCodec, parts: Tensors, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
    """In float32, by plain torch and by the kernel."""
    yield decoded(codec, parts, shape, torch.float32)
    assert codec.kernel is not None
    found = torch.full(shape, torch.nan, device=KERNEL_DEVICE)
    codec.kernel({part.name: parts[part.name].to(KERNEL_DEVICE) for part in (*codec.parts, *codec.kept)}, found)
    yield found.cpu()


@given(st.sampled_from([2, 4, 8]), st.booleans(), st.integers(1, 20), st.integers(1, 70), st.integers(0, 9))
@settings(max_examples=25)
def test_rows_and_columns_need_not_fill_their_words(bits: int, symmetric: bool, rows: int, columns: int, seed: int) -> None:
    pytest.importorskip("triton")
    channel = {"type": "int", "num_bits": bits, "strategy": "channel", "symmetric": symmetric}
    quantization = packed_models.compressed_tensors("pack-quantized", **channel)
    parts, weight = packed_models.rows_of_words(bits, None, symmetric=symmetric)(rows, columns, generator(seed))
    for found in by_both(codec_of(quantization, (rows, columns), parts), parts, (rows, columns)):
        assert_same_bits(found, weight)


@given(st.tuples(st.integers(1, 9), st.integers(1, 9)), st.integers(1, 20), st.integers(1, 20), st.integers(0, 9))
@settings(max_examples=25)
def test_blocks_may_be_of_any_size_and_cut_short(block: tuple[int, int], rows: int, columns: int, seed: int) -> None:
    pytest.importorskip("triton")
    quantization = {"quant_method": "fp8", "weight_block_size": list(block)}
    parts, weight = packed_models.fp8(block, "blocks")(rows, columns, generator(seed))
    for found in by_both(codec_of(quantization, (rows, columns), parts), parts, (rows, columns)):
        assert_same_bits(found, weight)


@pytest.mark.matrix
@pytest.mark.parametrize("form", EVERY_FORM)
def test_decoders_keep_within_their_workspace(form: str) -> None:
    """Which the values of the whole matrix, in float32, would fill three times."""
    shape = (384, 4096)
    parts, _ = EVERY_FORM[form].pack(*shape, generator())
    codec, parameter = codec_of(EVERY_FORM[form].quantization, shape, parts), torch.empty(shape, dtype=torch.bfloat16)
    taken = {part.name: parts[part.name] for part in (*codec.parts, *codec.kept)}
    assert 0 < working_bytes(lambda: codec.decode(taken, parameter)) <= chunks.CPU_WORKSPACE_BYTES


@pytest.mark.parametrize("form", EVERY_FORM)
def test_scales_are_marked_and_codecs_of_equal_parameters_are_equal(form: str) -> None:
    parts, _ = EVERY_FORM[form].pack(64, 128, generator())
    first, second = (codec_of(EVERY_FORM[form].quantization, (64, 128), parts, name) for name in ("a.weight", "b.weight"))
    assert first == second and hash(first) == hash(second)
    marked = {part.name for part in (*first.parts, *first.kept) if part.is_scale}
    assert marked and all("scale" in name or name in ("weight.absmax", "weight.quant_map") for name in marked)


# -- the formats' own libraries --------------------------------------------------------------------------------------


def library_scheme(quantization: Mapping[str, Any]) -> QuantizationScheme:
    weights = quantization["config_groups"]["group_0"]["weights"]
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))


@pytest.mark.parametrize("form", [form for form in FORMS if form.startswith("compressed-tensors") and "ordered" not in form])
def test_compressed_tensors_own_library_unpacks_the_same(form: str) -> None:
    """It computes in the scale's dtype, bfloat16."""
    quantization = EVERY_FORM[form].quantization
    for shape in SHAPES:
        parts, _ = EVERY_FORM[form].pack(*shape, generator(2))
        compressor = BaseCompressor.get_value_from_registry(quantization["format"])
        expected = compressor.decompress(dict(parts), library_scheme(quantization))["weight"]
        assert expected.dtype == torch.bfloat16
        codec = codec_of(quantization, shape, parts)
        assert_same_bits(decoded(codec, parts, shape, torch.bfloat16), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_transformers_unpacks_fp8_blocks_the_same(dtype: torch.dtype) -> None:
    parts, _ = FORMS["fp8-blocks"].pack(256, 384, generator(3))
    expected = Fp8Dequantize(None)._dequantize_one(parts["weight"], parts["weight_scale_inv"], dtype)
    codec = codec_of(FORMS["fp8-blocks"].quantization, (256, 384), parts)
    assert_same_bits(decoded(codec, parts, (256, 384), dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["experts.gate_up_proj", "experts.down_proj"])
def test_transformers_unpacks_the_experts_of_gpt_oss_the_same(name: str, dtype: torch.dtype) -> None:
    packed = in_bytes(random_codes((3, 40, 2, 32), 16, generator(4)))  # [experts, rows, groups, 16]
    stem = name.rpartition(".")[2]
    parts = {f"{stem}_blocks": packed, f"{stem}_scales": powers((3, 40, 2), generator(5))}
    expected = convert_moe_packed_tensors(*parts.values(), dtype=dtype)
    codec = codec_of({"quant_method": "mxfp4"}, tuple(expected.shape), parts, name)
    found = decoded(codec, parts, (3, 64, 40), dtype)
    assert_same_bits(found, expected)
    pytest.importorskip("triton")
    assert codec.kernel is not None
    by_kernel = torch.empty_like(found, device=KERNEL_DEVICE)
    codec.kernel({part: tensor.to(KERNEL_DEVICE) for part, tensor in parts.items()}, by_kernel)
    assert_same_bits(by_kernel.cpu(), found)


# -- readings of specifications, weight by weight --------------------------------------------------------------------


def field(words: torch.Tensor, place: tuple[int, int], shift: int, bits: int) -> int:
    return (int(words[place]) & 0xFFFFFFFF) >> shift & (1 << bits) - 1


@pytest.mark.parametrize("form", [form for form in FORMS if form.startswith("gptq")])
def test_gptq_read_weight_by_weight_is_the_same(form: str) -> None:
    quantization, rows, columns = EVERY_FORM[form].quantization, 32, 128
    parts, _ = EVERY_FORM[form].pack(rows, columns, generator(6))
    found = decoded(codec_of(quantization, (rows, columns), parts), parts, (rows, columns), torch.float32)
    bits = quantization["bits"]
    added = quantization["checkpoint_format"] == "gptq"
    for row in range(rows):
        for column in range(columns):
            first = column * bits
            code = field(parts["qweight"], (first // 32, row), first % 32, bits)
            group = int(parts["g_idx"][column])
            # The zero points of a group as one number of words: a borrow stops at the end of a word.
            word = int(parts["qzeros"][group, row * bits // 32])
            if added:
                word += int("1".zfill(bits) * (32 // bits), 2)
            zero_point = word >> row * bits % 32 & (1 << bits) - 1
            assert found[row, column] == (code - zero_point) * float(parts["scales"][group, row])


@pytest.mark.parametrize("form", ["compressed-tensors-int4-ordered", "compressed-tensors-int4-asymmetric"])
def test_compressed_tensors_read_weight_by_weight_is_the_same(form: str) -> None:
    """Columns in an order of their own, which the library's newest release does not unpack."""
    rows, columns = 16, 128
    parts, _ = EVERY_FORM[form].pack(rows, columns, generator(10))
    found = decoded(codec_of(EVERY_FORM[form].quantization, (rows, columns), parts), parts, (rows, columns), torch.float32)
    for row in range(rows):
        for column in range(columns):
            group = int(parts["weight_g_idx"][column]) if "weight_g_idx" in parts else column // 32
            code = field(parts["weight_packed"], (row, column // 8), column % 8 * 4, 4)
            zero_point = 8
            if "weight_zero_point" in parts:
                zero_point = field(parts["weight_zero_point"], (row // 8, group), row % 8 * 4, 4)
            assert found[row, column] == (code - zero_point) * float(parts["weight_scale"][row, group])


def test_awq_read_weight_by_weight_is_the_same() -> None:
    """In its kernels, eight outputs of a word come out in the order 0 4 1 5 2 6 3 7 of its fields."""
    rows, columns = 32, 128
    parts, _ = FORMS["awq"].pack(rows, columns, generator(7))
    found = decoded(codec_of(FORMS["awq"].quantization, (rows, columns), parts), parts, (rows, columns), torch.float32)
    for row in range(rows):
        shift = 4 * (0, 4, 1, 5, 2, 6, 3, 7)[row % 8]
        for column in range(columns):
            code = field(parts["qweight"], (column, row // 8), shift, 4)
            zero_point = field(parts["qzeros"], (column // 64, row // 8), shift, 4)
            assert found[row, column] == (code - zero_point) * float(parts["scales"][column // 64, row])


@pytest.mark.parametrize("form", ["nf4", "fp4"])
def test_bitsandbytes_read_weight_by_weight_is_the_same(form: str) -> None:
    parts, _ = EVERY_FORM[form].pack(8, 64, generator(8))
    found = decoded(codec_of(EVERY_FORM[form].quantization, (8, 64), parts), parts, (8, 64), torch.float32).flatten()
    numbers = packed_models.NF4 if form == "nf4" else packed_models.E2M1
    for number, weight in enumerate(found.tolist()):
        byte = int(parts["weight"].flatten()[number // 2])
        code = byte & 15 if number % 2 else byte >> 4
        assert weight == float(torch.tensor(numbers[code]) * parts["weight.absmax"][number // 64])


@pytest.mark.parametrize(("dtype", "bias", "mantissa_bits"), [("float8_e4m3fn", 7, 3), ("float8_e5m2", 15, 2)])
def test_every_byte_of_fp8_is_what_the_specification_says(dtype: str, bias: int, mantissa_bits: int) -> None:
    """OFP8: numbers below the first exponent have no leading one. E4M3's largest code is NaN; E5M2 has infinities."""
    pytest.importorskip("triton")
    expected = torch.empty(1, 256)
    for byte in range(256):
        exponent, mantissa = byte >> mantissa_bits & 2 * bias + 1, byte & (1 << mantissa_bits) - 1
        part = mantissa / 2**mantissa_bits
        size = (part if exponent == 0 else 1 + part) * 2.0 ** (max(exponent, 1) - bias)
        if dtype == "float8_e4m3fn" and byte & 127 == 127:
            size = float("nan")
        if dtype == "float8_e5m2" and exponent == 31:
            size = float("nan") if mantissa else float("inf")
        expected[0, byte] = -size if byte > 127 else size
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256).view(getattr(torch, dtype))
    parts = {"weight": codes, "weight_scale": torch.tensor(1.0)}
    for found in by_both(codec_of({"quant_method": "fp8"}, (1, 256), parts), parts, (1, 256)):
        assert torch.equal(found.isnan(), expected.isnan())
        assert_same_bits(found.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_an_order_that_names_no_group_is_in_order_and_one_beyond_the_last_is_the_last() -> None:
    quantization = FORMS["compressed-tensors-int4-ordered"].quantization
    parts, _ = FORMS["compressed-tensors-int4"].pack(8, 64, generator(9))
    plain = decoded(codec_of(quantization, (8, 64), parts), parts, (8, 64), torch.float32)
    parts["weight_g_idx"] = torch.full((64,), -1, dtype=torch.int32)
    codec = codec_of(quantization, (8, 64), parts)
    assert_same_bits(decoded(codec, parts, (8, 64), torch.float32), plain)
    parts["weight_g_idx"] = torch.where(torch.arange(64) < 32, 0, 2**31 - 1).to(torch.int32)
    assert_same_bits(decoded(codec, parts, (8, 64), torch.float32), plain)
