"""Loops over the fields of residual_layout.py: how wide they have to be, how they are written and read. Imports numba.

Numbers are bits of bfloat16, or of float16 where `is_half`, flat; they begin with a block, at place `start` in the matrix of
`num_columns`. `codes` are theirs, one a byte; `scale`, as bits, and `zero` are those of the whole matrix, [N, G].
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

import numpy as np

from .loops import loop
from .residual_layout import BLOCK, MAX_WIDTH

NO_WIDTH = MAX_WIDTH + 1  # is enough


@loop
def _near(steps, scale, is_half):
    """Bits of `steps` times the scale, a number of bfloat16 given as bits; neither is below 0."""
    value = np.float32(np.float32(steps) * np.uint32(np.uint32(scale) << np.uint32(16)).view(np.float32))
    bits = value.view(np.uint32)
    if not is_half:
        return np.int32((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
    if value < np.float32(2**-14):  # no normal number of float16: a sum beside 0.5 rounds to its spacing
        return np.int32(np.float32(value + np.float32(0.5)).view(np.uint32) - np.uint32(0x3F000000))
    near = (bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))) >> np.uint32(13)
    return min(np.int32(near) - np.int32(112 << 10), np.int32(0x7C00))


@loop
def _bit_length(value):
    """Of one of at most 16 bits."""
    return np.int32(np.float32(value).view(np.uint32) >> np.uint32(23)) - np.int32(126) if value > 0 else np.int32(0)


@loop
def _width_of(number, steps, near):
    """Bits that its field needs, NO_WIDTH where no field tells it."""
    size, is_negative = np.int32(number & 0x7FFF), number >= 0x8000
    if steps == 0:
        below = near - size
        if below < 0:
            return np.int32(NO_WIDTH)
        return np.int32(0) if below == 0 and not is_negative else _bit_length(below) + np.int32(1)
    if is_negative != (steps < 0):
        return np.int32(NO_WIDTH)
    beyond = size - near
    return np.int32(0) if beyond == 0 else _bit_length(beyond ^ (beyond >> np.int32(31))) + np.int32(1)


@loop
def count_widths(numbers, differs, codes, start, num_columns, group, scale, zero, is_half, needed, steps_of_blocks):
    """`needed` [A, NO_WIDTH + 1]: how many weights of a number of steps need a width, beside what it held. `steps_of_blocks`
    [blocks, A]: how many weights there are of each number of steps. `differs`, empty or [N]: the tensor's is another number."""
    steps_of_blocks[:] = 0
    row, column = start // num_columns, start % num_columns
    for place in range(codes.size):
        number = column // group
        steps = np.int32(codes[place]) - np.int32(zero[row, number])
        many = abs(steps)
        near = _near(np.float32(many) if many > 0 else np.float32(0.5), scale[row, number], is_half)
        width = _width_of(numbers[place], steps, near)
        if differs.size > 0 and differs[place]:
            width = np.int32(NO_WIDTH)
        needed[many, width] += 1
        steps_of_blocks[place // BLOCK, many] += 1
        column += 1
        if column == num_columns:
            row, column = row + 1, 0


@loop
def _mask(width):
    return (np.uint64(1) << np.uint64(width)) - np.uint64(1)


@loop
def write_fields(
    numbers, differs, codes, start, num_columns, group, scale, zero, is_half, widths, words, offset, offsets, places
):
    """Into `words` from `offset` on, the blocks' own `offsets`, and `places` of exceptions within these numbers. (Words, and
    exceptions that there are): what of them finds no room is left out."""
    row, column = start // num_columns, start % num_columns
    word, num_places = offset, 0
    held, num_held = np.uint64(0), 0
    for place in range(codes.size):
        if place % BLOCK == 0:
            offsets[place // BLOCK] = word
        number = column // group
        steps = np.int32(codes[place]) - np.int32(zero[row, number])
        many = abs(steps)
        near = np.int64(_near(np.float32(many) if many > 0 else np.float32(0.5), scale[row, number], is_half))
        width = np.int64(widths[many])
        size, field = np.int64(numbers[place] & 0x7FFF), np.int64(0)
        if _width_of(numbers[place], steps, near) > width or (differs.size > 0 and differs[place]):
            if num_places < places.size:
                places[num_places] = place
            num_places += 1
        elif steps != 0:
            field = size - near
        elif width > 0:
            field = (near - size) | np.int64(numbers[place] >> 15) << (width - 1)
        held |= (np.uint64(field) & _mask(width)) << np.uint64(num_held)
        num_held += width
        is_last = place % BLOCK == BLOCK - 1 or place == codes.size - 1
        while num_held >= 32 or (is_last and num_held > 0):
            if word < words.size:
                words[word] = np.uint32(held & np.uint64(0xFFFFFFFF))
            word += 1
            held >>= np.uint64(32)
            num_held = max(num_held - 32, 0)
        column += 1
        if column == num_columns:
            row, column = row + 1, 0
    return word - offset, num_places


@loop
def read_fields(words, offsets, codes, start, num_columns, group, scale, zero, is_half, widths, numbers):
    """Fills `numbers`. What damage has moved out of `words` or `widths` is taken for their first or last."""
    row, column = start // num_columns, start % num_columns
    last, bit = words.size - 1, 0
    for place in range(codes.size):
        if place % BLOCK == 0:
            bit = min(max(np.int64(offsets[place // BLOCK]), 0), last) * 32
        number = column // group
        steps = np.int32(codes[place]) - np.int32(zero[row, number])
        many = abs(steps)
        width = min(np.int64(widths[min(many, widths.size - 1)]), MAX_WIDTH)
        low, high = np.uint64(words[min(bit >> 5, last)]), np.uint64(words[min((bit >> 5) + 1, last)])
        field = np.int64((low | high << np.uint64(32)) >> np.uint64(bit & 31) & _mask(width))
        bit += width
        near = np.int64(_near(np.float32(many) if many > 0 else np.float32(0.5), scale[row, number], is_half))
        highest = np.int64(1) << width >> 1  # bit of the field
        if steps != 0:
            size, is_negative = near + (field ^ highest) - highest, steps < 0
        else:
            size, is_negative = near - (field & ~highest), field & highest != 0
        numbers[place] = np.uint16(size & 0x7FFF) | np.uint16(0x8000 if is_negative else 0)
        column += 1
        if column == num_columns:
            row, column = row + 1, 0
