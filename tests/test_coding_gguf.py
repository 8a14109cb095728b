"""Blocks of GGUF tensors: two readings of each, a kernel that makes the same bits, rows of heads in their order."""

from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from allocations import working_bytes
from coding import HALVES, random_blocks, same_bits
from offload.coding.chunks import CPU_WORKSPACE_BYTES
from offload.coding.gguf_blocks import BLOCK_DECODERS
from offload.coding.gguf_codec import KERNELS, GgufDecoder, gguf_codec
from offload.coding.gguf_types import BLOCKS, FLOATS


def by_gguf(type_name: str, blocks: torch.Tensor) -> torch.Tensor:
    with np.errstate(over="ignore"):
        return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[type_name]))


@pytest.mark.parametrize("type_name", BLOCK_DECODERS)
def test_weights_are_those_of_the_formats_own_library_bit_for_bit(type_name: str) -> None:
    blocks = random_blocks(type_name, 3000)
    assert same_bits(BLOCK_DECODERS[type_name](blocks), by_gguf(type_name, blocks))


@pytest.mark.parametrize("type_name", BLOCK_DECODERS)
@given(data=st.data())
def test_any_bytes_mean_what_the_library_says(type_name: str, data: st.DataObject) -> None:
    size = BLOCKS[type_name].num_bytes
    block = bytearray(data.draw(st.binary(min_size=size, max_size=size)))
    for place in HALVES[type_name]:
        block[place + 1] &= 0xBF
    blocks = torch.frombuffer(block, dtype=torch.uint8)[None]
    assert same_bits(BLOCK_DECODERS[type_name](blocks), by_gguf(type_name, blocks))


def test_every_type_that_is_read_is_stored_as_it_is_or_decoded() -> None:
    assert BLOCKS.keys() == {*BLOCK_DECODERS, *FLOATS} and BLOCK_DECODERS.keys() >= KERNELS


# A second reading, one number at a time, from the layouts as ggml's C structures and ONNX describe them.


def half(block: bytes, place: int) -> float:
    return float(np.frombuffer(block, np.float16, 1, place)[0])


def read_q4_0(block: bytes) -> list[float]:
    low, high = [byte & 15 for byte in block[2:]], [byte >> 4 for byte in block[2:]]
    return [half(block, 0) * (number - 8) for number in low + high]


def read_q8_0(block: bytes) -> list[float]:
    return [half(block, 0) * (byte - 256 if byte > 127 else byte) for byte in block[2:]]


