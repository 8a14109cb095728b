"""Loops over the fields of residual_layout.py: how wide they have to be, how they are written and read. Imports numba.

Numbers are bits of bfloat16, or of float16, flat; they begin with a block, at place `start` in the matrix. `codes` are theirs,
one a byte. `matrix` is (columns, those of a group, the largest |k| as int32, scale [N, G] as bits, zero [N, G], whether the
numbers are float16). `widths` [256] are those of every byte, MAX_WIDTH at most.

A block is worked on in steps, each a loop over its weights: what depends on the field in front of it is then a few
instructions, and the rest is done for many weights at a time. Integers are cut to 32 bits wherever numba would widen them, for
the same reason.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

import numpy as np

from .loops import inner_loop, loop
from .residual_layout import BLOCK, MAX_WIDTH, WORD_BITS

NO_WIDTH = MAX_WIDTH + 1  # is enough
SIZE = np.int32(0x7FFF)  # bits of a number without its sign
# What else is said beside the bits of k s
NEGATIVE, ZERO = np.int32(0x8000), np.int32(0x10000)  # k is
EXCEPTION = np.uint32(1 << 31)  # in place of a field
NONE, ONE, LOWEST = np.int32(0), np.int32(1), np.int32(-(2**31))
LOWER = np.uint64(0xFFFFFFFF)
MOST_WORDS = BLOCK * MAX_WIDTH // WORD_BITS  # of a block, which are pairs of fields


@inner_loop
def _near_bfloat(codes, zero, scale, last, many, near):
    """|k|, `last` at most; and bits of |k| s, of s / 2 for k = 0, with what else is said of k."""
    for place in range(codes.size):
        steps = np.int32(np.int32(codes[place]) - zero)
        size = np.int32(abs(steps))
        value = np.float32(size)
        value = np.float32((value if value > np.float32(0.5) else np.float32(0.5)) * scale)
        bits = value.view(np.uint32)
        odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
        found = np.int32(np.uint32(np.uint32(bits + np.uint32(0x7FFF)) + odd) >> np.uint32(16))
        near[place] = np.int32(found | np.int32(steps >> np.int32(31)) & NEGATIVE) | (ZERO if steps == NONE else NONE)
        many[place] = np.uint8(min(size, last))


@inner_loop
def _near_half(codes, zero, scale, last, many, near):
    """The same, rounded to float16. What is no normal number of it is: a sum beside 0.5 is rounded to its spacing."""
    for place in range(codes.size):
        steps = np.int32(np.int32(codes[place]) - zero)
        size = np.int32(abs(steps))
        value = np.float32(size)
        value = np.float32((value if value > np.float32(0.5) else np.float32(0.5)) * scale)
        bits = value.view(np.uint32)
        odd = np.uint32(np.uint32(bits >> np.uint32(13)) & np.uint32(1))
        normal = np.int32(np.uint32(np.uint32(bits + np.uint32(0xFFF)) + odd) >> np.uint32(13))
        normal = min(np.int32(normal - np.int32(112 << 10)), np.int32(0x7C00))
        small = np.int32(np.uint32(np.float32(value + np.float32(0.5)).view(np.uint32) - np.uint32(0x3F000000)))
        found = small if value < np.float32(2**-14) else normal
        near[place] = np.int32(found | np.int32(steps >> np.int32(31)) & NEGATIVE) | (ZERO if steps == NONE else NONE)
        many[place] = np.uint8(min(size, last))


@inner_loop
def _approach(codes, row, column, matrix, many, near):
    """Of the weights of a block, which begins at this place: |k|, what k s is near, and where the next block begins."""
    num_columns, group, last, scale, zero, is_half = matrix
    done = 0
    while done < codes.size:
        number = column // group
        size = min(min((number + 1) * group, num_columns) - column, codes.size - done)
        of_zero = np.int32(zero[row, number])
        step = np.uint32(np.uint32(scale[row, number]) << np.uint32(16)).view(np.float32)
        end = done + size
        if is_half:
            _near_half(codes[done:end], of_zero, step, last, many[done:end], near[done:end])
        else:
            _near_bfloat(codes[done:end], of_zero, step, last, many[done:end], near[done:end])
        done = end
        column += size
        if column == num_columns:
            row, column = row + 1, 0
    return row, column


@inner_loop
def _mask(many, bit):
    return np.uint8(np.uint8(0) - np.uint8(np.uint8(many >> np.uint8(bit)) & np.uint8(1)))


@inner_loop
def _either(mask, one, other):
    return np.uint8(one ^ np.uint8(np.uint8(one ^ other) & mask))


@inner_loop
def _look_up(many, last, table, widths):
    """The width of each field, and a last one of none, so that they are pairs. Of up to 16, bits of |k| choose."""
    if last < 16:
        a, b, c, d, e, f, g, h = table[0], table[1], table[2], table[3], table[4], table[5], table[6], table[7]
        i, j, k, m, n, o, p, q = table[8], table[9], table[10], table[11], table[12], table[13], table[14], table[15]
        for place in range(many.size):
            lowest, low, high = _mask(many[place], 0), _mask(many[place], 1), _mask(many[place], 2)
            one = _either(low, _either(lowest, a, b), _either(lowest, c, d))
            two = _either(low, _either(lowest, e, f), _either(lowest, g, h))
            three = _either(low, _either(lowest, i, j), _either(lowest, k, m))
            four = _either(low, _either(lowest, n, o), _either(lowest, p, q))
            widths[place] = _either(_mask(many[place], 3), _either(high, one, two), _either(high, three, four))
    else:
        for place in range(many.size):
            widths[place] = table[many[place]]
    if many.size % 2:
        widths[many.size] = 0


@inner_loop
def _needed(numbers, near, needed):
    """Bits that each field needs, NO_WIDTH where none tells the number."""
    for place in range(needed.size):
        number, by = np.int32(numbers[place]), near[place]
        below = np.int32(np.int32(by & SIZE) - np.int32(number & SIZE))
        beyond = np.int32(-below)
        is_zero = np.int32(by & ZERO) != NONE
        far = below if is_zero else np.int32(beyond ^ np.int32(beyond >> np.int32(31)))
        length = np.int32(np.uint32(np.float32(far).view(np.uint32) >> np.uint32(23)))  # an exponent: of far's bits, and 126
        width = np.int32(max(length, np.int32(126)) - np.int32(125))
        sign = np.int32(number & NEGATIVE) if is_zero else np.int32(np.int32(number ^ by) & NEGATIVE)
        width = NONE if np.int32(below | sign) == NONE else width
        wrong = np.int32(below & LOWEST) if is_zero else sign
        needed[place] = np.uint8(width if wrong == NONE else np.int32(NO_WIDTH))


@loop
def count_widths(numbers, differs, codes, start, matrix, needed):
    """`needed` [A, NO_WIDTH + 1]: how many weights of a number of steps need a width, beside what it held."""
    many, near, of_block = np.empty(BLOCK, np.uint8), np.empty(BLOCK, np.int32), np.empty(BLOCK, np.uint8)
    row, column = start // matrix[0], start % matrix[0]
    for first in range(0, codes.size, BLOCK):
        end = min(first + BLOCK, codes.size)
        size = end - first
        row, column = _approach(codes[first:end], row, column, matrix, many[:size], near[:size])
        _needed(numbers[first:end], near[:size], of_block[:size])
        for place in range(size):
            needed[many[place], NO_WIDTH if differs.size > 0 and differs[first + place] else of_block[place]] += 1


@inner_loop
def _fields(numbers, near, widths, fields):
    """EXCEPTION where none tells the number."""
    for place in range(fields.size):
        number, by, width = np.int32(numbers[place]), near[place], np.int32(widths[place] & np.uint8(31))
        ones = np.int32(np.int32(ONE << width) - ONE)
        highest = np.int32(np.int32(ones + ONE) >> ONE)
        below = np.int32(np.int32(by & SIZE) - np.int32(number & SIZE))
        beyond = np.int32(-below)
        is_zero = np.int32(by & ZERO) != NONE
        sign = np.int32(number & NEGATIVE)
        signed = np.int32(below | (highest if sign != NONE else NONE))
        too_far = np.int32(below & ~np.int32(ones >> ONE)) | (sign if ones == NONE else NONE)
        too_wide = np.int32(np.int32(beyond + highest) & ~ones) | np.int32(np.int32(number ^ by) & NEGATIVE)
        wrong = np.int32(too_far) if is_zero else np.int32(too_wide)
        field = signed if is_zero else np.int32(beyond & ones)
        fields[place] = np.uint32(field) if wrong == NONE else EXCEPTION


@loop
def measure_fields(numbers, differs, codes, start, matrix, widths):
    """(Words, exceptions) that `write_fields` will make of the same."""
    many, near, fields = np.empty(BLOCK, np.uint8), np.empty(BLOCK, np.int32), np.empty(BLOCK, np.uint32)
    of_block = np.empty(BLOCK, np.uint8)
    row, column = start // matrix[0], start % matrix[0]
    num_words = num_exceptions = 0
    for first in range(0, codes.size, BLOCK):
        end = min(first + BLOCK, codes.size)
        size = end - first
        row, column = _approach(codes[first:end], row, column, matrix, many[:size], near[:size])
        _look_up(many[:size], matrix[2], widths, of_block)
        _fields(numbers[first:end], near[:size], of_block, fields[:size])
        if differs.size > 0:
            for place in range(size):
                if differs[first + place]:
                    fields[place] = EXCEPTION
        bits = exceptions = np.uint32(0)
        for place in range(size):
            bits = np.uint32(bits + np.uint32(of_block[place]))
            exceptions = np.uint32(exceptions + np.uint32(fields[place] >> np.uint32(31)))
        num_words += (np.int64(bits) + WORD_BITS - 1) // WORD_BITS
        num_exceptions += np.int64(exceptions)
    return num_words, num_exceptions


@inner_loop
def _pack(fields, widths, words, first, places, num_places):
    """Pairs of fields: a pair fits a word, whatever is held of the one before. (Words; exceptions, these included)"""
    held, num_held, word = np.uint64(0), np.uint64(0), 0
    for pair in range(fields.size // 2):
        one, other = fields[2 * pair], fields[2 * pair + 1]
        if (one | other) & EXCEPTION != 0:
            for place in range(2 * pair, 2 * pair + 2):
                if fields[place] == EXCEPTION:
                    if num_places < places.size:
                        places[num_places] = first + place
                    num_places += 1
            one, other = one & ~EXCEPTION, other & ~EXCEPTION
        low, high = np.uint64(widths[2 * pair]), np.uint64(widths[2 * pair + 1])
        held |= (np.uint64(one) | np.uint64(other) << low) << num_held
        num_held += low + high
        words[word] = np.uint32(held & LOWER)
        word += np.int64(num_held >> np.uint64(5))
        held >>= num_held & np.uint64(WORD_BITS)
        num_held &= np.uint64(WORD_BITS - 1)
    words[word] = np.uint32(held & LOWER)
    return word + (1 if num_held > 0 else 0), num_places


@loop
def write_fields(numbers, differs, codes, start, matrix, widths, words, offset, offsets, places):
    """Into `words` from `offset` on, the blocks' own `offsets`, and `places` of exceptions within these numbers. (Words, and
    exceptions that there are): what of them finds no room is left out."""
    many, near, fields = np.empty(BLOCK, np.uint8), np.empty(BLOCK, np.int32), np.empty(BLOCK, np.uint32)
    of_block, packed = np.empty(BLOCK, np.uint8), np.empty(MOST_WORDS + 1, np.uint32)
    row, column = start // matrix[0], start % matrix[0]
    word, num_places = offset, 0
    for first in range(0, codes.size, BLOCK):
        end = min(first + BLOCK, codes.size)
        size = end - first
        row, column = _approach(codes[first:end], row, column, matrix, many[:size], near[:size])
        _look_up(many[:size], matrix[2], widths, of_block)
        _fields(numbers[first:end], near[:size], of_block, fields[:size])
        if size % 2:
            fields[size] = 0
        if differs.size > 0:
            for place in range(size):
                if differs[first + place]:
                    fields[place] = EXCEPTION
        num_words, num_places = _pack(fields[: size + size % 2], of_block, packed, first, places, num_places)
        offsets[first // BLOCK] = word
        if word + num_words <= words.size:
            words[word : word + num_words] = packed[:num_words]
        word += num_words
    return word - offset, num_places


@inner_loop
def _take(words, offset, widths, fields):
    """Each field with what follows it, by pairs: a pair fits a word, and so lies in two."""
    bit = np.uint64(offset) * np.uint64(WORD_BITS)
    for pair in range(fields.size // 2):
        low, high = np.uint64(widths[2 * pair]), np.uint64(widths[2 * pair + 1])
        word = bit >> np.uint64(5)
        both = np.uint64(words[word]) | np.uint64(words[word + np.uint64(1)]) << np.uint64(WORD_BITS)
        both >>= bit & np.uint64(WORD_BITS - 1)
        fields[2 * pair] = np.uint32(both & LOWER)
        fields[2 * pair + 1] = np.uint32(both >> low & LOWER)
        bit += low + high


@inner_loop
def _take_within(words, offset, widths, fields):
    """The same of a block that may lead out of `words`: what lies beyond is the last of them."""
    bit, last = 0, words.size - 1
    for place in range(fields.size):
        word = offset + (bit >> 5)
        both = np.uint64(words[min(word, last)]) | np.uint64(words[min(word + 1, last)]) << np.uint64(WORD_BITS)
        fields[place] = np.uint32(both >> np.uint64(bit % WORD_BITS) & LOWER)
        bit += np.int64(widths[place])


@inner_loop
def _numbers(near, fields, widths, numbers):
    for place in range(numbers.size):
        by, width = near[place], np.int32(widths[place] & np.uint8(31))
        ones = np.int32(np.int32(ONE << width) - ONE)
        highest = np.int32(np.int32(ones + ONE) >> ONE)
        field, edge = np.int32(fields[place]) & ones, by & SIZE
        is_zero = by & ZERO != 0
        size = np.int32(edge - (field & ~highest)) if is_zero else np.int32(edge + np.int32((field ^ highest) - highest))
        sign = (NEGATIVE if field & highest != 0 else NONE) if is_zero else by & NEGATIVE
        numbers[place] = np.uint16(size & SIZE | sign)


@loop
def read_fields(words, offsets, codes, start, matrix, widths, numbers):
    """Fills `numbers`. What damage has moved out of `words` is taken for their first or last."""
    many, near, fields = np.empty(BLOCK, np.uint8), np.empty(BLOCK, np.int32), np.empty(BLOCK, np.uint32)
    of_block = np.empty(BLOCK, np.uint8)
    row, column = start // matrix[0], start % matrix[0]
    for first in range(0, codes.size, BLOCK):
        end = min(first + BLOCK, codes.size)
        size = end - first
        row, column = _approach(codes[first:end], row, column, matrix, many[:size], near[:size])
        _look_up(many[:size], matrix[2], widths, of_block)
        offset = min(max(np.int64(offsets[first // BLOCK]), 0), words.size - 1)
        if offset + MOST_WORDS + 1 < words.size:
            _take(words, offset, of_block, fields[: size + size % 2])
        else:
            _take_within(words, offset, of_block, fields[:size])
        _numbers(near[:size], fields[:size], of_block, numbers[first:end])
