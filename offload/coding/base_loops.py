"""Loops over the weights of a base, as base_layout.py has it: how it is fitted, packed, unpacked and computed. Imports numba.

Weights are numbers of bfloat16, as bits, flat; `start` is the place of the first in the matrix of `num_columns`. `scale` and
`zero` are those of the whole matrix, [N, G], scale as bits.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

import numpy as np

from .loops import loop, sum_loop

_MAGIC = np.float32(1.5 * 2**23)  # a float32 beside it has no fraction: adding it rounds to the nearest integer, ties to even
_FAR = np.float32(2**12)  # beyond every code


@loop
def _float_of(bits):
    """Of bfloat16."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@loop
def _bits_of(value):
    """The bfloat16 nearest to a finite float32, or an infinity."""
    bits = np.float32(value).view(np.uint32)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@loop
def _finite(numbers, start, values):
    """Into float32; those that are not finite are taken for 0."""
    for place in range(values.size):
        bits = np.uint32(numbers[start + place]) << np.uint32(16)
        if bits & np.uint32(0x7F800000) == np.uint32(0x7F800000):
            bits = np.uint32(0)
        values[place] = np.uint32(bits).view(np.float32)


@sum_loop
def _limits(values):
    """Of a range that 0 lies in."""
    low = high = np.float32(0)
    for value in values:
        low = min(low, value)
        high = max(high, value)
    return low, high


@sum_loop
def _error(values, inverse, zero, top):
    """Sum of squares, in units of the scale."""
    error = np.float32(0)
    for value in values:
        wanted = value * inverse + zero
        code = np.float32(np.int32(min(max(wanted, np.float32(0)), top) + np.float32(0.5)))
        error += (wanted - code) * (wanted - code)
    return error


@loop
def fit_rows(numbers, num_columns, group, top, shrinks, scale, zero):
    """Of whole rows, whose `scale` and `zero` these are: of the ranges that `shrinks` [S] float32, from 1 down, make of that of
    a group's values, the one of the least squared error."""
    num_rows, num_groups = scale.shape
    room = np.empty(group, np.float32)
    for row in range(num_rows):
        for number in range(num_groups):
            first = number * group
            values = room[: min(group, num_columns - first)]
            _finite(numbers, row * num_columns + first, values)
            low, high = _limits(values)
            widest = high / np.float32(top) - low / np.float32(top)
            least = np.float32(np.inf)
            scale[row, number] = 0
            zero[row, number] = 0
            for shrink in shrinks:
                bits = _bits_of(widest * shrink)
                step = _float_of(bits)
                if step == 0:
                    break
                inverse = np.float32(1) / step
                if inverse > np.float32(1e38):  # of what no group of a trained matrix has
                    inverse = np.float32(1e38)
                place = np.rint(-low * shrink * inverse)
                place = min(max(place, np.float32(0)), np.float32(top))
                relative = step / widest
                error = _error(values, inverse, place, np.float32(top)) * relative * relative
                if error < least:
                    least = error
                    scale[row, number] = bits
                    zero[row, number] = np.uint8(place)


@loop
def _nearest_codes(numbers, first, step, zero, top, codes):
    for place in range(codes.size):
        bits = np.uint32(numbers[first + place]) << np.uint32(16)
        if bits & np.uint32(0x7F800000) == np.uint32(0x7F800000):
            bits = np.uint32(0)
        steps = min(max(np.uint32(bits).view(np.float32) / step, -_FAR), _FAR)
        code = (steps + _MAGIC) - _MAGIC + zero
        codes[place] = np.uint8(np.int32(min(max(code, np.float32(0)), top)))


@loop
def choose_codes(numbers, start, num_columns, group, top, scale, zero, codes):
    """The nearest code of each weight; of what is not finite, that of 0."""
    row, column = start // num_columns, start % num_columns
    done = 0
    while done < codes.size:
        number = column // group
        size = min(min((number + 1) * group, num_columns) - column, codes.size - done)
        step = _float_of(scale[row, number])
        if step == 0:
            codes[done : done + size] = zero[row, number]
        else:
            of_zero = np.float32(zero[row, number])
            _nearest_codes(numbers, done, step, of_zero, np.float32(top), codes[done : done + size])
        done += size
        column += size
        if column == num_columns:
            row, column = row + 1, 0


