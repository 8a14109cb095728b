"""Loops over the weights of a base, as base_layout.py has it: how it is fitted, packed, unpacked and computed. Imports numba.

Weights are numbers of bfloat16, as bits, flat; `start` is the place of the first in the matrix of `num_columns`. `scale` and
`zero` are those of the whole matrix, [N, G], scale as bits.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

import numpy as np

from .loops import inner_loop, inner_sum_loop, loop

MAGIC = np.float32(1.5 * 2**23)
MIDDLE = np.int32(0x4B400000)  # its bits
MOST = np.float32(1e38)
NONE = np.int32(0)
SIZE, INFINITE = np.int16(0x7FFF), np.int16(0x7F80)  # bits of a bfloat16 number without its sign


@inner_loop
def _float_of(bits):
    """Of bfloat16."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@inner_loop
def _bits_of(value):
    """The bfloat16 nearest to a finite float32, or an infinity."""
    bits = np.float32(value).view(np.uint32)
    odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
    return np.uint16(np.uint32(np.uint32(bits + np.uint32(0x7FFF)) + odd) >> np.uint32(16))


@inner_loop
def _inverse(step):
    """Finite."""
    inverse = np.float32(np.float32(1) / step)
    return inverse if inverse < MOST else MOST


@inner_loop
def _limits(numbers):
    """Bits of the largest sizes that are finite: of the numbers below 0, and of the others. In 16 bits, of which most fit."""
    low = high = np.int16(0)
    for place in range(numbers.size):
        number = np.int16(numbers[place])
        size = np.int16(number & SIZE)
        size = size if size < INFINITE else np.int16(0)
        low = max(low, size if number < np.int16(0) else np.int16(0))
        high = max(high, np.int16(0) if number < np.int16(0) else size)
    return low, high


@inner_loop
def _finite(numbers, values):
    """Into float32, those that are not finite as 0."""
    for place in range(values.size):
        bits = np.uint32(numbers[place])
        bits = bits if np.uint32(bits & np.uint32(INFINITE)) != np.uint32(INFINITE) else np.uint32(0)
        values[place] = np.uint32(bits << np.uint32(16)).view(np.float32)


@inner_sum_loop
def _error(values, inverse, zero, top):
    """Sum of squares, in units of the scale."""
    error = np.float32(0)
    for place in range(values.size):
        wanted = np.float32(values[place] * inverse + zero)
        code = min(max(np.int32(wanted + np.float32(0.5)), NONE), top)
        off = np.float32(wanted - np.float32(code))
        error += np.float32(off * off)
    return error


@inner_loop
def _fit_group(values, low, high, top, shrinks):
    """Bits of the scale, and the zero point."""
    widest = np.float32(high / np.float32(top) + low / np.float32(top))
    best, best_zero, least = np.uint16(0), NONE, np.float32(np.inf)
    for shrink in shrinks:
        bits = _bits_of(widest * shrink)
        step = _float_of(bits)
        if step == 0:
            break
        inverse = _inverse(step)
        zero = min(np.int32(np.float32(low * shrink * inverse) + np.float32(0.5)), top)
        relative = np.float32(step / widest)
        error = np.float32(_error(values, inverse, np.float32(zero), top) * relative * relative)
        if error < least:
            best, best_zero, least = bits, zero, error
    return best, best_zero


@loop
def fit_rows(numbers, num_columns, group, top, shrinks, scale, zero):
    """Of whole rows, whose `scale` and `zero` these are: of the ranges that `shrinks` [S] float32, from 1 down, make of that of
    a group's values, the one of the least squared error."""
    num_rows, num_groups = scale.shape
    room = np.empty(group, np.float32)
    for row in range(num_rows):
        for number in range(num_groups):
            first, size = row * num_columns + number * group, min(group, num_columns - number * group)
            values = room[:size]
            low, high = _limits(numbers[first : first + size])
            _finite(numbers[first : first + size], values)
            found, of_zero = _fit_group(values, _float_of(low), _float_of(high), np.int32(top), shrinks)
            scale[row, number], zero[row, number] = found, np.uint8(of_zero)


@inner_loop
def _nearest_codes(numbers, inverse, zero, top, codes):
    """A float32 beside MAGIC has no fraction: adding it rounds to the nearest integer, ties to even. Bits of floats grow with
    them, so what is far away is cut off as an integer; of a NaN comes some code."""
    least = np.int32(MIDDLE - zero)
    most = np.int32(least + top)
    for place in range(codes.size):
        value = np.uint32(np.uint32(numbers[place]) << np.uint32(16)).view(np.float32)
        beside = np.float32(np.float32(value * inverse) + MAGIC).view(np.int32)
        codes[place] = np.uint8(np.int32(min(max(beside, least), most) - least))


@loop
def choose_codes(numbers, start, num_columns, group, top, scale, zero, codes):
    """The nearest code of each weight; of a NaN, some code."""
    row, column = start // num_columns, start % num_columns
    done = 0
    while done < codes.size:
        number = column // group
        size = min(min((number + 1) * group, num_columns) - column, codes.size - done)
        step = _float_of(scale[row, number])
        if step == 0:
            codes[done : done + size] = zero[row, number]
        else:
            of_zero = np.int32(zero[row, number])
            _nearest_codes(numbers[done : done + size], _inverse(step), of_zero, np.int32(top), codes[done : done + size])
        done += size
        column += size
        if column == num_columns:
            row, column = row + 1, 0


