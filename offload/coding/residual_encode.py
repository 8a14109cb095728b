"""Matrices into a base, and 16-bit ones into what it lacks of them. Nothing is believed: what was written is decoded and
compared.

The code of a weight is chosen from its bfloat16 number, of float16 matrices too. Imports
numba.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from .base_encode import Numbers, bits_of, codes_of, encode_rows, fit_into
from .base_kinds import BaseKind
from .base_layout import Base
from .base_loops import unpack
from .lossless_encode import changed
from .lossless_numpy import Bits
from .residual_cpu import CHUNK, Arrays, every_width
from .residual_layout import BLOCK, MAX_WEIGHTS, MAX_WIDTH, Remainder
from .residual_loops import NO_WIDTH, count_widths, measure_fields, write_fields
from .residual_survey import EXCEPTION_BITS, Fit, ResidualSurvey

RUN: Final = 8 * CHUNK  # weights that one thread takes at a time
SAMPLE: Final = 16 * CHUNK  # weights, or so: what decides the widths
# Of float16 numbers that are none of bfloat16: below, all are coded as bfloat16, and above, as float16; three bits a weight are
# as much as one exception in sixteen.
FEW_DIFFER, MANY_DIFFER = 1 / 64, 1 / 4


class ResidualEncoder:
    """Its threads, as many as there are cores for this process, share a matrix; each takes a few MiB beside it. Matrices are
    [N, K], contiguous and on the CPU; those that are surveyed and encoded are of a dtype in FORMATS of residual.py."""

    def __init__(self, kind: BaseKind, num_threads: int | None = None) -> None:
        self._kind = kind
        self._pool = ThreadPoolExecutor(num_threads or len(os.sched_getaffinity(0)), thread_name_prefix="residual-encoder")

    def __enter__(self) -> "ResidualEncoder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def fit(self, tensor: torch.Tensor) -> Fit:
        """Of any float dtype: its numbers of bfloat16 are what is fitted."""
        numbers = Numbers(tensor)
        fit = Fit.empty((numbers.num_rows, numbers.num_columns), self._kind)
        list(self._pool.map(lambda rows: fit_into(numbers, rows, self._kind, fit), _row_runs(numbers)))
        return fit

    def encode_base(self, tensor: torch.Tensor, fit: Fit, into: Base) -> None:
        """Fills all of `into`."""
        numbers = Numbers(tensor)
        list(self._pool.map(lambda rows: encode_rows(numbers, rows, self._kind, fit, into), _row_runs(numbers)))

    def survey(self, tensor: torch.Tensor) -> ResidualSurvey | None:
        """None for a matrix that is too long for the code, or empty."""
        numbers = Numbers(tensor)
        if not 0 < numbers.size <= MAX_WEIGHTS:
            return None
        fit = self.fit(tensor)
        found = [self._survey(_Way(numbers, fit, self._kind, is_half)) for is_half in self._ways(numbers)]
        return min(found, key=lambda survey: survey.num_bits)

    def encode(self, tensor: torch.Tensor, survey: ResidualSurvey, base: Base, remainder: Remainder) -> None:
        """Fills all of `base` and of `remainder`, whose shapes `survey` decided. ValueError, which says what is wrong with the
        tensor, when it is not the one that was surveyed or when the code does not give it back."""
        self.encode_base(tensor, survey.fit, base)
        remainder.widths.numpy()[:] = survey.widths
        remainder.words.numpy()[-1] = 0
        numbers = Numbers(tensor)
        arrays = Arrays(remainder, base, self._kind, numbers.num_columns)
        starts = zip(_starts(survey.words), _starts(survey.exceptions), strict=True)
        runs = [
            _Run(numbers=numbers, survey=survey, number=number, first_word=word, first_exception=exception)
            for number, (word, exception) in enumerate(starts)
        ]
        list(self._pool.map(lambda run: run.encode(arrays, remainder), runs))

    def _ways(self, numbers: Numbers) -> tuple[bool, ...]:
        """Whether to code as float16."""
        if numbers.tensor.dtype != torch.float16:
            return (False,)
        counts = self._pool.map(
            lambda which: np.count_nonzero(numbers.cast(which).differs), _chunks(0, numbers.size, numbers.size)
        )
        share = sum(map(int, counts)) / numbers.size
        return (False,) if share < FEW_DIFFER else (True,) if share > MANY_DIFFER else (False, True)

    def _survey(self, way: "_Way") -> ResidualSurvey:
        size = way.numbers.size
        every = len(range(0, size, SAMPLE)) | 1  # odd: rows are not, so it is not always the same columns
        widths = _best_widths(np.sum(list(self._pool.map(way.count, list(_chunks(0, size, size))[::every])), axis=0))
        measured = list(self._pool.map(lambda start: way.measure(start, widths), range(0, size, RUN)))
        return ResidualSurvey(
            fit=way.fit,
            is_half=way.is_half,
            widths=tuple(widths.tolist()),
            words=tuple(words for words, _ in measured),
            exceptions=tuple(exceptions for _, exceptions in measured),
        )


def _best_widths(needed: NDArray[np.int64]) -> NDArray[np.uint8]:
    """[A]: those that take the fewest bits, exceptions included; the narrowest of them. `needed` [A, NO_WIDTH + 1]: weights of
    so many steps that need so wide a field."""
    weights = needed.sum(1, keepdims=True)
    bits = weights * np.arange(NO_WIDTH + 1) + EXCEPTION_BITS * (weights - needed.cumsum(1))
    widths: NDArray[np.uint8] = bits[:, : MAX_WIDTH + 1].argmin(1).astype(np.uint8)
    return widths


@dataclass(frozen=True, slots=True)
class _Coded:
    """What is coded: `bits` [N], of which those that `differs`, empty or [N], are not the matrix's."""

    bits: Bits
    differs: NDArray[np.bool_]

    @classmethod
    def of(cls, numbers: Numbers, which: slice, is_half: bool) -> "_Coded":
        if is_half:
            return cls(bits_of(numbers.tensor[which]), np.zeros(0, np.bool_))
        cast = numbers.cast(which)
        return cls(cast.bits, cast.differs)


