"""How a base is fitted to a matrix and written: rounded to nearest, in a range searched for each group. Imports numba."""

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from .base_kinds import BaseKind
from .base_layout import Base
from .base_loops import choose_codes, fit_rows, pack_rows
from .lossless_numpy import Bits, Cast
from .number_loops import cut_halves
from .residual_survey import Fit

# Of the range of a group's values: what is cut off at its ends is worth it if the other steps become so much smaller.
SHRINKS: Final = np.array([1, 0.94, 0.87, 0.8], np.float32)
_FEW: Final = 2**14  # weights that torch converts in the thread that asks
_NONE: Final = np.zeros(0, np.bool_)


class Numbers:
    """A matrix [N, K] on the CPU, contiguous and of any float dtype, as the bfloat16 numbers that a base is fitted to, flat."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor.detach().view(-1)
        self.num_rows, self.num_columns = tensor.shape
        self.size = tensor.numel()

    def cast(self, which: slice) -> Cast:
        """float16 numbers are cut off, others rounded; where `differs` of a float16 matrix, they are others. Of other dtypes it
        is empty."""
        if self.tensor.dtype == torch.bfloat16:
            return Cast(bits=bits_of(self.tensor[which]), differs=_NONE)
        if self.tensor.dtype == torch.float16:
            halves = bits_of(self.tensor[which])
            cast = Cast(bits=np.empty(halves.size, np.uint16), differs=np.empty(halves.size, np.bool_))
            cut_halves(halves, cast.bits, cast.differs)
            return cast
        pieces = [few.to(torch.bfloat16) for few in self.tensor[which].split(_FEW)]
        return Cast(bits=bits_of(torch.cat(pieces)), differs=_NONE)

    def of_rows(self, rows: slice) -> Bits:
        return self.cast(slice(rows.start * self.num_columns, rows.stop * self.num_columns)).bits


def bits_of(tensor: torch.Tensor) -> Bits:
    """Of a tensor of 16-bit numbers, contiguous, as numpy has them: the same memory."""
    bits: Bits = tensor.view(torch.int16).numpy().view(np.uint16)
    return bits


def fit_into(numbers: Numbers, rows: slice, kind: BaseKind, fit: Fit) -> None:
    """Fills these rows of `fit`."""
    scale, zero = bits_of(fit.scale[rows]), fit.zero[rows].numpy()
    fit_rows(numbers.of_rows(rows), numbers.num_columns, kind.group, 2**kind.bits - 1, SHRINKS, scale, zero)


def codes_of(bits: Bits, start: int, num_columns: int, kind: BaseKind, fit: Fit) -> NDArray[np.uint8]:
    """[N]: one in a byte, of `bits` [N], the numbers from `start` on."""
    codes = np.empty(bits.size, np.uint8)
    top = 2**kind.bits - 1
    choose_codes(bits, start, num_columns, kind.group, top, bits_of(fit.scale), fit.zero.numpy(), codes)
    return codes


def encode_rows(numbers: Numbers, rows: slice, kind: BaseKind, fit: Fit, into: Base) -> None:
    """Fills these rows of `into`."""
    codes = codes_of(numbers.of_rows(rows), rows.start * numbers.num_columns, numbers.num_columns, kind, fit)
    pack_rows(codes, numbers.num_columns, kind.bits, into.codes[rows].numpy())
    # numpy writes to whatever memory the caller has, in whichever thread: of tensors of inference torch does not let it
    bits_of(into.scale)[rows], into.zero.numpy()[rows] = bits_of(fit.scale)[rows], fit.zero.numpy()[rows]
