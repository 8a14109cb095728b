"""Pure: how a small Llama lies inside a wide one, so that both compute the same function.

The small model's residual stream x occupies the first n of the wide one's N dimensions, its heads and neurons the first of
theirs. What the others read is arbitrary; what they write to the residual stream is zero, so it stays x.

    residual   | x | x | 0 ...................... 0 |     `copies` times x, see below
    RMSNorm    gain w * sqrt(share) on the first x, 0 on its other copies; epsilon * share

RMSNorm divides by the root of a mean over N dimensions, of which x fills copies * n: the mean is `share` = copies * n / N
times the small model's. `copies` is the least number that makes `share` a power of four, so that gains and epsilon are
scaled by powers of two and 16-bit weights stay exact: 256 in 8192 dimensions takes two copies, and the gains are w / 4.

A head of d dimensions lies in one of D = m * d. Rotary embedding turns dimensions j and j + d / 2 by an angle of
theta ** (-2 j / d); so do m * j and m * j + D / 2 in the wide head, with the small model's theta. Scores are divided by
sqrt(D) instead of sqrt(d), which the queries make up for.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of a decoder with grouped-query attention and a gated MLP."""

    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """`small` inside `wide`. ValueError naming the size that is too small for it."""

    small: Sizes
    wide: Sizes

    def __post_init__(self) -> None:
        small, wide = self.small, self.wide
        if wide.head_dim % small.head_dim:
            raise ValueError(f"its heads of {wide.head_dim} dimensions are no multiple of {small.head_dim}")
        least = {
            "hidden size": (wide.hidden, small.hidden),
            "intermediate size": (wide.intermediate, small.intermediate),
            "number of key/value heads": (wide.num_kv_heads, small.num_kv_heads * self._kv_copies),
        }
        for name, (found, needed) in least.items():
            if found < needed:
                raise ValueError(f"its {name} is {found}, and {needed} are needed")

    @property
    def copies(self) -> int:
        """How often x stands in the residual stream; 1 where no number gives exact gains."""
        most = self.wide.hidden // self.small.hidden
        exact = (copies for copies in range(1, most + 1) if _is_power_of_four(self.wide.hidden, copies * self.small.hidden))
        return next(exact, 1)

    @property
    def share(self) -> float:
        return self.copies * self.small.hidden / self.wide.hidden

    @property
    def gain(self) -> float:
        return math.sqrt(self.share)

    @property
    def query_scale(self) -> float:
        return math.sqrt(self.wide.head_dim / self.small.head_dim)

    @property
    def head_dims(self) -> tuple[int, ...]:
        """Where the small head's dimensions lie in a wide head."""
        step, half = self.wide.head_dim // self.small.head_dim, self.small.head_dim // 2
        return tuple(step * j + side * self.wide.head_dim // 2 for side in (0, 1) for j in range(half))

    @property
    def query_heads(self) -> tuple[int, ...]:
        """The wide head of each small query head."""
        return tuple(
            self._kv_head(head) * self.wide.group + head % self.small.group % self.wide.group
            for head in range(self.small.num_heads)
        )

    @property
    def kv_heads(self) -> tuple[tuple[int, int], ...]:
        """(small, wide) key/value heads. Where wide groups are smaller, one small head serves in several places."""
        return tuple(sorted({(head // self.small.group, self._kv_head(head)) for head in range(self.small.num_heads)}))

    @property
    def _kv_copies(self) -> int:
        return -(-self.small.group // self.wide.group)

    def _kv_head(self, head: int) -> int:
        kv_head, rank = divmod(head, self.small.group)
        return kv_head * self._kv_copies + rank // self.wide.group


def _is_power_of_four(numerator: int, denominator: int) -> bool:
    quotient, rest = divmod(numerator, denominator)
    return rest == 0 and quotient.bit_count() == 1 and quotient.bit_length() % 2 == 1
