"""A datastore that is open: what it knows of a context, found by one binary search through a memory map.

Places are sorted by their contexts read backwards, so the places that match best are the neighbours of where a context would
stand, whatever the length of the match. A search takes about log2(SAMPLE_STEP) steps beyond the sample, which is small and
soon in memory, and each step looks at one place and one context.
"""

import hashlib
import mmap
import sys
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from tree.ngram import MOST_LEVELS, MOST_MATCHES, PRIORS, Match, TextIndexes, merge
from tree.sources import Found, TokenSources

from ..errors import IntegrityError, ModelError, reason
from .layout import CONTEXT_TOKENS, PAGE_BYTES, SAMPLE_STEP, SAMPLE_TOKENS, Head, parse_head

READ_BYTES = 2**22
_CODES = {2: "H", 4: "I"}


class Datastore:
    """`path`, mapped into memory until `close`. Its tokens from `vocab_size` on are none of the model's and end a continuation.
    Opening checks the head, and all sizes against the file's; `verify` reads it all."""

    def __init__(self, path: Path, *, tokenizer: bytes | None, vocab_size: int) -> None:
        """`tokenizer`: the digest of the model's vocabulary, None where it has none. ModelError for a file that is not a
        datastore, is not whole, or has other tokens."""
        assert sys.byteorder == "little"
        self.path, (self.head, self._map) = path, _open(path)
        _check_tokens(path, self.head, tokenizer, vocab_size)
        self._width, self._code = self.head.token_bytes, _CODES[self.head.token_bytes]
        self._none_from = min(vocab_size, self.head.vocab_size)
        parts, view = self.head.parts, memoryview(self._map)
        self._begin, self._end = parts["tokens"].start, parts["tokens"].stop
        self._places = view[parts["places"].start : parts["places"].stop].cast("I")
        self._sample_begin, self._sample_bytes = parts["sample"].start, SAMPLE_TOKENS * self._width
        self._view = view

    def close(self) -> None:
        self._places.release()
        self._view.release()
        self._map.close()

    def start(self, token_ids: Sequence[int]) -> "DatastoreSource":
        """A text that begins with these tokens: `tree.sources.TokenSources`."""
        return DatastoreSource(self, token_ids)

    def matches(self, context: Sequence[int]) -> list[Match]:
        """Where texts ran as `context` ends, the longest matches first, MOST_MATCHES at most."""
        sought = self._bytes_of(context)
        right = self._rank(sought)
        found: list[Match] = []
        # What is left and right of there matches ever less: the longer of the two is next.
        before = self._by_length(range(right - 1, -1, -1), sought)
        behind = self._by_length(range(right, self.head.num_places), sought)
        one, other = next(before, None), next(behind, None)
        while len(found) < MOST_MATCHES and (one or other):
            if other is None or (one is not None and one[0] > other[0]):
                assert one is not None
                (length, begin), one = one, next(before, None)
            else:
                (length, begin), other = other, next(behind, None)
            continuation = self._continuation(begin)
            if continuation:
                found.append(Match(length, continuation, 0, len(continuation)))
        return found

    def verify(self, progress: Callable[[int], None] | None = None) -> None:
        """Read everything. IntegrityError where a part is not what was written."""
        self._map.madvise(mmap.MADV_SEQUENTIAL)
        for (name, part), digest in zip(self.head.parts.items(), self.head.digests, strict=True):
            seen = hashlib.sha256()
            for begin in range(part.start, part.stop, READ_BYTES):
                piece = self._map[begin : min(begin + READ_BYTES, part.stop)]
                seen.update(piece)
                if progress is not None:
                    progress(len(piece))
            if seen.digest() != digest:
                raise IntegrityError(
                    f"the {name} of the datastore are not those that were written",
                    where=str(self.path),
                    cure="copy it again, or build it again with `datastore build`",
                )

        self._map.madvise(mmap.MADV_RANDOM)

    def _bytes_of(self, context: Sequence[int]) -> bytes:
        """The last CONTEXT_TOKENS tokens, backwards, as the file has them."""
        last = context[-CONTEXT_TOKENS:]
        tokens = array(self._code, [min(token_id, self.head.vocab_size) for token_id in reversed(last)])
        tokens.byteswap()
        return tokens.tobytes()

    def _rank(self, sought: bytes) -> int:
        """How many places have a context less than `sought`."""
        samples, head = range(self.head.num_samples), sought[: self._sample_bytes]
        first = bisect_left(samples, head, key=self._sample)
        last = bisect_right(samples, head, lo=first, key=lambda number: self._sample(number)[: len(head)])
        within = range(max(first - 1, 0) * SAMPLE_STEP, min(last * SAMPLE_STEP, self.head.num_places))
        return within.start + bisect_left(within, sought, key=self._context)

    def _sample(self, number: int) -> bytes:
        begin = self._sample_begin + number * self._sample_bytes
        return self._map[begin : begin + self._sample_bytes]

    def _context(self, number: int) -> bytes:
        """Of the place of that number."""
        begin = self._begin + self._places[number] * self._width
        return self._map[begin : min(begin + CONTEXT_TOKENS * self._width, self._end)]

    def _by_length(self, numbers: range, sought: bytes) -> Iterator[tuple[int, int]]:
        """Of places of these numbers, the nearest to what is sought first: over how many tokens they match, until they do
        not at all, and where in the file their contexts begin."""
        mapped, places, begins, width, num_bytes = self._map, self._places, self._begin, self._width, len(sought)
        as_number = int.from_bytes(sought, "big")
        for number in numbers:
            begin = begins + places[number] * width
            context = mapped[begin : min(begin + num_bytes, self._end)]
            if context == sought:
                yield num_bytes // width, begin
                continue
            differing = int.from_bytes(context.ljust(num_bytes, b"\xff"), "big") ^ as_number
            length = (num_bytes - (differing.bit_length() + 7) // 8) // width
            if not length:
                return
            yield length, begin

    def _continuation(self, begin: int) -> "array[int]":
        """The tokens that came next, MOST_LEVELS at most: what lies before a context, backwards, up to what is no token."""
        tokens = array(self._code, self._map[max(begin - MOST_LEVELS * self._width, self._begin) : min(begin, self._end)])
        tokens.byteswap()
        tokens.reverse()
        if tokens and max(tokens) >= self._none_from:
            del tokens[next(number for number, token_id in enumerate(tokens) if token_id >= self._none_from) :]
        return tokens


def open_sources(
    names: Sequence[str], *, tokenizer: Callable[[], bytes | None], vocab_size: int, stack: ExitStack
) -> tuple[TokenSources, ...]:
    """What a text has said itself, and the datastores of these names, until `stack` ends. ModelError for a file that is none,
    or is not of this `tokenizer`, which is asked for if there are any."""
    sources: list[TokenSources] = [TextIndexes()]
    digest = tokenizer() if names else None
    for name in names:
        store = Datastore(Path(name).expanduser(), tokenizer=digest, vocab_size=vocab_size)
        stack.callback(store.close)
        sources.append(store)
    return tuple(sources)


class DatastoreSource:
    """Implements `tree.sources.TokenSource`: what a datastore knows of one text."""

    priors = PRIORS

    def __init__(self, store: Datastore, token_ids: Sequence[int]) -> None:
        self._store, self._last = store, list(token_ids[-CONTEXT_TOKENS:])

    def find(self, path: Sequence[int], most: int) -> list[Found]:
        context = [*self._last, *path]
        return merge(self._store.matches(context), most) if context else []

    def follow(self, token_ids: Sequence[int]) -> None:
        self._last = [*self._last, *token_ids][-CONTEXT_TOKENS:]


def _open(path: Path) -> tuple[Head, mmap.mmap]:
    try:
        with path.open("rb") as file:
            head = parse_head(file.read(PAGE_BYTES))
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if len(mapped) != head.file_bytes:
            found = len(mapped)
            mapped.close()
            raise ValueError(f"it has {found} bytes, and says that it has {head.file_bytes}")
    except (OSError, ValueError) as error:
        raise ModelError(
            f"not a datastore: {reason(error)}",
            where=str(path),
            cure="make one with `datastore build`, or copy it again",
        ) from error
    mapped.madvise(mmap.MADV_RANDOM)
    return head, mapped


def _check_tokens(path: Path, head: Head, tokenizer: bytes | None, vocab_size: int) -> None:
    if tokenizer is not None and tokenizer != head.tokenizer:
        raise ModelError(
            f"the datastore's tokens are of another vocabulary, of {head.vocab_size} tokens",
            where=str(path),
            cure="build one for this model: `datastore build --model MODEL`",
        )
