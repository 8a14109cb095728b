"""What is known of a matrix before it is taken apart: a base's scales, and how long its remainder will be. Knows no encoder."""

from dataclasses import dataclass
from typing import Final

import torch

from .base_kinds import BaseKind
from .base_layout import SCALE_DTYPE
from .residual_layout import WORD_BITS

EXCEPTION_BITS: Final = 32 + 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Of a matrix [N, K] in groups: see base_layout.py."""

    scale: torch.Tensor  # [N, G] bfloat16
    zero: torch.Tensor  # [N, G] uint8

    @classmethod
    def empty(cls, shape: tuple[int, int], kind: BaseKind) -> "Fit":
        groups = shape[0], -(-shape[1] // kind.group)
        return cls(scale=torch.empty(groups, dtype=SCALE_DTYPE), zero=torch.empty(groups, dtype=torch.uint8))


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidualSurvey:
    """What the code of a matrix needs to know of all of it. `words` and `exceptions` count those of each RUN."""

    fit: Fit
    is_half: bool
    widths: tuple[int, ...]
    words: tuple[int, ...]
    exceptions: tuple[int, ...]

    @property
    def num_words(self) -> int:
        return sum(self.words)

    @property
    def num_exceptions(self) -> int:
        return sum(self.exceptions)

    @property
    def num_bits(self) -> int:
        return WORD_BITS * self.num_words + EXCEPTION_BITS * self.num_exceptions
