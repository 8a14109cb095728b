"""Blocks of GGUF tensors in plain torch: uint8 [B, bytes of a block] -> float32 [B, weights of a block].

The product of scales and integer fits the 24 bits of a float32 in every type, so that a value is rounded once at most and
no order of the operations changes it. Sources: ggml's ggml-common.h (layouts) and ggml-quants.c (dequantize_row_*), the
ONNX specification of the same blocks, and for MXFP4 the OCP Microscaling Formats specification 1.0.
"""

from collections.abc import Callable
from functools import cache
from typing import Final

import torch

# Which weight a nibble of IQ4_NL and IQ4_XS stands for, and of MXFP4, doubled; ggml has no negative zero there.
IQ4_VALUES: Final = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1_DOUBLED: Final = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def q8_0(blocks: torch.Tensor) -> torch.Tensor:
    """scale f16, 32 x int8."""
    return blocks[:, 2:].view(torch.int8).float().mul_(_half(blocks, 0))


def q4_0(blocks: torch.Tensor) -> torch.Tensor:
    """scale f16, nibbles of 32 weights, 8 more than they are: the low ones first."""
    return _planes(blocks[:, 2:], 16, 4).float().sub_(8).mul_(_half(blocks, 0))


def q4_1(blocks: torch.Tensor) -> torch.Tensor:
    """scale f16, minimum f16, nibbles."""
    return _planes(blocks[:, 4:], 16, 4).float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def q5_0(blocks: torch.Tensor) -> torch.Tensor:
    """scale f16, the fifth bits of 32 weights, nibbles; 16 more than they are."""
    fifths = _planes(blocks[:, 2:6], 1, 1) << 4
    return fifths.bitwise_or_(_planes(blocks[:, 6:], 16, 4)).float().sub_(16).mul_(_half(blocks, 0))


def q5_1(blocks: torch.Tensor) -> torch.Tensor:
    """scale f16, minimum f16, fifth bits, nibbles."""
    fifths = _planes(blocks[:, 4:8], 1, 1) << 4
    return fifths.bitwise_or_(_planes(blocks[:, 8:], 16, 4)).float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def iq4_nl(blocks: torch.Tensor) -> torch.Tensor:
    """scale f16, nibbles that are places in a table."""
    return _looked_up(IQ4_VALUES, _planes(blocks[:, 2:], 16, 4)).mul_(_half(blocks, 0))


def mxfp4(blocks: torch.Tensor) -> torch.Tensor:
    """exponent e8m0, nibbles e2m1. 255 is 2**127 here, not a NaN as in the specification: so ggml has it."""
    exponents = blocks[:, :1].int()
    small = torch.full_like(exponents, 0x00200000) << exponents.clamp(max=1)  # 2**-128 and 2**-127, which are subnormal
    scales = torch.where(exponents < 2, small, (exponents - 1) << 23).view(torch.float32)
    return _looked_up(E2M1_DOUBLED, _planes(blocks[:, 1:], 16, 4)).mul_(scales)


def q2_k(blocks: torch.Tensor) -> torch.Tensor:
    """16 x (scale, minimum) in nibbles, 256 x 2 bits, scale and minimum f16 of these."""
    scales = _half(blocks, 80) * (blocks[:, :16] & 15).float()
    minima = _half(blocks, 82) * (blocks[:, :16] >> 4).float()
    return _scaled(_planes(blocks[:, 16:80], 32, 2).float(), scales, minima)


def q3_k(blocks: torch.Tensor) -> torch.Tensor:
    """third bits, 256 x 2 bits, 16 x scale of 6 bits, scale f16. Weights are 4 and scales 32 more than they are."""
    packed = blocks[:, 96:108]
    scales = _planes(packed[:, :8], 8, 4) | _planes(packed[:, 8:], 4, 2) << 4
    thirds = _planes(blocks[:, :32], 32, 1) << 2
    weights = thirds.bitwise_or_(_planes(blocks[:, 32:96], 32, 2)).float().sub_(4)
    return _scaled(weights, _half(blocks, 108) * scales.float().sub_(32))