@loop
def pack_rows(codes, num_columns, bits, packed):
    """Of whole rows: `codes` [N * K] uint8 into `packed` [N, ceil(K bits / 8)]."""
    for row in range(packed.shape[0]):
        _pack_row(codes[row * num_columns : (row + 1) * num_columns], bits, packed[row])


@inner_loop
def _pack_row(codes, bits, packed):
    if bits == 8:
        for place in range(codes.size):
            packed[place] = codes[place]
        return
    whole = codes.size // 8 * 8  # eight codes are whole bytes
    if bits == 4:
        _pack_fours(codes[:whole], packed)
    elif bits == 3:
        _pack_threes(codes[:whole], packed)
    for place in range(whole * bits // 8, packed.size):
        packed[place] = 0
    for place in range(whole, codes.size):
        first = place * bits
        shifted = np.uint32(codes[place]) << np.uint32(first % 8)
        packed[first // 8] |= np.uint8(shifted & np.uint32(0xFF))
        if first % 8 + bits > 8:
            packed[first // 8 + 1] |= np.uint8(shifted >> np.uint32(8))


@inner_loop
def _pack_fours(codes, packed):
    for pair in range(codes.size // 2):
        packed[pair] = np.uint8(codes[2 * pair] | np.uint8(codes[2 * pair + 1] << np.uint8(4)))


@inner_loop
def _pack_threes(codes, packed):
    for part in range(codes.size // 8):
        held = np.uint32(0)
        for place in range(8):
            held |= np.uint32(codes[8 * part + place]) << np.uint32(3 * place)
        for byte in range(3):
            packed[3 * part + byte] = np.uint8(held >> np.uint32(8 * byte) & np.uint32(0xFF))


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


@inner_loop
def _unpack_row(packed, column, bits, codes):
    if bits == 8:
        bytes_there = packed[column : column + codes.size]
        for place in range(codes.size):
            codes[place] = bytes_there[place]
        return
    ahead = min(-column % 8, codes.size)  # of whole bytes
    whole = (codes.size - ahead) // 8 * 8 if bits == 3 or bits == 4 else 0
    if bits == 4:
        _unpack_fours(packed[(column + ahead) // 2 :], codes[ahead : ahead + whole])
    elif bits == 3:
        _unpack_threes(packed[(column + ahead) // 8 * 3 :], codes[ahead : ahead + whole])
    for part in range(2):
        for place in range(ahead if part == 0 else codes.size - ahead - whole):
            place += part * (ahead + whole)
            first = (column + place) * bits
            pair = np.uint32(packed[first // 8])
            if first // 8 + 1 < packed.size:
                pair |= np.uint32(packed[first // 8 + 1]) << np.uint32(8)
            codes[place] = np.uint8(pair >> np.uint32(first % 8) & np.uint32((1 << bits) - 1))


@inner_loop
def _unpack_fours(packed, codes):
    for pair in range(codes.size // 2):
        codes[2 * pair] = packed[pair] & np.uint8(15)
        codes[2 * pair + 1] = np.uint8(packed[pair] >> np.uint8(4))


@inner_loop
def _unpack_threes(packed, codes):
    for part in range(codes.size // 8):
        held = np.uint32(packed[3 * part]) | np.uint32(packed[3 * part + 1]) << np.uint32(8)
        held |= np.uint32(packed[3 * part + 2]) << np.uint32(16)
        for place in range(8):
            codes[8 * part + place] = np.uint8(held >> np.uint32(3 * place) & np.uint32(7))


@inner_loop
def _values(codes, zero, step, values):
    for place in range(values.size):
        values[place] = np.float32(np.float32(np.int32(np.int32(codes[place]) - zero)) * step)


@inner_loop
def _near_values(codes, zero, step, bits):
    """The same, as bits of bfloat16."""
    for place in range(bits.size):
        value = np.float32(np.float32(np.int32(np.int32(codes[place]) - zero)) * step)
        bits[place] = _bits_of(value)


@loop
def compute_rows(packed, scale, zero, num_columns, group, bits, as_bits, values):
    """k s of whole rows, into `values` [N * K]: float32, or bits of bfloat16 if `as_bits`. Each loop inside is over arrays from
    their beginning, which is what compilers make vector instructions of: a quarter of the time."""
    num_rows, num_groups = scale.shape
    codes = np.empty(num_columns, np.uint8)
    for row in range(num_rows):
        _unpack_row(packed[row], 0, bits, codes)
        into = values[row * num_columns : (row + 1) * num_columns]
        for number in range(num_groups):
            first, end = number * group, min(number * group + group, num_columns)
            step, of_zero = _float_of(scale[row, number]), np.int32(zero[row, number])
            if as_bits:
                _near_values(codes[first:end], of_zero, step, into[first:end])
            else:
                _values(codes[first:end], of_zero, step, into[first:end])
