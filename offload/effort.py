"""How much of a machine to measure, and how one piece of work is timed."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .device import Device

LEAST_POINTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much to measure. `laws`: work on laws, sampled (True) or greedy. Work is repeated `repeats` times at least, and for
    `point_s`; a row of a table ends at the first point that takes longer than `longest_s`."""

    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    laws: tuple[bool, ...]
    repeats: int
    point_s: float
    longest_s: float
    copy_bytes: int
    disk_s: float


QUICK = Effort(
    rows=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
    contexts=(512,),
    laws=(False, True),
    repeats=3,
    point_s=0.04,
    longest_s=0.1,
    copy_bytes=2**26,
    disk_s=0.3,
)
FULL = Effort(
    rows=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 2048, 4096),
    contexts=(64, 1024, 4096),
    laws=(False, True),
    repeats=3,
    point_s=0.2,
    longest_s=0.5,
    copy_bytes=2**30,
    disk_s=3.0,
)


def typical_s(device: Device, work: Callable[[], object], effort: Effort) -> float:
    """Seconds of `work`, warmed up; what takes longer than `longest_s` is done no more than twice. A round adds up many such
    times, and their distributions have long tails, so the mean counts, not the median; the longest is left out as a hiccup."""
    times: list[float] = []
    while len(times) <= effort.repeats or sum(times) < effort.point_s:
        start = device.mark()
        work()
        end = device.mark()
        device.drain(end)
        times.append(device.interval(end).end_s - device.interval(start).end_s)
        if len(times) > 1 and min(times) > effort.longest_s:
            break
    warm = sorted(times[1:])
    return statistics.fmean(warm[:-1] or warm)


def enough(seconds: Sequence[float], effort: Effort) -> bool:
    """Whether a row of a table ends here. Where it goes on nobody knows from fewer than LEAST_POINTS."""
    return len(seconds) >= LEAST_POINTS and seconds[-1] > effort.longest_s


def rising(seconds: Sequence[float]) -> tuple[float, ...]:
    """The nearest ones, in least squares, that never fall (pool adjacent violators: Barlow et al., Statistical Inference under
    Order Restrictions, 1972). More rows take no less time: a measurement which says so is noise."""
    pools: list[list[float]] = []
    for value in seconds:
        pools.append([value])
        while len(pools) > 1 and statistics.fmean(pools[-2]) > statistics.fmean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    return tuple(statistics.fmean(pool) for pool in pools for _ in pool)
