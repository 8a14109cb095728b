"""Which low-bit copies of a model's layers there are, and what they take. Planning counts them, and does without torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

SCALE_BITS: Final = 16 + 8  # of each group: its scale and its zero point


@dataclass(frozen=True, slots=True)
class BaseKind:
    """Integers of `bits` bits, of which each `group` along the input share a scale and a zero point."""

    bits: int
    group: int

    @property
    def name(self) -> str:
        """As `--draft-model self:NAME` has it."""
        return f"int{self.bits}"

    @property
    def bits_per_weight(self) -> float:
        return self.bits + SCALE_BITS / self.group


# Smaller groups follow the weights more closely and take more: 24 bits of scale and zero point for each.
BASE_KINDS: Final[Mapping[str, BaseKind]] = {
    kind.name: kind for kind in (BaseKind(bits=8, group=128), BaseKind(bits=4, group=64), BaseKind(bits=3, group=64))
}
DEFAULT_BASE: Final = "int4"
