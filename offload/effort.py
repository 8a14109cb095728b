"""How much of a machine to measure, and how one piece of work is timed."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from .device import Device


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


def median_s(device: Device, work: Callable[[], object], effort: Effort) -> float:
    """Seconds of `work`, warmed up; what takes longer than `longest_s` is not repeated."""
    times: list[float] = []
    while len(times) <= effort.repeats or sum(times) < effort.point_s:
        start = device.mark()
        work()
        end = device.mark()
        device.drain(end)
        times.append(device.interval(end).end_s - device.interval(start).end_s)
        if times[-1] > effort.longest_s:
            break
    return statistics.median(times[1:] or times)
