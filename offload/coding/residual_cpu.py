"""The code of residual_layout.py decoded on a CPU. Imports numba."""

from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from .base_encode import bits_of
from .base_kinds import BaseKind
from .base_layout import Base
from .base_loops import unpack
from .exceptions import write_exceptions
from .lossless_numpy import Bits
from .number_loops import halve_bfloats, widen_bfloats, widen_halves
from .residual_layout import BLOCK, MAX_WIDTH, Remainder
from .residual_loops import read_fields

CHUNK: Final = 128 * BLOCK  # weights at a time: what is made on the way stays in a core's own cache
RUN: Final = 2**21  # weights that are worth a thread
_FEW: Final = 2**14  # weights that torch converts in the thread that asks


def decode_on_cpu(remainder: Remainder, base: Base, kind: BaseKind, parameter: torch.Tensor) -> None:
    """Large parameters by as many threads as torch computes with."""
    arrays = Arrays(remainder, base, kind, parameter.shape[-1])
    weights = parameter.view(-1)
    starts = range(0, weights.numel(), RUN)
    num_threads = min(torch.get_num_threads(), len(starts))
    if num_threads > 1:
        with ThreadPoolExecutor(num_threads, thread_name_prefix="residual-decoder") as pool:
            list(pool.map(lambda start: _decode_run(arrays, weights, start), starts))
    else:
        for start in starts:
            _decode_run(arrays, weights, start)
    write_exceptions(remainder.positions, remainder.exceptions, parameter)


def every_width(widths: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[256], of `widths` [A], of which damage makes none wider than MAX_WIDTH."""
    found = np.zeros(256, np.uint8)
    found[: widths.size] = np.minimum(widths, MAX_WIDTH)
    return found


class Arrays:
    """A remainder and its base as numpy has them, of a matrix of `num_columns`."""

    def __init__(self, remainder: Remainder, base: Base, kind: BaseKind, num_columns: int) -> None:
        self.words = remainder.words.numpy().view(np.uint32)
        self.offsets = remainder.offsets.numpy()
        self.widths = every_width(remainder.widths.numpy())
        self.is_half = remainder.is_half
        self.kind, self.codes = kind, base.codes.numpy()
        last = np.int32(2**kind.bits - 1)
        self.matrix = (num_columns, kind.group, last, bits_of(base.scale), base.zero.numpy(), self.is_half)

    def read(self, start: int, numbers: Bits) -> None:
        """Fills `numbers`, those from `start` on, which begin with a block; exceptions are what their fields say."""
        codes = np.empty(numbers.size, np.uint8)
        unpack(self.codes, start, self.matrix[0], self.kind.bits, codes)
        read_fields(self.words, self.offsets[start // BLOCK :], codes, start, self.matrix, self.widths, numbers)


def _decode_run(arrays: Arrays, weights: torch.Tensor, start: int) -> None:
    dtype = torch.float16 if arrays.is_half else torch.bfloat16
    for first in range(start, min(start + RUN, weights.numel()), CHUNK):
        into = weights[first : first + CHUNK]
        if into.dtype == dtype:
            arrays.read(first, bits_of(into))
            continue
        numbers = np.empty(into.numel(), np.uint16)
        arrays.read(first, numbers)
        _convert(numbers, arrays.is_half, into)


def _convert(numbers: Bits, are_half: bool, into: torch.Tensor) -> None:
    if into.dtype == torch.float32:
        words = into.view(torch.int32).numpy().view(np.uint32)
        (widen_halves if are_half else widen_bfloats)(numbers, words)
    elif into.dtype == torch.float16:
        halve_bfloats(numbers, bits_of(into))
    else:
        dtype = torch.float16 if are_half else torch.bfloat16
        there = torch.from_numpy(numbers.view(np.int16)).view(dtype)
        for few, place in zip(there.split(_FEW), into.split(_FEW), strict=True):
            place.copy_(few)
