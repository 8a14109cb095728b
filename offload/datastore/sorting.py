"""Places in texts, sorted by what their contexts say. Pure, over numpy arrays.

Several tokens make one number, so that a sort of numbers sorts by the first of them; those that tie are sorted again by the
next tokens, which are ever fewer places.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from .layout import CONTEXT_TOKENS

Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]  # big-endian
Keys = npt.NDArray[np.uint64]
Places = npt.NDArray[np.uint32]

PIECE_PLACES = 2**20  # are looked at at a time
SAMPLED_PLACES = 2**16  # tell how places are spread
BYTES_PER_PLACE = 64  # that sorting takes at its height, temporaries of numpy included; measured


def tokens_per_key(vocab_size: int) -> int:
    """How many tokens, marks included, one number of 64 bits holds."""
    return min(64 // vocab_size.bit_length(), CONTEXT_TOKENS)


def keys_of(tokens: Tokens, places: Places, offset: int, vocab_size: int) -> Keys:
    """Of each place, the tokens from `offset` on as one number that orders as they do. [len(places)]"""
    bits, begin = np.uint64(vocab_size.bit_length()), places.astype(np.int64) + offset
    keys = np.zeros(len(places), dtype=np.uint64)
    for number in range(tokens_per_key(vocab_size)):
        keys = (keys << bits) | tokens[begin + number].astype(np.uint64)
    return keys


def places_with_context(tokens: Tokens, vocab_size: int) -> Iterator[Places]:
    """All places that have a context and a continuation: neither is a mark. In pieces, in order."""
    for begin in range(1, len(tokens), PIECE_PLACES):
        piece = tokens[begin - 1 : begin + PIECE_PLACES] != vocab_size
        yield (np.flatnonzero(piece[1:] & piece[:-1]) + begin).astype(np.uint32)


def splitters(tokens: Tokens, num_groups: int, vocab_size: int) -> Keys:
    """Numbers between which about equally many places have their keys: at most num_groups - 1, ascending."""
    spread = np.linspace(1, len(tokens) - CONTEXT_TOKENS - 1, SAMPLED_PLACES).astype(np.uint32)
    keys = np.sort(keys_of(tokens, np.unique(spread), 0, vocab_size))
    return np.unique(keys[np.arange(1, num_groups) * len(keys) // num_groups])


def sort_places(tokens: Tokens, places: Places, vocab_size: int) -> Places:
    """`places` by the first CONTEXT_TOKENS tokens from each on."""
    keys = keys_of(tokens, places, 0, vocab_size)
    order = np.argsort(keys)
    places, keys = places[order], keys[order]
    del order
    begins = np.ones(len(places) + 1, dtype=bool)  # whether a place is the first of those that tie; one more at the end
    begins[1:-1] = keys[1:] != keys[:-1]
    del keys
    for offset in range(tokens_per_key(vocab_size), CONTEXT_TOKENS, tokens_per_key(vocab_size)):
        tied = np.flatnonzero(~(begins[:-1] & begins[1:]))
        if not len(tied):
            break
        groups = np.cumsum(begins[:-1], dtype=np.uint32)[tied]
        keys = keys_of(tokens, places[tied], offset, vocab_size)
        order = np.lexsort((keys, groups))
        places[tied], keys = places[tied][order], keys[order]
        begins[tied[1:]] |= keys[1:] != keys[:-1]  # where groups part, it is set already
    return places
