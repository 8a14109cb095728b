"""The code of lossless_layout.py on a CPU, a few blocks at a time. Escapes are found where they are: looking for one at every
weight takes several times as long."""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from .lossless_layout import BLOCK, CODE_BITS, ESCAPE

Bytes = NDArray[np.uint8]
Bits = NDArray[np.uint16]  # of bfloat16 numbers

CHUNK_BLOCKS: Final = 256  # coded at a time: threads that took fewer would wait for each other more than compute
_ESCAPES: Final = np.full(CHUNK_BLOCKS * BLOCK, ESCAPE, np.uint8)  # numpy is quick to compare arrays, and slow with a scalar


@dataclass(frozen=True, slots=True)
class Codes:
    """Of some weights, unpacked: `distances` [N] from the base, and the weights that have an escape, ascending."""

    distances: Bytes
    escaped: NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Cast:
    """float16 numbers as bfloat16; where `differs` [N], they are others, or not those of every device."""

    bits: Bits
    differs: NDArray[np.bool_]


def cast_halves(halves: Bits) -> Cast:
    """Of the bits of float16 numbers, cut off where bfloat16 is too short. In integers, as numpy converts halves one by one."""
    magnitudes = halves & 0x7FFF
    bits: Bits = np.right_shift(magnitudes, 3)
    bits += (127 - 15) << 7  # the exponents' biases
    bits |= halves & 0x8000
    differs = (halves & 7) != 0
    magnitudes -= 0x400  # what is no normal number wraps around, or is infinite, or NaN
    special = np.flatnonzero(magnitudes >= 0x7C00 - 0x400)
    if special.size:
        wide = halves[special].view(np.float16).astype(np.float32)
        words = wide.view(np.uint32)
        bits[special] = words >> 16
        differs[special] = np.isnan(wide) | ((words & 0xFFFF) != 0)  # NaN: its payload survives no conversion for certain
    return Cast(bits=bits, differs=differs)


def exponents_of(bits: Bits) -> Bytes:
    return (bits >> 7).astype(np.uint8)  # the sign, in bit 8, is cut off


def write_low_bytes(bits: Bits, low_bytes: Bytes) -> None:
    signs = bits & 0x807F
    signs |= signs >> 8
    low_bytes[...] = signs  # the lower half: 0x80 from above, 0x7f from below


def write_codes(exponents: Bytes, base: int, codes: Bytes) -> None:
    """`codes` [3, ceil(N/8)] of at most CHUNK_BLOCKS blocks."""
    distances = exponents - np.uint8(base)  # below the base: wraps around to more than 7
    np.minimum(distances, _ESCAPES[: distances.size], out=distances)
    for bit in range(CODE_BITS):
        codes[bit] = np.packbits(distances & np.uint8(1 << bit), bitorder="little")


def read_codes(codes: Bytes, num_weights: int) -> Codes:
    """Eight distances are shifted as one word: no bit leaves its byte."""
    words = np.unpackbits(codes[0], bitorder="little").view(np.uint64)
    for bit in range(1, CODE_BITS):
        words |= np.unpackbits(codes[bit], bitorder="little").view(np.uint64) << np.uint64(bit)
    distances = words.view(np.uint8)[:num_weights]
    return Codes(distances=distances, escaped=np.flatnonzero(distances == ESCAPE))


def join(low_bytes: Bytes, codes: Codes, base: int, escapes: Bytes, first_escape: int) -> Bits:
    """Weights of which the first escape is `escapes[first_escape]`; overwrites the codes. Escapes that damage has moved out of
    `escapes` are taken for its last."""
    exponents = codes.distances
    exponents += np.uint8(base)
    which = np.arange(first_escape, first_escape + codes.escaped.size)
    exponents[codes.escaped] = escapes.take(which, mode="clip")
    bits = exponents.astype(np.uint16)
    bits <<= 7
    signs = low_bytes.astype(np.uint16)
    signs *= 0x101  # the byte, twice
    signs &= 0x807F
    bits |= signs
    return bits
