"""What a base lacks of a 16-bit matrix, in 7.4 bits a weight beside four: the widths are implied by what is on the device.

Numbers are bfloat16 or float16, m the bits of their mantissa, 7 or 10; o(x) are the bits of |x|, an integer that grows with it.
Beside a code k = q - z with scale s (base_layout.py) a weight w is told by a field of `widths[|k|]` bits:

    k != 0   o(w) - o(p) in two's complement, with p = |k| s rounded to the dtype; the sign of w is that of k. The bin is s wide
             and the numbers at k s are k times denser than at s, so the wider |k|, the fewer bits.
    k = 0    the sign of w in the highest bit, and how far |w| lies below the edge of its bin: o(s/2) - o(w)

What does not fit is an exception. Of a parameter `weight` of N numbers, in order, in K = ceil(N / 1024) blocks:

    weight_remainder   [W + 1] int32        the fields of each block from the low bits up, beginning with a word of its own; and
                                            a word that nobody needs, as two are read for every field. Of float16 numbers that
                                            were not bfloat16 before, it is called weight_remainder_half
    weight_widths      [2**bits] uint8      bits of a field by |k|, 16 at most
    weight_offsets     [K] int32            the word that the block begins with
    weight_positions   [X] int32            where numbers are others than their fields say, ascending
    weight_exceptions  [X] the dtype        and what is there

float16 weights that were cast from bfloat16, as many are, are coded as the bfloat16 numbers they came from. Published nowhere,
as far as is known; that a quantised copy tells the first bits of every weight is all there is to it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from .base_kinds import BaseKind
from .tensor_codec import Part

BLOCK: Final = 1024  # weights
WORD_BITS: Final = 32
MAX_WIDTH: Final = 16
MAX_WEIGHTS: Final = 2**31 - BLOCK  # whole blocks of them are counted in int32
HALF: Final = "remainder_half"


@dataclass(frozen=True, slots=True, kw_only=True)
class Remainder:
    """The tensors that are stored of one parameter, see above. `is_half`: its numbers are float16, else bfloat16."""

    words: torch.Tensor
    widths: torch.Tensor
    offsets: torch.Tensor
    positions: torch.Tensor
    exceptions: torch.Tensor
    is_half: bool

    @classmethod
    def of(cls, parts: Mapping[str, torch.Tensor], prefix: str) -> "Remainder":
        is_half = prefix + HALF in parts
        return cls(
            words=parts[prefix + (HALF if is_half else "remainder")],
            widths=parts[f"{prefix}widths"],
            offsets=parts[f"{prefix}offsets"],
            positions=parts[f"{prefix}positions"],
            exceptions=parts[f"{prefix}exceptions"],
            is_half=is_half,
        )

    @property
    def num_blocks(self) -> int:
        return self.offsets.shape[0]


def remainder_parts(
    prefix: str, num_weights: int, kind: BaseKind, *, num_words: int, num_exceptions: int, dtype: torch.dtype, is_half: bool
) -> tuple[Part, ...]:
    """`prefix` is that of lossless_layout.prefix_of; `num_words` without the one that nobody needs."""
    tensors = {
        HALF if is_half else "remainder": ((num_words + 1,), torch.int32),
        "widths": ((2**kind.bits,), torch.uint8),
        "offsets": ((-(-num_weights // BLOCK),), torch.int32),
        "positions": ((num_exceptions,), torch.int32),
        "exceptions": ((num_exceptions,), dtype),
    }
    return tuple(Part(name=prefix + name, shape=shape, dtype=of) for name, (shape, of) in tensors.items())
