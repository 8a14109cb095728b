"""Weights of eight bits, a scale for each block of them: FP8 (E4M3 and E5M2) and int8.

A weight is its eight bits times the scale of its block; int8 may have a zero point, which is taken off first. A block is the
tensor, a row, a part of a row or a rectangle. The last ones down and across may be cut short.
Sources: OCP 8-bit Floating Point Specification (OFP8) 1.0 for the numbers. The names of the tensors are those that
transformers and compressed-tensors write.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from .chunks import by_group, row_chunks
from .lookup import look_up
from .scales import NUMBERS, POWERS, scale_values, stored_scale
from .stored_parts import Beside, Shape, last_name, matrix, need
from .tensor_codec import TensorCodec

Tensors = Mapping[str, torch.Tensor]
_WORKSPACE_PER_WEIGHT_BYTES = 12  # its value, and where blocks are small its scale, as stored and in float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """Names of the parts, and how many (rows, columns) share a scale."""

    weight: str
    scale: str
    zero_point: str | None
    block: tuple[int, int]


@dataclass(frozen=True, slots=True)
class BlocksDecoder:
    blocks: Blocks

    def __call__(self, parts: Tensors, parameter: torch.Tensor) -> None:
        num_rows, num_columns = parameter.shape
        row_bytes = num_columns * _WORKSPACE_PER_WEIGHT_BYTES
        for chunk in row_chunks(num_rows, row_bytes, device_type=parameter.device.type):
            parameter[chunk] = self._rows(parts, chunk, (num_rows, num_columns))

    def _rows(self, parts: Tensors, chunk: slice, shape: tuple[int, int]) -> torch.Tensor:
        blocks, grid = self.blocks, grid_of(shape, self.blocks.block)
        values = _values(parts[blocks.weight][chunk])  # [rows, columns]
        down = torch.arange(chunk.start, chunk.stop, device=values.device) // blocks.block[0]  # [rows]
        scale = scale_values(stored_scale(parts[blocks.scale]).view(grid)[down])  # [rows, blocks across]
        zero_point = None if blocks.zero_point is None else parts[blocks.zero_point].view(grid)[down].to(torch.float32)
        for group, across in by_group(values, blocks.block[1]):
            if zero_point is not None:
                group -= zero_point[:, across, None]
            group *= scale[:, across, None]
        return values


def _values(codes: torch.Tensor) -> torch.Tensor:
    """In float32. Of FP8 torch converts one at a time on a processor."""
    if codes.dtype == torch.int8:
        return codes.to(torch.float32)
    numbers = torch.arange(256, dtype=torch.uint8, device=codes.device).view(codes.dtype).to(torch.float32)
    return look_up(codes.view(torch.uint8), numbers)


@dataclass(frozen=True, slots=True)
class BlocksKernel:
    blocks: Blocks

    def __call__(self, parts: Tensors, parameter: torch.Tensor) -> None:
        from .packed_kernels import decode_blocks  # triton, which need not be installed

        blocks = self.blocks
        zero_point = None if blocks.zero_point is None else parts[blocks.zero_point]
        decode_blocks(parts[blocks.weight], parts[blocks.scale], zero_point, blocks.block, parameter)


def grid_of(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """How many blocks there are down and across."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def eight_bits(
    format: str,
    parameter: str,
    shape: Shape,
    beside: Beside,
    *,
    dtypes: Collection[torch.dtype],
    scale: str,
    zero_point: str | None = None,
    block: tuple[int, int] | None = None,
) -> TensorCodec:
    """Of a parameter that is stored under its own name in one of `dtypes`. Its scale has one value, one for each row or, where
    there is a `block`, one for each of these. ValueError as in Packing."""
    rows, columns = matrix(shape)
    own = last_name(parameter)
    weight = need(beside, own, [shape], dtypes)
    meant: dict[Shape, tuple[int, int]] = {} if block is None else {grid_of((rows, columns), block): block}
    meant |= {
        (rows,): (1, columns),
        (rows, 1): (1, columns),
        (): (rows, columns),
        (1,): (rows, columns),
        (1, 1): (rows, columns),
    }
    factor = need(beside, scale, meant, NUMBERS | POWERS, is_scale=True)
    parts = [weight, factor]
    if zero_point is not None:
        parts.append(need(beside, zero_point, [factor.shape], [torch.int8]))
    blocks = Blocks(weight=own, scale=scale, zero_point=zero_point, block=meant[factor.shape])
    return TensorCodec(format=format, parts=tuple(parts), decode=BlocksDecoder(blocks), kernel=BlocksKernel(blocks))