def q4_k(blocks: torch.Tensor) -> torch.Tensor:
    """scale f16, minimum f16, 8 x (scale, minimum) of 6 bits, nibbles."""
    scales, minima = _scales_and_minima(blocks)
    return _scaled(_planes(blocks[:, 16:], 32, 4).float(), scales, minima)


def q5_k(blocks: torch.Tensor) -> torch.Tensor:
    """As Q4_K, with the fifth bits in front of the nibbles."""
    scales, minima = _scales_and_minima(blocks)
    fifths = _planes(blocks[:, 16:48], 32, 1) << 4
    return _scaled(fifths.bitwise_or_(_planes(blocks[:, 48:], 32, 4)).float(), scales, minima)


def q6_k(blocks: torch.Tensor) -> torch.Tensor:
    """nibbles, 256 x 2 higher bits, 16 x scale int8, scale f16. Weights are 32 more than they are."""
    highs = _planes(blocks[:, 128:192], 32, 2) << 4
    weights = highs.bitwise_or_(_planes(blocks[:, :128], 64, 4)).float().sub_(32)
    return _scaled(weights, _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float())


def iq4_xs(blocks: torch.Tensor) -> torch.Tensor:
    """scale f16, 8 x scale of 6 bits (the highest two of all, then the rest), nibbles as in IQ4_NL. Scales are 32 more."""
    scales = _planes(blocks[:, 4:8], 1, 4) | _planes(blocks[:, 2:4], 1, 2) << 4
    weights = _looked_up(IQ4_VALUES, _planes(blocks[:, 8:], 16, 4))
    return _scaled(weights, _half(blocks, 0) * scales.float().sub_(32))


BLOCK_DECODERS: Final[dict[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "Q8_0": q8_0,
    "Q4_0": q4_0,
    "Q4_1": q4_1,
    "Q5_0": q5_0,
    "Q5_1": q5_1,
    "Q2_K": q2_k,
    "Q3_K": q3_k,
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
    "IQ4_NL": iq4_nl,
    "IQ4_XS": iq4_xs,
    "MXFP4": mxfp4,
}


def _half(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The float16 at byte `start` of each block, float32 [B, 1]."""
    return blocks[:, start : start + 2].clone(memory_format=torch.contiguous_format).view(torch.float16).float()


def _planes(packed: torch.Tensor, group: int, num_bits: int) -> torch.Tensor:
    """Integers of `num_bits` out of bytes [B, n], uint8 [B, n * 8 / num_bits]: of each `group` bytes the lowest bits first."""
    shifts = torch.arange(0, 8, num_bits, dtype=torch.uint8, device=packed.device)
    planes = packed.unflatten(1, (-1, 1, group)) >> shifts[:, None]  # [B, n / group, 8 / num_bits, group]
    return torch.flatten(planes.bitwise_and_(2**num_bits - 1), 1)


def _scales_and_minima(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a Q4_K or Q5_K block, float32 [B, 8] each. Their 12 bytes: six bits of scales 0 to 3, of minima 0 to 3, then the low
    nibbles of scales and minima 4 to 7, whose highest two bits are those of the first eight bytes."""
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((first & 63, (third & 15) | (first >> 6) << 4), dim=1)
    minima = torch.cat((second & 63, (third >> 4) | (second >> 6) << 4), dim=1)
    return _half(blocks, 0) * scales.float(), _half(blocks, 2) * minima.float()


def _scaled(weights: torch.Tensor, scales: torch.Tensor, minima: torch.Tensor | None = None) -> torch.Tensor:
    """`weights` [B, n] times the scale of their group, less its minimum, in place; these are [B, groups]."""
    groups = weights.unflatten(1, (scales.shape[1], -1))
    groups.mul_(scales[:, :, None])
    if minima is not None:
        groups.sub_(minima[:, :, None])
    return weights


def _looked_up(values: tuple[int, ...], places: torch.Tensor) -> torch.Tensor:
    return _table(values, places.device).index_select(0, places.flatten().int()).view(places.shape)


@cache  # made anew, it would be copied to the device each time, and the host would wait
def _table(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)
