"""Weights that a code does not tell: where they are, and what they are."""

import torch

from .chunks import row_chunks

_EXCEPTION_BYTES = 16  # of what is made on the way


def write_exceptions(positions: torch.Tensor, exceptions: torch.Tensor, parameter: torch.Tensor) -> None:
    """`exceptions` [X] at the `positions` [X] int32 of `parameter`, contiguous. Positions that damage has moved out of the
    parameter are taken for its first or last."""
    weights, last = parameter.view(-1), parameter.numel() - 1
    if weights.dtype == exceptions.dtype:  # as bits, since moving a float16 may make another NaN of a NaN
        weights, exceptions = weights.view(torch.int16), exceptions.view(torch.int16)
    for which in row_chunks(positions.numel(), _EXCEPTION_BYTES, device_type=parameter.device.type):
        places = positions[which].long().clamp_(0, last)
        weights.scatter_(0, places, exceptions[which].to(weights.dtype))
