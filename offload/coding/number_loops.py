"""Loops that convert bits of 16-bit numbers, as torch and numpy convert the numbers, at their memory's speed. Imports numba."""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

import numpy as np

from .loops import inner_loop, loop

SIGN, SIZE = np.uint32(0x8000), np.uint32(0x7FFF)  # of bits
LEAST_HALF = np.uint32(0x400)  # that is a normal number, and 2**-14
INFINITE_HALF, INFINITE_BFLOAT = np.uint32(0x7C00), np.uint32(0x7F80)
EXPONENTS = np.uint32(127 - 15)  # between those of float32 and of float16


@loop
def widen_bfloats(bits, values):
    """Into bits of float32."""
    for place in range(bits.size):
        values[place] = np.uint32(np.uint32(bits[place]) << np.uint32(16))


@inner_loop
def _widened(half):
    """Bits of float32, of the size of a float16 number: numbers below the normal ones are so many times 2**-24."""
    shifted = np.uint32(np.uint32(half << np.uint32(13)) + np.uint32(EXPONENTS << np.uint32(23)))
    shifted = np.uint32(shifted + (np.uint32(EXPONENTS << np.uint32(23)) if half >= INFINITE_HALF else np.uint32(0)))
    small = np.float32(np.float32(np.int32(half)) * np.float32(2**-24)).view(np.uint32)
    return small if half < LEAST_HALF else shifted


@loop
def widen_halves(bits, values):
    """Into bits of float32."""
    for place in range(bits.size):
        half = np.uint32(bits[place])
        values[place] = np.uint32(_widened(np.uint32(half & SIZE)) | np.uint32(np.uint32(half & SIGN) << np.uint32(16)))


@loop
def halve_bfloats(bits, halves):
    """Into float16, to the nearest, ties to even. Below the normal numbers, a sum beside 0.5 is rounded to their spacing."""
    for place in range(bits.size):
        size = np.uint32(np.uint32(bits[place]) & SIZE)
        exact = np.uint32(np.int32(np.int32(np.uint32(size << np.uint32(3))) - np.int32(EXPONENTS << np.uint32(10))))
        small = np.float32(np.uint32(size << np.uint32(16)).view(np.float32) + np.float32(0.5))
        half = np.uint32(small.view(np.uint32) - np.uint32(0x3F000000)) if size < np.uint32(0x3880) else exact
        half = INFINITE_HALF if size >= np.uint32(0x4780) else half  # 2**16
        half = np.uint32(0x7E00) if size > INFINITE_BFLOAT else half
        halves[place] = np.uint16(half | np.uint32(np.uint32(bits[place]) & SIGN))


@loop
def cut_halves(halves, bits, differs):
    """Into bfloat16, cut off where it is too short: that of lossless_numpy.py's cast_halves, and what it says of them."""
    for place in range(halves.size):
        half = np.uint32(halves[place])
        wide = _widened(np.uint32(half & SIZE))
        bits[place] = np.uint16(np.uint32(wide >> np.uint32(16)) | np.uint32(half & SIGN))
        differs[place] = np.uint32(wide & np.uint32(0xFFFF)) != np.uint32(0) or np.uint32(half & SIZE) > INFINITE_HALF
