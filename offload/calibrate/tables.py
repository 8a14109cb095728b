"""Pure: what a table of times is, and what is made of times that contradict each other."""

import statistics
from collections.abc import Callable, Sequence

from ..errors import OutOfMemoryError
from .effort import Effort

LEAST_POINTS = 5


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
