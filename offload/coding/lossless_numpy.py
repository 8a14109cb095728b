"""The code of lossless_layout.py on a CPU, a few blocks at a time. Escapes are found where they are: looking for one at every
weight takes several times as long."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from .lossless_layout import BLOCK, CODE_BITS, ESCAPE, NUM_CODES

Bytes = NDArray[np.uint8]
Bits = NDArray[np.uint16]  # of bfloat16 numbers

CHUNK_BLOCKS: Final = 32  # taken at a time: with what is made of them they fit a core's cache


def exponents_of(bits: Bits) -> Bytes:
    return (bits >> 7).astype(np.uint8)  # the sign, in bit 8, is cut off


def encode_blocks(bits: Bits, base: int, low_bytes: Bytes, codes: Bytes) -> tuple[Bytes, NDArray[np.intp]]:
    """Writes `low_bytes` and `codes` [3, ceil(N/8)] of whole blocks, the last of which may be short. Returns the exponents that
    have no code, in order, and how many of them lie in front of each block."""
    signs = bits & 0x807F
    signs |= signs >> 8
    low_bytes[...] = signs  # the lower half: 0x80 from above, 0x7f from below
    distances = exponents_of(bits)
    distances -= np.uint8(base)  # of an exponent below the base: wraps around to more than 7
    escaped = np.flatnonzero(distances >= NUM_CODES)
    escapes = distances.take(escaped) + np.uint8(base)
    distances[escaped] = ESCAPE
    for bit in range(CODE_BITS):
        codes[bit] = np.packbits(distances & np.uint8(1 << bit), bitorder="little")
    return escapes, np.searchsorted(escaped, np.arange(0, bits.size, BLOCK))


def decode_blocks(low_bytes: Bytes, codes: Bytes, base: int, escapes: Bytes, first_escape: int) -> Bits:
    """Weights whose first escape is `escapes[first_escape]`. Escapes that damage has moved out are taken for the last one."""
    exponents = _distances(codes)[: low_bytes.size]
    escaped = np.flatnonzero(exponents == ESCAPE)
    exponents += np.uint8(base)
    exponents[escaped] = escapes.take(np.arange(first_escape, first_escape + escaped.size), mode="clip")
    bits = exponents.astype(np.uint16)
    bits <<= 7
    signs = low_bytes.astype(np.uint16)
    signs *= 0x101  # the byte, twice
    signs &= 0x807F
    bits |= signs
    return bits


def _distances(codes: Bytes) -> Bytes:
    """[8 * codes.shape[1]] of 0 to 7. Eight of them are shifted as one word: no bit leaves its byte."""
    words = np.unpackbits(codes[0], bitorder="little").view(np.uint64)
    for bit in range(1, CODE_BITS):
        words |= np.unpackbits(codes[bit], bitorder="little").view(np.uint64) << np.uint64(bit)
    return words.view(np.uint8)