@loop
def pack_rows(codes, num_columns, bits, packed):
    """Of whole rows: `codes` [N * K] uint8 into `packed` [N, ceil(K bits / 8)]."""
    for row in range(packed.shape[0]):
        first = row * num_columns
        if bits == 8:
            packed[row] = codes[first : first + num_columns]
        elif bits == 4:
            for pair in range(num_columns // 2):
                packed[row, pair] = codes[first + 2 * pair] | codes[first + 2 * pair + 1] << np.uint8(4)
            if num_columns % 2:
                packed[row, num_columns // 2] = codes[first + num_columns - 1]
        else:
            held, num_held, byte = np.uint32(0), np.uint32(0), 0
            for column in range(num_columns):
                held |= np.uint32(codes[first + column]) << num_held
                num_held += np.uint32(bits)
                if num_held >= 8:
                    packed[row, byte] = np.uint8(held & np.uint32(0xFF))
                    held >>= np.uint32(8)
                    num_held -= np.uint32(8)
                    byte += 1
            if num_held > 0:
                packed[row, byte] = np.uint8(held & np.uint32(0xFF))


@loop
def unpack(packed, start, num_columns, bits, codes):
    """The codes of the weights from `start` on."""
    row, column = start // num_columns, start % num_columns
    done = 0
    while done < codes.size:
        size = min(num_columns - column, codes.size - done)
        _unpack_row(packed[row], column, bits, codes[done : done + size])
        done += size
        row, column = row + 1, 0


@loop
def _unpack_row(packed, column, bits, codes):
    if bits == 8:
        codes[:] = packed[column : column + codes.size]
        return
    place = 0
    if bits == 4:
        if column % 2:
            codes[0] = packed[column // 2] >> np.uint8(4)
            place = 1
        for _ in range((codes.size - place) // 2):
            byte = packed[(column + place) // 2]
            codes[place] = byte & np.uint8(15)
            codes[place + 1] = byte >> np.uint8(4)
            place += 2
    for rest in range(place, codes.size):
        first = (column + rest) * bits
        pair = np.uint32(packed[first // 8])
        if first // 8 + 1 < packed.size:
            pair |= np.uint32(packed[first // 8 + 1]) << np.uint32(8)
        codes[rest] = np.uint8(pair >> np.uint32(first % 8) & np.uint32((1 << bits) - 1))


@loop
def _row_of_four_bits(packed, codes):
    for pair in range(codes.size // 2):
        byte = packed[pair]
        codes[2 * pair] = byte & np.uint8(15)
        codes[2 * pair + 1] = byte >> np.uint8(4)
    if codes.size % 2:
        codes[codes.size - 1] = packed[codes.size // 2] & np.uint8(15)


@loop
def _row_of_three_bits(packed, codes):
    """Eight codes at a time, of three bytes."""
    whole = codes.size // 8
    for unit in range(whole):
        low, middle, high = np.uint32(packed[3 * unit]), np.uint32(packed[3 * unit + 1]), np.uint32(packed[3 * unit + 2])
        together = low | middle << np.uint32(8) | high << np.uint32(16)
        for place in range(8):
            codes[8 * unit + place] = np.uint8(together >> np.uint32(3 * place) & np.uint32(7))
    _unpack_row(packed, 8 * whole, 3, codes[8 * whole :])


@loop
def _numbers(codes, zero, step, values):
    for place in range(values.size):
        values[place] = np.float32(np.int32(np.int32(codes[place]) - zero)) * step


@loop
def _numbers_as_bits(codes, zero, step, values):
    for place in range(values.size):
        values[place] = _bits_of(np.float32(np.int32(np.int32(codes[place]) - zero)) * step)


@loop
def compute_rows(packed, scale, zero, num_columns, group, bits, as_bits, values):
    """k s of whole rows, into `values` [N * K]: float32, or bits of bfloat16 if `as_bits`. Each loop inside is over one array
    from its beginning, which is what compilers make vector instructions of: a quarter of the time."""
    num_rows, num_groups = scale.shape
    codes = np.empty(num_columns, np.uint8)
    for row in range(num_rows):
        if bits == 8:
            codes = packed[row]
        elif bits == 4:
            _row_of_four_bits(packed[row], codes)
        elif bits == 3:
            _row_of_three_bits(packed[row], codes)
        else:
            _unpack_row(packed[row], 0, bits, codes)
        for number in range(num_groups):
            first, last = number * group, min((number + 1) * group, num_columns)
            step, of_zero = _float_of(scale[row, number]), np.int32(zero[row, number])
            into = values[row * num_columns + first : row * num_columns + last]
            if as_bits:
                _numbers_as_bits(codes[first:last], of_zero, step, into)
            else:
                _numbers(codes[first:last], of_zero, step, into)