@dataclass(frozen=True, slots=True)
class _Way:
    """How a matrix may be coded, to be looked at before anything is written."""

    numbers: Numbers
    fit: Fit
    kind: BaseKind
    is_half: bool

    def count(self, which: slice) -> NDArray[np.int64]:
        """[A, NO_WIDTH + 1]: weights of so many steps that need so wide a field."""
        needed = np.zeros((2**self.kind.bits, NO_WIDTH + 1), np.int64)
        count_widths(*self._weights(which), needed)
        return needed

    def measure(self, start: int, widths: NDArray[np.uint8]) -> tuple[int, int]:
        """(Words, exceptions) of a RUN."""
        chunks = _chunks(start, start + RUN, self.numbers.size)
        measured = [measure_fields(*self._weights(which), every_width(widths)) for which in chunks]
        return sum(words for words, _ in measured), sum(exceptions for _, exceptions in measured)

    def _weights(self, which: slice) -> tuple[Any, ...]:
        """As loops take them."""
        coded = _Coded.of(self.numbers, which, self.is_half)
        numbers = self.numbers.cast(which).bits if self.is_half else coded.bits
        codes = codes_of(numbers, which.start, self.numbers.num_columns, self.kind, self.fit)
        scale, zero = bits_of(self.fit.scale), self.fit.zero.numpy()
        last = np.int32(2**self.kind.bits - 1)
        matrix = (self.numbers.num_columns, self.kind.group, last, scale, zero, self.is_half)
        return coded.bits, coded.differs, codes, which.start, matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    numbers: Numbers
    survey: ResidualSurvey
    number: int
    first_word: int
    first_exception: int

    def encode(self, arrays: Arrays, remainder: Remainder) -> None:
        end = self.first_word + self.survey.words[self.number]
        word, exception = self.first_word, self.first_exception
        last_exception = exception + self.survey.exceptions[self.number]
        start = self.number * RUN
        for which in _chunks(start, start + RUN, self.numbers.size):
            coded = _Coded.of(self.numbers, which, self.survey.is_half)
            places = np.empty(last_exception - exception, np.int32)
            num_words, num_places = self._write(which, coded, arrays, word, end, places)
            if word + num_words > end or num_places > places.size:
                raise changed()
            _check(arrays, which.start, coded, places[:num_places])
            self._write_exceptions(places[:num_places] + np.int32(which.start), exception, remainder)
            word, exception = word + num_words, exception + num_places
        if (word, exception) != (end, last_exception):
            raise changed()

    def _write(
        self, which: slice, coded: _Coded, arrays: Arrays, word: int, end: int, places: NDArray[np.int32]
    ) -> tuple[int, int]:
        codes = np.empty(coded.bits.size, np.uint8)
        unpack(arrays.codes, which.start, arrays.matrix[0], arrays.kind.bits, codes)
        offsets = arrays.offsets[which.start // BLOCK :]
        written: tuple[int, int] = write_fields(
            coded.bits,
            coded.differs,
            codes,
            which.start,
            arrays.matrix,
            arrays.widths,
            arrays.words[:end],
            word,
            offsets,
            places,
        )
        return written

    def _write_exceptions(self, positions: NDArray[np.int32], first: int, remainder: Remainder) -> None:
        there = slice(first, first + positions.size)
        remainder.positions.numpy()[there] = positions
        bits_of(remainder.exceptions)[there] = bits_of(self.numbers.tensor)[positions]


def _check(arrays: Arrays, start: int, coded: _Coded, places: NDArray[np.int32]) -> None:
    """Decodes what was written."""
    found = np.empty(coded.bits.size, np.uint16)
    arrays.read(start, found)
    wrong = found != coded.bits
    if coded.differs.size:
        wrong |= coded.differs
    wrong[places] = False
    if wrong.any():
        raise changed()


def _row_runs(numbers: Numbers) -> Iterator[slice]:
    step = max(RUN // max(numbers.num_columns, 1), 1)
    for start in range(0, numbers.num_rows, step):
        yield slice(start, min(start + step, numbers.num_rows))


def _chunks(start: int, stop: int, size: int) -> Iterator[slice]:
    for first in range(start, min(stop, size), CHUNK):
        yield slice(first, min(first + CHUNK, stop, size))


def _starts(counts: tuple[int, ...]) -> list[int]:
    return [0, *np.cumsum(counts[:-1]).tolist()] if counts else []
