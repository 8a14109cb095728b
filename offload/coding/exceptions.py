"""Weights that a code does not tell: where they are, and what they are."""

import torch

from .chunks import row_chunks

_EXCEPTION_BYTES = 24  # of what is made on the way
# Moving a float16 may make another NaN of a NaN, and on a CPU torch scatters such numbers a thousand times as slowly as bits.
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def write_exceptions(positions: torch.Tensor, exceptions: torch.Tensor, parameter: torch.Tensor) -> None:
    """`exceptions` [X] at the `positions` [X] int32 of `parameter`, contiguous. Positions that damage has moved out of the
    parameter are taken for its first or last."""
    bits, last = _BITS[parameter.itemsize], parameter.numel() - 1
    weights = parameter.view(-1).view(bits)
    for which in row_chunks(positions.numel(), _EXCEPTION_BYTES, device_type=parameter.device.type):
        places = positions[which].long().clamp_(0, last)
        weights.scatter_(0, places, exceptions[which].to(parameter.dtype).view(bits))
