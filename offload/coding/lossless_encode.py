"""16-bit weights into the code of lossless_layout.py. Nothing is believed: what was written is decoded and compared."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from .lossless_layout import BLOCK, MAX_WEIGHTS, NUM_CODES, Coded
from .lossless_numpy import (
    CHUNK_BLOCKS,
    Bits,
    Bytes,
    Cast,
    cast_halves,
    exponents_of,
    join,
    read_codes,
    write_codes,
    write_low_bytes,
)

CHUNK: Final = CHUNK_BLOCKS * BLOCK  # weights
RUN: Final = 4 * CHUNK  # weights that one thread takes at a time
SAMPLE: Final = 2**16  # weights that choose the base


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What the code of a tensor needs to know of all of it. `escapes` and `exceptions` count those of each RUN."""

    base: int
    escapes: tuple[int, ...]
    exceptions: tuple[int, ...]

    @property
    def num_escapes(self) -> int:
        return sum(self.escapes)

    @property
    def num_exceptions(self) -> int:
        return sum(self.exceptions)


class Encoder:
    """Its threads, as many as there are cores for this process, share a tensor; each takes a few MiB beside it. Tensors are
    contiguous, on the CPU, of a dtype in FORMATS."""

    def __init__(self, num_threads: int | None = None) -> None:
        self._pool = ThreadPoolExecutor(num_threads or len(os.sched_getaffinity(0)), thread_name_prefix="lossless-encoder")

    def __enter__(self) -> "Encoder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def survey(self, tensor: torch.Tensor) -> Survey | None:
        """None for a tensor that is too long for the code, or empty."""
        weights = _Weights(tensor)
        if not 0 < weights.size <= MAX_WEIGHTS:
            return None
        base = _best_base(weights)
        counts = list(self._pool.map(lambda start: _count_run(weights, base, start), range(0, weights.size, RUN)))
        return Survey(base=base, escapes=tuple(count[0] for count in counts), exceptions=tuple(count[1] for count in counts))

    def encode(self, tensor: torch.Tensor, survey: Survey, into: Coded) -> None:
        """Fills all of `into`, whose shapes `survey` decided. ValueError, which says what is wrong with the tensor, when it is
        not the one that was surveyed or when the code does not give it back."""
        weights = _Weights(tensor)
        into.base.fill_(survey.base)
        into.escapes[-1:].fill_(0)
        starts = zip(_starts(survey.escapes), _starts(survey.exceptions), strict=True)
        runs = [
            _Run(weights=weights, survey=survey, number=number, first_escape=first_escape, first_exception=first_exception)
            for number, (first_escape, first_exception) in enumerate(starts)
        ]
        for _ in self._pool.map(lambda run: run.encode(into), runs):
            pass


class _Weights:
    """The bits of a tensor, and the bfloat16 numbers that it is coded as."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.bits: Bits = tensor.detach().view(-1).view(torch.int16).numpy().view(np.uint16)
        self.is_half = tensor.dtype == torch.float16
        self.size = self.bits.size

    def cast(self, bits: Bits) -> Cast:
        """Those of `bits` as bfloat16."""
        return cast_halves(bits) if self.is_half else Cast(bits=bits, differs=np.zeros(0, np.bool_))


@dataclass(frozen=True, slots=True)
class _Decoded:
    bits: Bits
    num_escapes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    weights: _Weights
    survey: Survey
    number: int
    first_escape: int
    first_exception: int

    def encode(self, into: Coded) -> None:
        places: list[NDArray[np.intp]] = []
        escape, end = self.first_escape, self.first_escape + self.survey.escapes[self.number]
        for chunk in _chunks(self.number * RUN, self.weights.size):
            cast = self.weights.cast(self.weights.bits[chunk])
            decoded = self._encode_chunk(chunk, cast.bits, escape, end, into)
            if np.not_equal(decoded.bits, cast.bits).any():
                raise changed()
            if cast.differs.any():
                places.append(np.flatnonzero(cast.differs) + chunk.start)
            escape += decoded.num_escapes
        if escape != end or sum(map(len, places)) != self.survey.exceptions[self.number]:
            raise changed()
        self._write_exceptions(places, into)

    def _encode_chunk(self, chunk: slice, bits: Bits, escape: int, end: int, into: Coded) -> _Decoded:
        """What comes out of what was written. Escapes begin at `escape`, and at `end` those of the next run."""
        base, low_bytes, escapes = self.survey.base, into.bytes.numpy()[chunk], into.escapes.numpy()
        codes = into.codes.numpy()[:, chunk.start // 8 : -(-chunk.stop // 8)]
        exponents = exponents_of(bits)
        write_low_bytes(bits, low_bytes)
        write_codes(exponents, base, codes)
        found = read_codes(codes, bits.size)
        if escape + found.escaped.size > end:
            raise changed()
        escapes[escape : escape + found.escaped.size] = exponents.take(found.escaped)
        starts = np.searchsorted(found.escaped, np.arange(0, bits.size, BLOCK))
        into.offsets.numpy()[chunk.start // BLOCK : -(-chunk.stop // BLOCK)] = escape + starts
        return _Decoded(join(low_bytes, found, base, escapes, escape), found.escaped.size)

    def _write_exceptions(self, places: list[NDArray[np.intp]], into: Coded) -> None:
        first = self.first_exception
        for positions in places:
            which = slice(first, first + positions.size)
            into.positions.numpy()[which] = positions
            into.exceptions.view(torch.int16).numpy().view(np.uint16)[which] = self.weights.bits[positions]
            first += positions.size


def changed() -> ValueError:
    """Of a tensor that its code does not give back."""
    return ValueError("has changed while it was encoded: its file was written to, or memory fails")


def _count_run(weights: _Weights, base: int, start: int) -> tuple[int, int]:
    """(escapes, exceptions)"""
    num_escapes = num_exceptions = 0
    for chunk in _chunks(start, weights.size):
        cast = weights.cast(weights.bits[chunk])
        num_escapes += int(np.count_nonzero(exponents_of(cast.bits) - np.uint8(base) >= NUM_CODES))
        num_exceptions += int(np.count_nonzero(cast.differs))
    return num_escapes, num_exceptions


def _best_base(weights: _Weights) -> int:
    """Of the consecutive exponents that most of some weights have."""
    step = -(-weights.size // SAMPLE) | 1  # odd: rows are not, so it is not always the same columns
    exponents: Bytes = exponents_of(weights.cast(np.ascontiguousarray(weights.bits[::step])).bits)
    counts = np.bincount(exponents, minlength=256)
    return int(np.convolve(counts, np.ones(NUM_CODES, np.int64), mode="valid").argmax())


def _chunks(start: int, size: int) -> Iterator[slice]:
    end = min(start + RUN, size)
    for first in range(start, end, CHUNK):
        yield slice(first, min(first + CHUNK, end))


def _starts(counts: tuple[int, ...]) -> list[int]:
    return [0, *np.cumsum(counts[:-1]).tolist()] if counts else []
