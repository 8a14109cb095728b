"""Pure: the timeline of a run of rounds, worked out from the schedule and the seconds of its parts.

Follows streaming/schedule.py step by step: the link copies one layer at a time, a slot takes its next layer when its last one
has been used, compute waits for each layer's copy, and the ring is filled ahead, from disk or from memory that is not pinned.
So what hides under what is not a formula but the outcome, and holds where formulas for it break: few layers, few slots, a
disk in between.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import numpy.typing as npt

from ..weights.placement import RING_BUFFERS, Placement

Floats = npt.NDArray[np.float64]

WARM_ROUNDS = 2  # after which rounds repeat; with wake_s, a few go on to swing, by about a percent where layers are many


@dataclass(frozen=True, slots=True, kw_only=True)
class PartTimes:
    """Seconds of a round's parts. By layer: copy_s over the link, read_s from disk into the ring, move_s from memory that is
    not pinned into the ring; layer_s is the compute of a layer, a number or one per candidate [C]; decode_s what is decoded in
    front of it, 0 for a layer that is stored as it computes, empty where all are; ahead_s is what is drafted ahead before a
    streamed layer is waited for, each a number or one per candidate, empty where nothing is. Each a number or [C]: before_s is
    drafting, after_s what follows the last layer: head, verification, commit. A layer that waited for its copy takes as much
    longer, but at most wake_s."""

    copy_s: Sequence[float]
    read_s: Sequence[float]
    move_s: Sequence[float]
    before_s: npt.ArrayLike
    layer_s: Sequence[float | Floats]
    decode_s: Sequence[float] = ()
    ahead_s: Sequence[float | Floats] = ()
    after_s: npt.ArrayLike
    wake_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundTimes:
    """Seconds of a steady round, [C] each. pass_s runs from the end of drafting to the end of the last layer."""

    round_s: Floats
    pass_s: Floats


def steady_round(placement: Placement, num_slots: int, parts: PartTimes) -> RoundTimes:
    """Times of a round in the steady state, for all candidates at once."""
    before_s, after_s = (np.asarray(x, dtype=np.float64) for x in (parts.before_s, parts.after_s))
    if not placement.streamed:
        pass_s = np.sum(np.asarray(parts.layer_s, dtype=np.float64), axis=0)
        if parts.decode_s:
            pass_s = pass_s + sum(parts.decode_s[layer] for layer in placement.coded)
        return RoundTimes(round_s=before_s + pass_s + after_s, pass_s=pass_s)
    timeline = _Timeline(placement, parts, np.zeros(np.broadcast(before_s, parts.layer_s[0], after_s).shape))
    for _ in range(num_slots):
        timeline.fetch()
    began = drafted = timeline.now
    decode_s = parts.decode_s or [0.0] * placement.num_layers
    for _ in range(WARM_ROUNDS + 1):
        began = timeline.now
        drafted = timeline.now = began + before_s
        for layer, layer_s in enumerate(parts.layer_s):
            if layer in placement.resident:
                timeline.now = timeline.now + (decode_s[layer] if layer in placement.coded else 0.0) + layer_s
                continue
            if parts.ahead_s:
                timeline.now = timeline.now + parts.ahead_s[layer]
            if decode_s[layer]:
                timeline.wait()
                timeline.now = timeline.now + decode_s[layer]
                timeline.fetch()
                timeline.now = timeline.now + layer_s
            else:
                timeline.wait()
                timeline.now = timeline.now + layer_s
                timeline.fetch()
        computed = timeline.now
        timeline.now = computed + after_s
    return RoundTimes(round_s=timeline.now - began, pass_s=computed - drafted)


class _Timeline:
    """When the link and the ring's thread are free, and when copies under way will have landed, in order of their fetches."""

    def __init__(self, placement: Placement, parts: PartTimes, zero: Floats) -> None:
        self.now = self._link_free = self._thread_free = zero
        self._parts = parts
        self._fill_s = {layer: parts.read_s[layer] for layer in placement.disk}
        self._fill_s |= {layer: parts.move_s[layer] for layer in placement.pageable}
        self._streamed = cycle(placement.streamed)
        self._copied: deque[Floats] = deque()
        self._ring = deque([zero] * RING_BUFFERS)

    def fetch(self) -> None:
        """Queue the copy of the next layer of the cycle into a slot that is free now."""
        start = np.maximum(self._link_free, self.now)
        layer = next(self._streamed)
        if layer in self._fill_s:
            self._thread_free = np.maximum(self._thread_free, self._ring.popleft()) + self._fill_s[layer]
            self._link_free = np.maximum(start, self._thread_free) + self._parts.copy_s[layer]
            self._ring.append(self._link_free)
        else:
            self._link_free = start + self._parts.copy_s[layer]
        self._copied.append(self._link_free)

    def wait(self) -> None:
        """For the earliest copy under way."""
        arrived = np.maximum(self.now, self._copied.popleft())
        if self._parts.wake_s:
            arrived = arrived + np.minimum(arrived - self.now, self._parts.wake_s)
        self.now = arrived
