"""Reads one value after the other from the head of a GGUF file. Believes no length before the file is long enough for it.

All numbers are little endian. A string is a u64 length and so many bytes of UTF-8; an array is a u32 type, a u64 count and its
values. Source: ggml's docs/gguf.md.
"""

import struct
from dataclasses import dataclass
from typing import Final

from .header import pread_exactly, quoted

MAX_HEAD_BYTES: Final = 2**28  # vocabularies of 262,144 tokens and their merges take some 2**24
MAX_STRING_BYTES: Final = 2**24  # chat templates have some 2**17
MAX_ITEMS: Final = 2**22  # of all arrays together
FIRST_BYTES: Final = 2**20  # read at once, and from then on as many as have been read

BOOL, STRING, ARRAY = 7, 8, 9
_CODES: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", BOOL: "B", 10: "Q", 11: "q", 12: "d"}

Scalar = int | float | bool | str


@dataclass(frozen=True, slots=True)
class LongArray:
    """Stands for an array that was checked and not kept."""

    length: int

    def __len__(self) -> int:
        return self.length


Value = Scalar | tuple[Scalar, ...] | LongArray


class Cursor:
    """A place in the head of an open file. Every method raises ValueError, whose message continues the sentence "FILE ..." for
    what belongs to no value, and "metadata 'key' ..." for a value; and OSError."""

    def __init__(self, descriptor: int, file_bytes: int, *, long_arrays: bool = True, short: int = 1024) -> None:
        """`long_arrays`: keep those of more than `short` items, too."""
        self._descriptor, self._file_bytes = descriptor, file_bytes
        self._kept_items = MAX_ITEMS if long_arrays else short
        self._data = bytearray()
        self._items = 0
        self.at = 0  # bytes from the start of the file

    def raw(self, num_bytes: int) -> bytes:
        start = self._pass(num_bytes)
        return bytes(self._data[start : self.at])

    def u32(self) -> int:
        return int.from_bytes(self.raw(4), "little")

    def u64(self) -> int:
        return int.from_bytes(self.raw(8), "little")

    def string(self) -> str:
        start = self.at
        num_bytes = self.u64()
        _check_string(num_bytes, start)
        return _text(self.raw(num_bytes), start)

    def value(self) -> Value:
        kind = self.u32()
        return self._array() if kind == ARRAY else self._scalars(kind, 1)[0]

    def _array(self) -> tuple[Scalar, ...] | LongArray:
        kind, count = self.u32(), self.u64()
        if kind == ARRAY:
            raise ValueError("is an array of arrays, which we do not read")
        self._items += count
        if self._items > MAX_ITEMS:
            raise ValueError(f"is an array of {count:,} items, and all arrays may have {MAX_ITEMS:,} together")
        if count <= self._kept_items:
            return self._scalars(kind, count)
        if kind == STRING:
            self._strings(count, keep=False)
        else:
            self._pass(count * struct.calcsize(_code(kind)))
        return LongArray(count)

    def _scalars(self, kind: int, count: int) -> tuple[Scalar, ...]:
        if kind == STRING:
            return tuple(self._strings(count, keep=True))
        form = f"<{count}{_code(kind)}"
        values = struct.unpack_from(form, self._data, self._pass(struct.calcsize(form)))
        if kind != BOOL:
            return values
        if any(value > 1 for value in values):
            raise ValueError(f"has a truth value of {max(values)}")
        return tuple(value == 1 for value in values)

    def _strings(self, count: int, *, keep: bool) -> list[str]:
        """`count` strings, none where they are not kept. Half a million in half a second: what is done for each is little."""
        kept: list[str] = []
        data, at, unpack = self._data, self.at, struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at + 8 > len(data):
                self._reach(at + 8)
            (num_bytes,) = unpack(data, at)
            if num_bytes > MAX_STRING_BYTES:
                _check_string(num_bytes, at)
            end = at + 8 + num_bytes
            if end > len(data):
                self._reach(end)
            if keep:
                kept.append(_text(data[at + 8 : end], at))
            at = end
        self.at = at
        return kept

    def _pass(self, num_bytes: int) -> int:
        """Goes past so many bytes, which are in memory then. Returns where they begin."""
        start, end = self.at, self.at + num_bytes
        if end > len(self._data):
            self._reach(end)
        self.at = end
        return start

    def _reach(self, end: int) -> None:
        """Reads on until `end` bytes are in memory."""
        if end > self._file_bytes:
            raise ValueError(
                f"is truncated: its head goes on to byte {end:,} at least and the file has {self._file_bytes:,}:"
                " an interrupted download?"
            )
        if end > MAX_HEAD_BYTES:
            raise ValueError(f"has a head of more than the {MAX_HEAD_BYTES:,} bytes that are allowed")
        held = len(self._data)
        goal = min(max(end, 2 * held, FIRST_BYTES), self._file_bytes, MAX_HEAD_BYTES)
        self._data += pread_exactly(self._descriptor, goal - held, held)


def _code(kind: int) -> str:
    if kind not in _CODES:
        raise ValueError(f"has a value of type {kind}, which there is none of")
    return _CODES[kind]


def _check_string(num_bytes: int, at: int) -> None:
    if num_bytes > MAX_STRING_BYTES:
        raise ValueError(
            f"has a string of {num_bytes:,} bytes at byte {at:,}, more than the {MAX_STRING_BYTES:,} that are allowed"
        )


def _text(data: bytes | bytearray, at: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"has a string that is not UTF-8 at byte {at:,}: {quoted(repr(bytes(data[:40])))}") from None
