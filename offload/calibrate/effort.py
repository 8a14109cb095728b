"""How much of a machine to measure, and what a table of times is."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..config import LawKind
from ..errors import OutOfMemoryError

LEAST_POINTS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much to measure. `laws`: the kinds of laws that are drawn from and verified, first the one that drafts draw from.
    Work is repeated `repeats` times at least, and for `point_s`; a table ends at the first point that takes longer than
    `longest_s`."""

    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    laws: tuple[LawKind, ...]
    repeats: int
    point_s: float
    longest_s: float
    copy_bytes: int
    disk_s: float


QUICK = Effort(
    rows=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
    contexts=(512,),
    laws=("greedy", "sampled", "nucleus"),
    repeats=3,
    point_s=0.04,
    longest_s=0.03,
    copy_bytes=2**26,
    disk_s=0.3,
)
FULL = Effort(
    rows=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 2048, 4096),
    contexts=(64, 1024, 4096),
    laws=("greedy", "sampled", "nucleus"),
    repeats=3,
    point_s=0.2,
    longest_s=0.5,
    copy_bytes=2**30,
    disk_s=3.0,
)


def table_of(
    rows: Sequence[int], seconds_at: Callable[[int], Sequence[float]], effort: Effort
) -> tuple[tuple[int, ...], tuple[tuple[float, ...], ...]]:
    """The numbers of rows that were measured, and a column for each of the times at them. It ends with the first row whose
    last time is longer than `longest_s`, where it goes on nobody knows from fewer than LEAST_POINTS, or where the device's
    memory does: float64 noise for thousands of rows of a large vocabulary takes GiB. OutOfMemoryError if that is the first."""
    lines: list[Sequence[float]] = []
    for num_rows in rows:
        try:
            lines.append(seconds_at(num_rows))
        except OutOfMemoryError:
            if not lines:
                raise
            break
        if len(lines) >= LEAST_POINTS and lines[-1][-1] > effort.longest_s:
            break
    return tuple(rows[: len(lines)]), tuple(zip(*lines, strict=True))


def rising(seconds: Sequence[float]) -> tuple[float, ...]:
    """The nearest ones, in least squares, that never fall (pool adjacent violators: Barlow et al., Statistical Inference under
    Order Restrictions, 1972). More rows take no less time: a measurement which says so is noise."""
    pools: list[list[float]] = []
    for value in seconds:
        pools.append([value])
        while len(pools) > 1 and statistics.fmean(pools[-2]) > statistics.fmean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    return tuple(statistics.fmean(pool) for pool in pools for _ in pool)
