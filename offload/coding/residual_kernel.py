"""The code of residual_layout.py decoded by Triton: one program a block. `decode_anywhere` is its twin. Imports triton."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from .base_kinds import BaseKind
from .base_layout import Base
from .kernel_rounding import rounded
from .residual_layout import BLOCK, MAX_WIDTH, Remainder

NUM_WARPS = 4


def decode_by_kernel(remainder: Remainder, base: Base, kind: BaseKind, parameter: torch.Tensor) -> None:
    """Writes what is no exception. The workspace is none."""
    coded = torch.float16 if remainder.is_half else torch.bfloat16
    as_bits = parameter.dtype == coded
    _decode_block[(remainder.num_blocks,)](
        remainder.words,
        remainder.widths,
        remainder.offsets,
        base.codes,
        base.scale.view(torch.int16),  # as bits: the interpreter takes numbers below the normal ones for others
        base.zero,
        parameter.view(torch.int16) if as_bits else parameter,
        parameter.numel(),
        parameter.shape[-1],
        base.codes.shape[-1],
        base.scale.shape[-1],
        base.codes.numel() - 1,
        remainder.words.numel() - 1,
        BITS=kind.bits,
        GROUP=kind.group,
        IS_HALF=remainder.is_half,
        AS_BITS=as_bits,
        BLOCK=BLOCK,
        MAX_WIDTH=MAX_WIDTH,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )


@triton.jit
def _decode_block(
    words_pointer,
    widths_pointer,
    offsets_pointer,
    codes_pointer,
    scale_pointer,
    zero_pointer,
    weights_pointer,
    num_weights,
    num_columns,
    row_bytes,
    num_groups,
    last_byte,
    last_word,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    IS_HALF: tl.constexpr,
    AS_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX_WIDTH: tl.constexpr,
):
    TOP: tl.constexpr = 2**BITS - 1
    block = tl.program_id(0)
    place = block * BLOCK + tl.arange(0, BLOCK)  # fits 32 bits, as MAX_WEIGHTS does
    there = place < num_weights
    row, column = place // num_columns, place % num_columns
    bit = column * BITS
    byte = row.to(tl.int64) * row_bytes + (bit >> 3)
    code = tl.load(codes_pointer + byte, mask=there, other=0).to(tl.int32)
    if 8 % BITS != 0:  # else none lies in two bytes
        code |= tl.load(codes_pointer + tl.minimum(byte + 1, last_byte), mask=there, other=0).to(tl.int32) << 8
    group = row.to(tl.int64) * num_groups + column // GROUP
    code = (code >> (bit & 7)) & TOP
    steps = code - tl.load(zero_pointer + group, mask=there, other=0).to(tl.int32)
    size = tl.abs(steps)
    width = tl.load(widths_pointer + tl.minimum(size, TOP), mask=there, other=0).to(tl.int32)
    width = tl.minimum(width, MAX_WIDTH)
    start = tl.cumsum(width, 0) - width
    offset = tl.minimum(tl.maximum(tl.load(offsets_pointer + block), 0), last_word)
    word = offset + (start >> 5)  # what is damaged is read from where it is allowed
    low = tl.load(words_pointer + tl.minimum(word, last_word), mask=there, other=0).to(tl.uint32, bitcast=True)
    high = tl.load(words_pointer + tl.minimum(word + 1, last_word), mask=there, other=0).to(tl.uint32, bitcast=True)
    pair = low.to(tl.uint64) | (high.to(tl.uint64) << 32)
    field = (pair >> (start & 31).to(tl.uint64)).to(tl.int32) & ((tl.full([BLOCK], 1, tl.int32) << width) - 1)
    scale = tl.load(scale_pointer + group, mask=there, other=0).to(tl.int32)
    number = _number(field, width, steps, scale, IS_HALF)
    if AS_BITS:
        tl.store(weights_pointer + place, number.to(tl.int16), mask=there)
    else:
        if IS_HALF:
            value = number.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        else:
            value = (number << 16).to(tl.float32, bitcast=True)
        tl.store(weights_pointer + place, rounded(value, weights_pointer.dtype.element_ty), mask=there)


@triton.jit
def _number(field, width, steps, scale, IS_HALF: tl.constexpr):
    """Bits of a weight; `field` is of `width` bits, and `scale` are bits of bfloat16. All are int32."""
    highest = (tl.full(field.shape, 1, tl.int32) << width) >> 1  # bit of the field
    value = tl.where(steps == 0, 0.5, tl.abs(steps).to(tl.float32)) * (scale << 16).to(tl.float32, bitcast=True)
    if IS_HALF:
        near = value.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    else:
        near = rounded(value, tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32)
    number = tl.where(steps == 0, near - (field & ~highest), near + (field ^ highest) - highest)
    negative = tl.where(steps == 0, (field & highest) != 0, steps < 0)
    return (number & 0x7FFF) | tl.where(negative, 0x8000, 0)
