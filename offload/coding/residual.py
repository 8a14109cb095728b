"""Decoders of what residual_layout.py describes, and the codec of a parameter that is stored so."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from .base import codes_at
from .base_kinds import BaseKind
from .base_layout import Base, base_parts
from .chunks import row_chunks
from .exceptions import write_exceptions
from .lossless import MOST_OF_RAW
from .lossless_layout import num_bytes_of, prefix_of
from .residual_layout import BLOCK, MAX_WIDTH, Remainder, remainder_parts
from .tensor_codec import TensorCodec

FORMATS: Final = {torch.bfloat16: "residual bfloat16", torch.float16: "residual float16"}
_WEIGHT_BYTES: Final = 128  # of what is made on the way


def residual_codec(
    parameter: str,
    shape: tuple[int, ...],
    kind: BaseKind,
    *,
    num_words: int,
    num_exceptions: int,
    dtype: torch.dtype,
    is_half: bool,
) -> TensorCodec:
    """Of a parameter of `dtype`, one of FORMATS, and two dimensions, beside a base of that kind; `num_words` without the one
    that nobody needs."""
    prefix = prefix_of(parameter)
    parts = remainder_parts(
        prefix,
        math.prod(shape),
        kind,
        num_words=num_words,
        num_exceptions=num_exceptions,
        dtype=dtype,
        is_half=is_half,
    )
    return TensorCodec(
        format=FORMATS[dtype],
        parts=parts,
        decode=ResidualDecoder(prefix, kind),
        kernel=ResidualKernel(prefix, kind),
        kept=base_parts(parameter, shape, kind),
    )


def residual_pays(codec: TensorCodec, shape: tuple[int, ...]) -> bool:
    """Whether what is streamed of a parameter of that shape is worth its code; its base is there anyway."""
    return num_bytes_of(codec.parts) <= MOST_OF_RAW * 2 * math.prod(shape)


@dataclass(frozen=True, slots=True)
class ResidualDecoder:
    """A Decoder of the parts whose names begin with `prefix`. Into the dtype that was coded it writes the very bits, into a
    wider one the same values, into another one those values, rounded once."""

    prefix: str
    kind: BaseKind

    def __call__(self, parts: Mapping[str, torch.Tensor], parameter: torch.Tensor) -> None:
        remainder, base = Remainder.of(parts, self.prefix), Base.of(parts, f"{self.prefix}base_")
        if parameter.device.type == "cpu":
            from .residual_cpu import decode_on_cpu  # numba

            decode_on_cpu(remainder, base, self.kind, parameter)
        else:
            decode_anywhere(remainder, base, self.kind, parameter)


@dataclass(frozen=True, slots=True)
class ResidualKernel:
    """The same by a Triton kernel, on a device that has Triton."""

    prefix: str
    kind: BaseKind

    def __call__(self, parts: Mapping[str, torch.Tensor], parameter: torch.Tensor) -> None:
        from .residual_kernel import decode_by_kernel  # triton, which need not be installed

        remainder, base = Remainder.of(parts, self.prefix), Base.of(parts, f"{self.prefix}base_")
        decode_by_kernel(remainder, base, self.kind, parameter)
        write_exceptions(remainder.positions, remainder.exceptions, parameter)


def decode_anywhere(remainder: Remainder, base: Base, kind: BaseKind, parameter: torch.Tensor) -> None:
    """In operations of torch whose shapes are known beforehand."""
    weights, num_columns = parameter.view(-1), parameter.shape[-1]
    for blocks in row_chunks(remainder.num_blocks, BLOCK * _WEIGHT_BYTES, device_type=parameter.device.type):
        these = weights[blocks.start * BLOCK : blocks.stop * BLOCK]
        numbers = _numbers_of_blocks(remainder, base, kind, blocks, num_columns, weights.numel())
        these.copy_(numbers[: these.numel()])
    write_exceptions(remainder.positions, remainder.exceptions, parameter)


def _numbers_of_blocks(
    remainder: Remainder, base: Base, kind: BaseKind, blocks: slice, num_columns: int, num_weights: int
) -> torch.Tensor:
    """[blocks * 1024] of the dtype that is coded. What damage has moved out of `words` or `widths` is taken for their first or
    last."""
    device, last = base.codes.device, remainder.words.numel() - 1
    places = torch.arange(blocks.start * BLOCK, blocks.stop * BLOCK, dtype=torch.int32, device=device)
    places.clamp_(max=num_weights - 1)
    rows, columns = torch.div(places, num_columns, rounding_mode="floor"), places % num_columns
    groups = (rows * base.scale.shape[1] + torch.div(columns, kind.group, rounding_mode="floor")).long()
    codes = codes_at(base.codes, rows, columns, kind.bits)
    steps = codes - base.zero.view(-1)[groups].to(torch.int32)
    sizes = steps.abs()
    widths = remainder.widths[sizes.clamp(max=remainder.widths.numel() - 1).long()].to(torch.int32).clamp_(max=MAX_WIDTH)
    ends = widths.view(-1, BLOCK).cumsum(1, dtype=torch.int32)
    bits = ends.view(-1) - widths  # in front of it in its block
    offsets = remainder.offsets[blocks].clamp(0, last)
    words = (offsets[:, None] + (bits >> 5).view(-1, BLOCK)).view(-1).long()
    low = remainder.words[words.clamp(max=last)].long() & 0xFFFFFFFF
    high = remainder.words[(words + 1).clamp_(max=last)].long() << 32
    fields = ((low | high) >> (bits & 31)).to(torch.int32) & (1 << widths) - 1
    highest = (1 << widths) >> 1  # bit of the field
    dtype = torch.float16 if remainder.is_half else torch.bfloat16
    near = (torch.where(sizes == 0, 0.5, sizes.float()) * base.scale.view(-1)[groups].float()).to(dtype).view(torch.int16)
    found = torch.where(steps == 0, near - (fields & ~highest), near + (fields ^ highest) - highest)
    negative = torch.where(steps == 0, fields & highest != 0, steps < 0)
    return torch.where(negative, found | 0x8000, found & 0x7FFF).to(torch.int16).view(dtype)
