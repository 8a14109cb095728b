"""Kernels in Triton of the packed formats. Each makes the bits of its twin in eight_bits.py, int_groups.py or fp4.py, which
say what the formats are: products in float32, rounded once. Imports triton."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from collections.abc import Mapping

import torch
import triton
import triton.language as tl

from .eight_bits import grid_of
from .fp4 import Fp4Groups
from .int_groups import IntGroups
from .kernel_rounding import rounded
from .scales import POWERS

Tensors = Mapping[str, torch.Tensor]
WIDE = (4, 512)  # rows and columns of a program, where rows are read as they lie
SQUARE = (32, 64)  # where the parameter is written across what is read


def decode_blocks(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    block: tuple[int, int],
    parameter: torch.Tensor,
) -> None:
    num_rows, num_columns = parameter.shape
    _blocks[_programs(num_rows, num_columns, WIDE)](
        _as_bytes(weight),
        _as_bytes(scale),
        parameter if zero_point is None else zero_point,
        parameter,
        num_rows,
        num_columns,
        grid_of((num_rows, num_columns), block)[1],
        *block,
        WEIGHT=_number(weight),
        SCALE=_number(scale),
        HAS_ZERO_POINT=zero_point is not None,
        ROWS=WIDE[0],
        COLUMNS=WIDE[1],
        enable_fp_fusion=False,
    )


def decode_int_groups(groups: IntGroups, parts: Tensors, parameter: torch.Tensor) -> None:
    num_rows, num_columns = parameter.shape
    words, scale = parts[groups.words], parts[groups.scale]
    tile = WIDE if groups.layout == "rows" else SQUARE
    _int_groups[_programs(num_rows, num_columns, tile)](
        words,
        scale,
        words if groups.zero_points is None else parts[groups.zero_points],
        words if groups.order is None else parts[groups.order],
        parameter,
        num_rows,
        num_columns,
        -(-num_columns // groups.group),
        groups.group,
        groups.added,
        BITS=groups.bits,
        LAYOUT=groups.layout,
        HAS_ZERO_POINTS=groups.zero_points is not None,
        HAS_ORDER=groups.order is not None,
        ROWS=tile[0],
        COLUMNS=tile[1],
        enable_fp_fusion=False,
    )


def decode_fp4(groups: Fp4Groups, parts: Tensors, parameter: torch.Tensor) -> None:
    scale = parts[groups.scale]
    rows, columns = parameter.shape[-2:]
    num_rows, num_columns = (columns, rows) if groups.transposed else (rows, columns)
    tile = SQUARE if groups.transposed else WIDE
    num_all = parameter.numel() // num_columns
    _fp4_groups[_programs(num_all, num_columns, tile)](
        parts[groups.packed],
        _as_bytes(scale),
        parts[groups.packed] if groups.whole is None else parts[groups.whole],
        parameter,
        num_all,
        num_rows,
        num_columns,
        groups.group,
        SCALE=_number(scale),
        WHOLE="none" if groups.whole is None else "divides" if groups.divides else "multiplies",
        TRANSPOSED=groups.transposed,
        ROWS=tile[0],
        COLUMNS=tile[1],
        enable_fp_fusion=False,
    )


def _programs(num_rows: int, num_columns: int, tile: tuple[int, int]) -> tuple[int, int]:
    return triton.cdiv(num_rows, tile[0]), triton.cdiv(num_columns, tile[1])


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Numbers of eight bits are read by hand: not every device that runs kernels converts them, nor the interpreter."""
    return tensor.view(torch.uint8) if tensor.itemsize == 1 and tensor.dtype != torch.int8 else tensor


def _number(tensor: torch.Tensor) -> str:
    if tensor.dtype in POWERS:
        return "power"
    return {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}.get(tensor.dtype, "plain")


