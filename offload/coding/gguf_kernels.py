"""Kernels for the commonest blocks of GGUF tensors: the bits of gguf_blocks.py, whose layouts they read.

A program decodes groups of 32 weights, which lie in one row.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from typing import Final

import torch
import triton
import triton.language as tl

from .gguf_types import BLOCKS
from .kernel_rounding import rounded

GROUP_WEIGHTS: Final = 32
PROGRAM_GROUPS: Final = 32


def decode(type_name: str, stored: torch.Tensor, parameter: torch.Tensor, num_heads: int | None) -> None:
    """Writes `parameter` [N, C] from `stored` [N, row bytes] as a GgufDecoder does."""
    num_rows, num_columns = parameter.shape
    block = BLOCKS[type_name]
    num_groups = parameter.numel() // GROUP_WEIGHTS
    _decode[(triton.cdiv(num_groups, PROGRAM_GROUPS),)](
        stored,
        parameter,
        num_groups,
        num_columns // GROUP_WEIGHTS,
        kind=type_name,
        block_bytes=block.num_bytes,
        block_groups=block.num_weights // GROUP_WEIGHTS,
        head_rows=num_rows // num_heads if num_heads else 0,
        program_groups=PROGRAM_GROUPS,
        enable_fp_fusion=False,
    )


@triton.jit
def _decode(
    stored,
    parameter,
    num_groups,
    row_groups,
    kind: tl.constexpr,
    block_bytes: tl.constexpr,
    block_groups: tl.constexpr,
    head_rows: tl.constexpr,
    program_groups: tl.constexpr,
):
    group = tl.program_id(0) * program_groups + tl.arange(0, program_groups)[:, None]  # [G, 1]
    group = tl.minimum(group, num_groups - 1)  # what is over decodes the last group again
    lane = tl.arange(0, 32)[None, :]  # [1, 32]
    block = stored + (group // block_groups).to(tl.int64) * block_bytes  # [G, 1]
    part = group % block_groups
    if kind == "Q8_0":
        weights = _half(block) * _signed(block + 2 + lane)
    elif kind == "Q4_0":
        weights = _half(block) * ((_byte(block + 2 + lane % 16) >> (lane // 16 * 4) & 15) - 8).to(tl.float32)
    elif kind == "Q4_K":
        weights = _scaled(block, part, _nibble(block + 16, part, lane))
    elif kind == "Q5_K":
        fifth = _byte(block + 16 + lane) >> part & 1
        weights = _scaled(block, part, _nibble(block + 48, part, lane) | fifth << 4)
    else:
        weights = _q6_k(block, part, lane)
    row = group // row_groups
    if head_rows:  # stored as pairs of rows, one of each half of a head
        place = row % head_rows
        row = row - place + place // 2 + place % 2 * (head_rows // 2)
    column = group % row_groups * 32 + lane
    tl.store(parameter + row.to(tl.int64) * (row_groups * 32) + column, rounded(weights, parameter.dtype.element_ty))


@triton.jit
def _byte(place):
    return tl.load(place).to(tl.int32)


@triton.jit
def _signed(place):
    return tl.load(place).to(tl.int8, bitcast=True).to(tl.float32)


@triton.jit
def _half(place):
    bits = _byte(place) | _byte(place + 1) << 8
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _nibble(start, part, lane):
    """Of each 32 bytes the low nibbles are one part, the high ones the next."""
    return _byte(start + part // 2 * 32 + lane) >> (part % 2 * 4) & 15


@triton.jit
def _scaled(block, part, weights):
    """Times the scale of the part, less its minimum: of six bits each, packed in 12 bytes."""
    place = block + 4 + part % 4
    first, second, third = _byte(place), _byte(place + 4), _byte(place + 8)
    scale = tl.where(part < 4, first & 63, (third & 15) | first >> 6 << 4).to(tl.float32)
    minimum = tl.where(part < 4, second & 63, third >> 4 | second >> 6 << 4).to(tl.float32)
    return _half(block) * scale * weights.to(tl.float32) - _half(block + 2) * minimum


@triton.jit
def _q6_k(block, part, lane):
    low = _byte(block + part // 4 * 64 + part % 2 * 32 + lane) >> (part % 4 // 2 * 4) & 15
    high = _byte(block + 128 + part // 4 * 32 + lane) >> (part % 4 * 2) & 3
    scale = _half(block + 208) * _signed(block + 192 + part * 2 + lane // 16)
    return scale * ((low | high << 4) - 32).to(tl.float32)