def read_q4_k(block: bytes, fifths: bytes = bytes(32), nibbles: int = 16) -> list[float]:
    weights = []
    for group in range(8):
        if group < 4:
            scale, minimum = block[4 + group] % 64, block[8 + group] % 64
        else:
            scale = block[8 + group] % 16 + 16 * (block[group] // 64)
            minimum = block[8 + group] // 16 + 16 * (block[4 + group] // 64)
        for place in range(32):
            byte = block[nibbles + group // 2 * 32 + place]
            number = byte // 16 if group % 2 else byte % 16
            number += 16 * (fifths[place] // 2**group % 2)
            weights.append(half(block, 0) * scale * number - half(block, 2) * minimum)
    return weights


def read_q5_k(block: bytes) -> list[float]:
    return read_q4_k(block, block[16:48], 48)


def read_q6_k(block: bytes) -> list[float]:
    weights = [0.0] * 256
    for part in range(2):
        for place in range(32):
            low, next_low = block[64 * part + place], block[64 * part + 32 + place]
            high = block[128 + 32 * part + place]
            numbers = [low % 16, next_low % 16, low // 16, next_low // 16]
            for quarter, number in enumerate(numbers):
                at = 128 * part + 32 * quarter + place
                scale = int(np.int8(np.uint8(block[192 + at // 16])))
                weights[at] = half(block, 208) * scale * (number + 16 * (high // 4**quarter % 4) - 32)
    return weights


READINGS: dict[str, Callable[[bytes], list[float]]] = {
    "Q4_0": read_q4_0,
    "Q8_0": read_q8_0,
    "Q4_K": read_q4_k,
    "Q5_K": read_q5_k,
    "Q6_K": read_q6_k,
}


@pytest.mark.parametrize("type_name", READINGS)
def test_weights_are_those_of_a_second_reading_of_the_specification(type_name: str) -> None:
    """Its float64 numbers have one rounding behind them where float32 has one: they agree as numbers."""
    blocks = random_blocks(type_name, 40)
    expected = torch.tensor([READINGS[type_name](block.numpy().tobytes()) for block in blocks], dtype=torch.float64)
    assert torch.equal(BLOCK_DECODERS[type_name](blocks), expected.float())


def stored_rows(type_name: str, num_rows: int, num_columns: int) -> torch.Tensor:
    """uint8 [num_rows, row bytes]."""
    blocks = random_blocks(type_name, num_rows * num_columns // BLOCKS[type_name].num_weights, huge=False)
    return blocks.view(num_rows, -1)


def decoded(codec: Any, stored: torch.Tensor, num_rows: int, num_columns: int, dtype: torch.dtype) -> torch.Tensor:
    parameter = torch.full((num_rows, num_columns), float("nan"), dtype=dtype)
    codec({"weight": stored}, parameter)
    return parameter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("type_name", BLOCK_DECODERS)
def test_a_parameter_is_decoded_in_pieces_and_rounded_once(type_name: str, dtype: torch.dtype) -> None:
    num_rows, num_columns = 700, 512
    stored = stored_rows(type_name, num_rows, num_columns)
    expected = by_gguf(type_name, stored)
    assert expected.nbytes > CPU_WORKSPACE_BYTES / 2  # more than a piece
    parameter = decoded(GgufDecoder(type_name=type_name), stored, num_rows, num_columns, dtype)
    assert same_bits(parameter, expected.to(dtype))


def in_pairs(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """What a converter of llama.cpp does to the rows of queries and keys."""
    return rows.view(num_heads, 2, rows.shape[0] // num_heads // 2, -1).transpose(1, 2).reshape(rows.shape)


@pytest.mark.parametrize("type_name", ["Q4_0", "Q5_1", "F16"])
def test_rows_of_heads_come_back_in_the_order_of_halves(type_name: str) -> None:
    num_rows, num_columns, num_heads = 640, 512, 5
    rows = torch.randn(num_rows, num_columns, generator=torch.Generator().manual_seed(0))
    stored = rows.half() if type_name == "F16" else stored_rows(type_name, num_rows, num_columns)
    codec = gguf_codec("weight", type_name, (num_rows, num_columns), num_heads)
    assert codec is not None
    parameter = decoded(codec.decode, in_pairs(stored, num_heads), num_rows, num_columns, torch.float32)
    assert torch.equal(parameter, stored.float() if type_name == "F16" else by_gguf(type_name, stored))


def test_a_bias_of_heads_is_put_in_order_too() -> None:
    bias = torch.arange(24.0)
    codec = gguf_codec("bias", "F32", (24,), 3)
    assert codec is not None
    parameter = torch.empty(24, dtype=torch.bfloat16)
    codec.decode({"bias": in_pairs(bias, 3)}, parameter)
    assert torch.equal(parameter, bias.bfloat16())


@pytest.mark.matrix
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_heads", [None, 3])
@pytest.mark.parametrize("type_name", sorted(KERNELS))
def test_kernel_makes_the_bits_of_the_twin(type_name: str, num_heads: int | None, dtype: torch.dtype) -> None:
    """The number of groups is no multiple of what a program takes."""
    codec = gguf_codec("weight", type_name, (18, 256), num_heads)
    assert codec is not None and codec.kernel is not None
    stored = stored_rows(type_name, 18, 256)
    made, expected = (decoded(decode, stored, 18, 256, dtype) for decode in (codec.kernel, codec.decode))
    assert same_bits(made, expected)


@pytest.mark.parametrize("type_name", sorted(KERNELS))
def test_kernel_reads_every_byte_as_the_twin_does(type_name: str) -> None:
    stored = random_blocks(type_name, 60).view(2, -1)
    num_columns = 30 * BLOCKS[type_name].num_weights
    codec = gguf_codec("weight", type_name, (2, num_columns))
    assert codec is not None and codec.kernel is not None
    made, expected = (decoded(decode, stored, 2, num_columns, torch.float32) for decode in (codec.kernel, codec.decode))
    assert same_bits(made, expected)


@pytest.mark.parametrize("type_name", BLOCK_DECODERS)
def test_decoding_stays_within_its_workspace(type_name: str) -> None:
    stored = stored_rows(type_name, 512, 2048)
    parameter = torch.empty(512, 2048, dtype=torch.bfloat16)
    decode = GgufDecoder(type_name=type_name, num_heads=64)
    decode({"weight": stored}, parameter)  # makes the table that is kept
    peak_bytes = working_bytes(lambda: decode({"weight": stored}, parameter))
    assert 0 < peak_bytes <= CPU_WORKSPACE_BYTES


@pytest.mark.parametrize(
    ("shape", "type_name", "num_heads", "expected"),
    [
        ((4, 48), "Q8_0", None, "has the shape (4, 48), whose rows blocks of 32 (Q8_0) do not make up"),
        ((4, 320), "Q4_K", None, "blocks of 256 (Q4_K)"),
        ((64,), "Q8_0", None, "has the shape (64,)"),
        ((12, 32), "Q8_0", 4, "has 12 rows, which 4 heads of pairs do not make up"),
    ],
)
def test_what_blocks_or_heads_do_not_make_up_is_refused(
    shape: tuple[int, ...], type_name: str, num_heads: int | None, expected: str
) -> None:
    with pytest.raises(ValueError) as caught:
        gguf_codec("weight", type_name, shape, num_heads)
    assert expected in str(caught.value)