@triton.jit
def _float_of(raw, NUMBER: tl.constexpr):
    """In float32, exactly."""
    if NUMBER == "e4m3":
        byte = raw.to(tl.int32)
        # As a float16, whose exponent is then eight too small.
        half = (((byte & 0x80) << 8) | ((byte & 0x7F) << 7)).to(tl.uint16).to(tl.float16, bitcast=True)
        return tl.where((byte & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)
    elif NUMBER == "e5m2":
        return (raw.to(tl.int32) << 8).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    elif NUMBER == "power":
        exponent = raw.to(tl.int32)
        bits = tl.where(exponent == 0, 0x00400000, exponent << 23)
        return tl.where(exponent == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)
    else:
        return raw.to(tl.float32)


@triton.jit
def _blocks(
    weight,
    scale,
    zero_point,
    parameter,
    num_rows,
    num_columns,
    blocks_across,
    block_rows,
    block_columns,
    WEIGHT: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_ZERO_POINT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < num_rows) & (column < num_columns)
    place = row.to(tl.int64) * num_columns + column
    block = (row // block_rows) * blocks_across + column // block_columns
    value = _float_of(tl.load(weight + place, mask=inside, other=0), WEIGHT)
    if HAS_ZERO_POINT:
        value -= tl.load(zero_point + block, mask=inside, other=0).to(tl.float32)
    value *= _float_of(tl.load(scale + block, mask=inside, other=0), SCALE)
    tl.store(parameter + place, rounded(value, parameter.dtype.element_ty), mask=inside)


@triton.jit
def _int_groups(
    words,
    scale,
    zero_points,
    order,
    parameter,
    num_rows,
    num_columns,
    num_groups,
    group_columns,
    added,
    BITS: tl.constexpr,
    LAYOUT: tl.constexpr,
    HAS_ZERO_POINTS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    PER_WORD: tl.constexpr = 32 // BITS
    CODE: tl.constexpr = 2**BITS - 1
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < num_rows) & (column < num_columns)
    group = column // group_columns
    if HAS_ORDER:
        given = tl.load(order + column, mask=column < num_columns, other=0).to(tl.int32)
        group = tl.minimum(tl.where(given < 0, group, given), num_groups - 1)
    row_words = (num_rows + PER_WORD - 1) // PER_WORD
    row_word, row_shift = row // PER_WORD, row % PER_WORD * BITS
    if LAYOUT == "rows":
        word = row.to(tl.int64) * ((num_columns + PER_WORD - 1) // PER_WORD) + column // PER_WORD
        shift = column % PER_WORD * BITS
        of_scale = row * num_groups + group
        of_zero_point = row_word * num_groups + group
    else:
        of_scale = group * num_rows + row
        of_zero_point = group * row_words + row_word
        if LAYOUT == "columns":
            word = (column // PER_WORD).to(tl.int64) * num_rows + row
            shift = column % PER_WORD * BITS
        else:
            row_shift = (row % 8) // 2 * 4 + row % 2 * 16
            word = column.to(tl.int64) * row_words + row_word
            shift = row_shift
    code = (tl.load(words + word, mask=inside, other=0) >> shift) & CODE
    if HAS_ZERO_POINTS:
        zero_word = tl.load(zero_points + of_zero_point, mask=inside, other=0) + added
        code -= (zero_word >> row_shift) & CODE
    else:
        code -= 2 ** (BITS - 1)
    value = code.to(tl.float32) * tl.load(scale + of_scale, mask=inside, other=0).to(tl.float32)
    place = row.to(tl.int64) * num_columns + column
    tl.store(parameter + place, rounded(value, parameter.dtype.element_ty), mask=inside)


@triton.jit
def _fp4_groups(
    packed,
    scale,
    whole,
    parameter,
    num_all,
    num_rows,
    num_columns,
    group_columns,
    SCALE: tl.constexpr,
    WHOLE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """`num_all` rows of matrices that have `num_rows` each."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < num_all) & (column < num_columns)
    byte = tl.load(packed + row * (num_columns // 2) + column // 2, mask=inside, other=0).to(tl.int32)
    code = byte >> (column % 2 * 4)
    # As a float16, whose exponent is then 14 too small.
    half = (((code & 8) << 12) | ((code & 7) << 9)).to(tl.uint16).to(tl.float16, bitcast=True)
    of_scale = row * (num_columns // group_columns) + column // group_columns
    factor = _float_of(tl.load(scale + of_scale, mask=inside, other=0), SCALE)
    if WHOLE == "divides":
        factor = tl.math.div_rn(factor, tl.load(whole).to(tl.float32) + tl.zeros_like(factor))
    elif WHOLE == "multiplies":
        factor *= tl.load(whole).to(tl.float32)
    value = half.to(tl.float32) * 16384.0 * factor
    place = row * num_columns + column
    if TRANSPOSED:
        place = row // num_rows * num_rows * num_columns + column.to(tl.int64) * num_rows + row % num_rows
    tl.store(parameter + place, rounded(value, parameter.dtype.element_ty), mask=inside)
