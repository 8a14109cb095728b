"""The code of lossless_layout.py decoded by Triton: one program a block. `decode_anywhere` is its twin. Imports triton."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from .lossless_layout import BLOCK, CODE_BITS, ESCAPE, Coded

NUM_WARPS = 4


def decode_by_kernel(coded: Coded, parameter: torch.Tensor) -> None:
    """Writes what is no exception. The workspace is none."""
    as_bits = parameter.dtype == torch.bfloat16
    _decode_block[(coded.num_blocks,)](
        coded.bytes,
        coded.codes,
        coded.base,
        coded.escapes,
        coded.offsets,
        parameter.view(torch.int16) if as_bits else parameter,
        parameter.numel(),
        coded.escapes.numel() - 1,
        AS_BITS=as_bits,
        BLOCK=BLOCK,
        CODE_BITS=CODE_BITS,
        ESCAPE=ESCAPE,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )


@triton.jit
def _decode_block(
    bytes_pointer,
    codes_pointer,
    base_pointer,
    escapes_pointer,
    offsets_pointer,
    weights_pointer,
    num_weights,
    last_escape,
    AS_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    CODE_BITS: tl.constexpr,
    ESCAPE: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)  # in the block: what is computed of it fits 32 bits
    there = place < num_weights - block * BLOCK
    row_bytes = (num_weights + 7) // 8
    distance = tl.zeros([BLOCK], tl.int32)
    for bit in tl.static_range(CODE_BITS):
        row = codes_pointer + bit * row_bytes + block * (BLOCK // 8)
        byte = tl.load(row + (place >> 3), mask=there, other=0).to(tl.int32)
        distance |= (byte >> (place & 7) & 1) << bit
    is_escape = distance == ESCAPE
    number = tl.load(offsets_pointer + block) + tl.cumsum(is_escape.to(tl.int32), 0) - 1
    number = tl.minimum(tl.maximum(number, 0), last_escape)  # what is damaged is read from where it is allowed
    escape = tl.load(escapes_pointer + number, mask=is_escape, other=0).to(tl.int32)
    exponent = tl.where(is_escape, escape, distance + tl.load(base_pointer).to(tl.int32)) & 0xFF
    low = tl.load(bytes_pointer + block * BLOCK + place, mask=there, other=0).to(tl.int32)
    bits = (low & 0x80) << 8 | exponent << 7 | low & 0x7F
    weights = weights_pointer + block * BLOCK + place
    if AS_BITS:
        tl.store(weights, bits.to(tl.int16), mask=there)
    else:
        value = (bits << 16).to(tl.float32, bitcast=True)
        tl.store(weights, value.to(weights_pointer.dtype.element_ty), mask=there)
