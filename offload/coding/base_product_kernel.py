"""Products with a base by Triton, which reads every code once for many rows. base_product.py has the twin. Imports triton.

A program makes `OUTPUTS` numbers of `ROWS` rows, group by group: k = q - z is exact in every dtype that computes, so the dot is
of k, and the scale of the group multiplies its sum, in float32. The weights are the left factor, as they are many and the rows
may be few. Where there are too few programs to keep the memory busy, each sums a part of the columns, and the parts are added
in their order: the same numbers come out every time.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from typing import Final

import torch
import triton
import triton.language as tl

from .base_kinds import BaseKind
from .base_layout import Base
from .kernel_rounding import rounded

OUTPUTS: Final = 64
LEAST_ROWS: Final = 16  # of a program: a dot takes no fewer
MOST_INPUT_BYTES: Final = 2**14  # of the rows beside a group: four such tiles are under way in 99 KiB of shared memory
PROGRAMS: Final = 512  # that keep the memory of a large GPU busy
LEAST_GROUPS: Final = 4  # that a part of the columns has
SUMMED: Final = 1024  # numbers of a program that adds parts


def product_by_kernel(x: torch.Tensor, base: Base, kind: BaseKind, product: torch.Tensor) -> None:
    """`product` [M, N] = `x` [M, K] times the transposed base of N rows, all contiguous and of one float dtype. Parts take at
    most 32 MiB beside."""
    (num_rows, num_columns), num_outputs = x.shape, product.shape[1]
    most_rows = MOST_INPUT_BYTES // (kind.group * x.itemsize)
    rows = max(min(triton.next_power_of_2(num_rows), most_rows), LEAST_ROWS)
    num_blocks, num_row_blocks = triton.cdiv(num_outputs, OUTPUTS), triton.cdiv(num_rows, rows)
    num_groups = base.scale.shape[1]
    num_parts = max(min(triton.cdiv(PROGRAMS, num_blocks * num_row_blocks), num_groups // LEAST_GROUPS), 1)
    groups_each = triton.cdiv(num_groups, num_parts)
    num_parts = triton.cdiv(num_groups, groups_each)
    sums = product if num_parts == 1 else product.new_empty(num_parts, num_rows, num_outputs, dtype=torch.float32)
    _product[(num_blocks, num_row_blocks, num_parts)](
        x,
        base.codes,
        base.scale,
        base.zero,
        sums,
        num_rows,
        num_outputs,
        num_columns,
        base.codes.shape[1],
        num_groups,
        groups_each,
        BITS=kind.bits,
        GROUP=kind.group,
        ROWS=rows,
        OUTPUTS=OUTPUTS,
        IS_INTERPRETED=x.device.type == "cpu",  # by an interpreter whose dots take bfloat16 for integers
        num_warps=8 if rows > OUTPUTS else 4,
        num_stages=4 if x.itemsize == 2 else 3,
        enable_fp_fusion=True,  # rounding once more would be no closer to anything
    )
    if num_parts > 1:
        size = product.numel()
        _add[(triton.cdiv(size, SUMMED),)](sums, product, size, num_parts, SUMMED=SUMMED, enable_fp_fusion=True)


@triton.jit(do_not_specialize=["num_rows"])
def _product(
    x,
    codes,
    scale,
    zero,
    sums,
    num_rows,
    num_outputs,
    num_columns,
    row_bytes,
    num_groups,
    groups_each,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):
    dtype: tl.constexpr = tl.float32 if IS_INTERPRETED else x.dtype.element_ty
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(2) * groups_each
    is_output, is_row = output < num_outputs, row < num_rows
    code_rows = codes + output.to(tl.int64) * row_bytes
    group_rows = output * num_groups
    x_rows = x + row.to(tl.int64) * num_columns
    total = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for group in range(first, tl.minimum(first + groups_each, num_groups)):
        column = group * GROUP + tl.arange(0, GROUP)
        code = _codes_of_group(code_rows, is_output, group, row_bytes, BITS, GROUP, OUTPUTS)  # [OUTPUTS, GROUP]
        z = tl.load(zero + group_rows + group, mask=is_output, other=0).to(tl.int32)
        s = tl.load(scale + group_rows + group, mask=is_output, other=0).to(tl.float32)
        weight = (code - z[:, None]).to(tl.float32).to(dtype)
        taken = tl.load(x_rows[None, :] + column[:, None], mask=is_row[None, :] & (column < num_columns)[:, None], other=0)
        total += tl.dot(weight, taken.to(dtype), input_precision="ieee") * s[:, None]
    place = (tl.program_id(2) * num_rows + row).to(tl.int64)[:, None] * num_outputs + output[None, :]
    inside = is_row[:, None] & is_output[None, :]
    tl.store(sums + place, rounded(tl.trans(total), sums.dtype.element_ty), mask=inside)


@triton.jit
def _codes_of_group(code_rows, is_output, group, row_bytes, BITS: tl.constexpr, GROUP: tl.constexpr, OUTPUTS: tl.constexpr):
    """[OUTPUTS, GROUP] int32. Groups begin with a byte; codes are read in units, which do, too."""
    UNIT: tl.constexpr = 8 if BITS == 3 else 8 // BITS
    UNIT_BYTES: tl.constexpr = UNIT * BITS // 8
    unit = tl.arange(0, GROUP // UNIT)
    first_byte = group * (GROUP * BITS // 8) + unit * UNIT_BYTES
    bits = tl.zeros([OUTPUTS, GROUP // UNIT], tl.int32)
    for byte in tl.static_range(UNIT_BYTES):
        place = first_byte + byte
        there = is_output[:, None] & (place < row_bytes)[None, :]
        bits |= tl.load(code_rows[:, None] + place[None, :], mask=there, other=0).to(tl.int32) << (8 * byte)
    if UNIT == 1:
        code = bits
    else:
        shift = tl.arange(0, UNIT) * BITS
        code = tl.reshape((bits[:, :, None] >> shift[None, None, :]) & (2**BITS - 1), [OUTPUTS, GROUP])
    return code


@triton.jit
def _add(sums, product, size, num_parts, SUMMED: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * SUMMED + tl.arange(0, SUMMED)
    total = tl.zeros([SUMMED], tl.float32)
    for _part in range(num_parts):
        total += tl.load(sums + place, mask=place < size, other=0)
        sums += size
    tl.store(product + place, rounded(total, product.dtype.element_ty), mask=place < size)
