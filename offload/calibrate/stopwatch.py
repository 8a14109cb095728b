"""How one piece of work is timed on a machine that has other work, and what is said when it cannot be."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..device import Device, Ticket
from .effort import Effort

MOST_SPREAD = 2.0  # between the halves of what was measured of one piece of work
MOST_TURNS = 3  # so often a measurement that contradicts itself is made; what it took is counted all together
MENTIONED_SHARE = 0.05  # of all measurements: with fewer that contradict themselves the others hold a table up


@dataclass(frozen=True, slots=True)
class Work:
    """Something to be timed: `run` may return the ticket from which on it counts, and does what is asked for `times` times."""

    run: Callable[[], object]
    times: int = 1


class Stopwatch:
    """Times work on `device`, and counts how often it found no answer that holds."""

    def __init__(self, device: Device, effort: Effort) -> None:
        self.device, self.effort = device, effort
        self.num_timed = self.num_doubtful = 0

    @property
    def doubts(self) -> tuple[str, ...]:
        """What a plan made with these times has to say about them."""
        if self.num_doubtful <= MENTIONED_SHARE * self.num_timed:
            return ()
        return (
            f"measured on a busy machine: {self.num_doubtful} of {self.num_timed} times contradicted themselves, "
            f"{MOST_TURNS} times over",
        )

    def seconds(self, works: Sequence[Work], holds: Callable[[Sequence[float]], bool] = lambda _: True) -> list[float]:
        """Seconds of each of `works`. Where two halves of what was measured differ by more than MOST_SPREAD, or where `holds`
        denies what came out, more is measured; then it counts as doubtful."""
        self.device.renew_clock()
        seen_s: list[list[float]] = [[] for _ in works]
        self.num_timed += 1
        for _ in range(MOST_TURNS):
            self._take_turns(works, seen_s)
            found = [typical_s(seen) / work.times for work, seen in zip(works, seen_s, strict=True)]
            if holds(found) and all(map(_agrees, seen_s)):
                return found
        self.num_doubtful += 1
        return found

    def _take_turns(self, works: Sequence[Work], seen_s: list[list[float]]) -> None:
        """Adds to `seen_s` what each takes, warmed up; what takes longer than `longest_s` is done no more than twice. They take
        turns: a machine whose speed changes changes it for all of them."""
        effort, new_s = self.effort, [list[float]() for _ in works]
        while any(len(new) <= effort.repeats or sum(new) < effort.point_s for new in new_s):
            for work, new in zip(works, new_s, strict=True):
                new.append(self._timed(work.run))
            if len(new_s[0]) > 1 and max(map(min, new_s)) > effort.longest_s:
                break
        for seen, new in zip(seen_s, new_s, strict=True):
            seen += new[1:]

    def _timed(self, run: Callable[[], object]) -> float:
        device, start = self.device, self.device.mark()
        began = run()
        end = device.mark()
        device.drain(end)
        return device.interval(end).end_s - device.interval(began if isinstance(began, Ticket) else start).end_s


def typical_s(seconds: Sequence[float]) -> float:
    """What one of many costs: the mean of all but the longest. A round adds up hundreds of such times, and on a machine with
    other work a large part of their sum is in a few that were interrupted: a median or another quantile does not see those, and
    would call a pass as quick as an idle machine's. A single hiccup is not the rule, however long, and is left out; of
    two, one stays, and shows in the spread between halves."""
    return statistics.fmean(sorted(seconds)[:-1] or seconds)


def _agrees(seconds: Sequence[float]) -> bool:
    """Whether those measured first and those measured last say the same, as nearly as MOST_SPREAD."""
    middle = len(seconds) // 2
    if middle < 2:
        return True
    first_s, last_s = typical_s(seconds[:middle]), typical_s(seconds[middle:])
    return max(first_s, last_s) <= MOST_SPREAD * min(first_s, last_s)
