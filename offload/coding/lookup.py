"""Values of eight or four bits by a table of all that there are: quicker than arithmetic on a processor, and as exact."""

import torch


def look_up(codes: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`codes` of bytes, as what `values` has for each of the 256."""
    return values.index_select(0, codes.flatten().to(torch.int32)).view(codes.shape)


def look_up_pairs(packed: torch.Tensor, values: torch.Tensor, *, high_first: bool = False) -> torch.Tensor:
    """[..., n] bytes of two codes as [..., 2 n] of what `values`, 16 of float32, has for each. The first code is in the low
    half of its byte, or the high one."""
    byte = torch.arange(256, device=packed.device)
    low, high = values[byte & 15], values[byte >> 4]
    pairs = torch.stack((high, low) if high_first else (low, high), -1)  # [256, 2]
    return look_up(packed, pairs.view(torch.int64).flatten()).view(torch.float32)  # two at once
