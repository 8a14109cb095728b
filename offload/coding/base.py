"""What a base computes with: base_layout.py decoded."""

from typing import Final

import torch

from .base_kinds import BaseKind
from .base_layout import Base
from .chunks import row_chunks

_WEIGHT_BYTES: Final = 64  # of what is made on the way


def decode_base(base: Base, kind: BaseKind, into: torch.Tensor) -> None:
    """k s of every weight, computed in float32 and rounded once, into all of `into`, [N, K], contiguous and of any float dtype.
    On a CPU by compiled loops; on another device by operations of torch whose shapes are known beforehand."""
    if into.device.type == "cpu":
        decode_base_on_cpu(base, kind, into)
    else:
        decode_base_anywhere(base, kind, into)


def decode_base_anywhere(base: Base, kind: BaseKind, into: torch.Tensor) -> None:
    num_columns = into.shape[1]
    columns = torch.arange(num_columns, dtype=torch.int32, device=into.device)
    groups = torch.div(columns, kind.group, rounding_mode="floor").long()
    for rows in row_chunks(into.shape[0], num_columns * _WEIGHT_BYTES, device_type=into.device.type):
        numbers = torch.arange(rows.start, rows.stop, dtype=torch.int32, device=into.device)
        codes = codes_at(base.codes, numbers[:, None], columns, kind.bits)
        steps = codes - base.zero[rows][:, groups].to(torch.int32)
        into[rows] = steps * base.scale[rows][:, groups].float()


def codes_at(packed: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, bits: int) -> torch.Tensor:
    """int32, of `packed` [N, bytes]; `rows` and `columns` are int32 and broadcast."""
    row_bytes = packed.shape[1]
    places = rows.long() * row_bytes + (columns * bits >> 3)
    pairs = packed.view(-1)[places].to(torch.int32)
    if 8 % bits:  # else none lies in two bytes
        pairs |= packed.view(-1)[places.add_(1).clamp_(max=packed.numel() - 1)].to(torch.int32) << 8
    return pairs >> (columns * bits & 7) & (1 << bits) - 1


def decode_base_on_cpu(base: Base, kind: BaseKind, into: torch.Tensor) -> None:
    from .base_loops import compute_rows  # numba

    as_bits = into.dtype == torch.bfloat16
    num_rows, num_columns = into.shape
    packed, scale, zero = base.codes.numpy(), base.scale.view(torch.int16).numpy().view("uint16"), base.zero.numpy()
    if as_bits or into.dtype == torch.float32:
        values = into.view(-1).view(torch.int16).numpy().view("uint16") if as_bits else into.view(-1).numpy()
        compute_rows(packed, scale, zero, num_columns, kind.group, kind.bits, as_bits, values)
        return
    for rows in row_chunks(num_rows, 4 * num_columns, device_type="cpu"):
        room = torch.empty(rows.stop - rows.start, num_columns)
        compute_rows(packed[rows], scale[rows], zero[rows], num_columns, kind.group, kind.bits, False, room.view(-1).numpy())
        into[rows] = room
