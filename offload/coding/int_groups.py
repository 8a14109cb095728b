"""Weights of 2, 4 or 8 bits in words of 32, a scale and a zero point for each group along the input: what compressed-tensors
calls pack-quantized, GPTQ and AWQ.

A weight is (its code - zero point) * scale, with those of the group that its column is in: columns in order, or as an order
tensor says (GPTQ's desc_act). Codes lie in words from the low bits up. N are rows of the parameter, K columns, G groups:

    layout     words               scale    zero points            codes in a word
    rows       [N, K * bits / 32]  [N, G]   [N * bits / 32, G]     consecutive columns; zero points of consecutive rows
    columns    [K * bits / 32, N]  [G, N]   [G, N * bits / 32]     consecutive columns; zero points of consecutive rows
    awq        [K, N / 8]          [G, N]   [G, N / 8]             eight consecutive rows in the order 0 2 4 6 1 3 5 7, both

Without zero points, it is the middle of the codes. GPTQ's first format stores each zero point one smaller, as words from which
0x11111111 was taken (0x01010101 of eight bits): a borrow runs on into the next, and adding the same word undoes it.
Sources: compressed-tensors 0.20 (pack_quantized), GPTQModel (checkpoint formats gptq and gptq_v2), AutoAWQ (WQLinear_GEMM).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import torch

from .chunks import by_group, row_chunks

Tensors = Mapping[str, torch.Tensor]
Layout = Literal["rows", "columns", "awq"]
WORD_BITS: Final = 32
_WORKSPACE_PER_WEIGHT_BYTES = 24  # codes as int32 twice, their float32, and a zero point and a scale for each where ordered


@dataclass(frozen=True, slots=True, kw_only=True)
class IntGroups:
    """Names of the parts, and how they are read. `zero_points_off`: each is stored one smaller. `group` is in columns."""

    layout: Layout
    bits: int
    group: int
    words: str
    scale: str
    zero_points: str | None
    zero_points_off: bool
    order: str | None

    @property
    def per_word(self) -> int:
        return WORD_BITS // self.bits

    @property
    def added(self) -> int:
        """To words of zero points."""
        return sum(1 << shift for shift in range(0, WORD_BITS, self.bits)) if self.zero_points_off else 0


@dataclass(frozen=True, slots=True)
class IntGroupsDecoder:
    groups: IntGroups

    def __call__(self, parts: Tensors, parameter: torch.Tensor) -> None:
        groups, (num_rows, num_columns) = self.groups, parameter.shape
        order = None if groups.order is None else _order(parts[groups.order], num_columns, groups.group)
        row_bytes = num_columns * _WORKSPACE_PER_WEIGHT_BYTES
        for chunk in row_chunks(num_rows, row_bytes, device_type=parameter.device.type, multiple=groups.per_word):
            values = _codes(groups, parts[groups.words], chunk)[:, :num_columns].to(torch.float32)  # [rows, columns]
            scale = parts[groups.scale][chunk] if groups.layout == "rows" else parts[groups.scale][:, chunk].t()
            scale = scale.to(torch.float32)  # [rows, groups]
            zero_points = _zero_points(groups, parts, chunk).expand_as(scale)
            if order is None:
                for group, which in by_group(values, groups.group):
                    group.sub_(zero_points[:, which, None]).mul_(scale[:, which, None])
            else:
                values.sub_(zero_points.index_select(1, order)).mul_(scale.index_select(1, order))
            parameter[chunk] = values


@dataclass(frozen=True, slots=True)
class IntGroupsKernel:
    groups: IntGroups

    def __call__(self, parts: Tensors, parameter: torch.Tensor) -> None:
        from .packed_kernels import decode_int_groups  # triton, which need not be installed

        decode_int_groups(self.groups, parts, parameter)


def _codes(groups: IntGroups, words: torch.Tensor, chunk: slice) -> torch.Tensor:
    """[rows, columns] of int32; a row may have more columns than the parameter, of a last word that it does not fill."""
    if groups.layout == "rows":
        return _along_columns(groups, words[chunk])
    if groups.layout == "columns":
        return _along_columns(groups, words[:, chunk].t().contiguous())
    return _along_rows(groups, words[:, _words(groups, chunk)].t().contiguous())


def _zero_points(groups: IntGroups, parts: Tensors, chunk: slice) -> torch.Tensor:
    """[rows, groups] of the rows of `chunk`, or [1, 1] where all are the same, in float32."""
    if groups.zero_points is None:
        return torch.full((1, 1), 2.0 ** (groups.bits - 1), device=parts[groups.words].device)
    words, which = parts[groups.zero_points], _words(groups, chunk)
    words = words[which] if groups.layout == "rows" else words[:, which].t().contiguous()
    return _along_rows(groups, words + groups.added)[: chunk.stop - chunk.start].to(torch.float32)


def _along_columns(groups: IntGroups, words: torch.Tensor) -> torch.Tensor:
    """[m, n] words of consecutive columns as [m, n * codes in a word] codes."""
    return (words.unsqueeze(-1) >> _shifts(groups, words)).bitwise_and_(2**groups.bits - 1).flatten(1)


def _along_rows(groups: IntGroups, words: torch.Tensor) -> torch.Tensor:
    """[m, n] words of consecutive rows as [m * codes in a word, n] codes."""
    return (words.unsqueeze(1) >> _shifts(groups, words)[:, None]).bitwise_and_(2**groups.bits - 1).flatten(0, 1)


def _shifts(groups: IntGroups, words: torch.Tensor) -> torch.Tensor:
    """Where the codes of a word begin."""
    number = torch.arange(groups.per_word, dtype=torch.int32, device=words.device)
    return (number >> 1) * 4 + (number & 1) * 16 if groups.layout == "awq" else number * groups.bits


def _words(groups: IntGroups, chunk: slice) -> slice:
    """That hold one code for each of the rows of `chunk`, which begins with a word."""
    return slice(chunk.start // groups.per_word, -(-chunk.stop // groups.per_word))


def _order(order: torch.Tensor, num_columns: int, group: int) -> torch.Tensor:
    """The group of each column. Below zero, a column was not given any: then it is in order. A damaged file may name groups
    that there are not: those are the last."""
    in_order = torch.arange(num_columns, device=order.device) // group  # [K]
    return torch.where(order < 0, in_order, order).clamp_(max=-(-num_columns // group) - 1)
