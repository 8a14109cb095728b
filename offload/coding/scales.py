"""Scales: numbers that multiply weights. What they are in float32, and whether they are numbers at all."""

from typing import Final

import torch

# A byte b that means 2**(b - 127), 255 NaN: the E8M0 of OCP's Microscaling Formats (MX) 1.0. torch has it since 2.7, and files
# have it as plain bytes, too.
POWERS: Final = frozenset({torch.uint8, getattr(torch, "float8_e8m0fnu", torch.uint8)})
NUMBERS: Final = frozenset({torch.float32, torch.float16, torch.bfloat16})  # scales that are stored as what they are
FP8: Final = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})


def stored_scale(scale: torch.Tensor) -> torch.Tensor:
    """Powers of two as their bytes, which torch picks rows of on every device; others as they are."""
    return scale.view(torch.uint8) if scale.dtype in POWERS else scale


def scale_values(scale: torch.Tensor) -> torch.Tensor:
    """In float32, exactly; bytes are powers of two."""
    if scale.dtype not in POWERS:
        return scale.to(torch.float32)
    exponent = stored_scale(scale).to(torch.int32)
    bits = (exponent << 23).clamp_(min=0x00400000)  # of 2**-127, the only one that is subnormal
    return bits.masked_fill_(exponent == 255, 0x7FC00000).view(torch.float32)


def bad_scale(name: str, tensor: torch.Tensor) -> str | None:
    """What is wrong with the values of the scale `name`, as one sentence; None where all are finite. Looks at a tensor in host
    memory, of any dtype that scales have."""
    if tensor.dtype in POWERS:
        num_bad = int((tensor.view(torch.uint8) == 255).sum())
    else:
        values = tensor.to(torch.float16) if tensor.dtype in FP8 else tensor  # torch asks no FP8 whether it is finite
        num_bad = values.numel() - int(values.isfinite().sum())
    if not num_bad:
        return None
    return f"tensor {name!a} multiplies weights, and {num_bad:,} of its {tensor.numel():,} values are not finite"
