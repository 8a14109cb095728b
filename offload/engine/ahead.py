"""Drafts that grow ahead while a pass runs: which steps, and when they come.

How many steps there are is the plan's, never the clock's, so a seed repeats a text. On a device that computes at once they are
shared out to the layers that are waited for, and so they are where layers come from a ring, which keeps the host. Elsewhere all
come when the pass has been issued, beside it.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from tree.draft import DraftContext

from ..device import Device, Ticket
from ..errors import OutOfMemoryError
from ..weights.placement import Placement, shared_out


@dataclass(slots=True)
class AheadTimes:
    """When the steps of one pass were taken, in `spans`; and when those before a layer ended, where they keep the host."""

    spans: list[tuple[float, float]] = field(default_factory=list)
    until_s: dict[int, float] = field(default_factory=dict)


class GrowthAhead:
    """Of one pass: `steps[k]` steps of `drafts[k]`, each in turn. `nodes[k]` is how many nodes that brought; `times` says when.
    An error of memory ends it, and is `failed`: the pass itself goes on."""

    def __init__(self, device: Device, drafts: Sequence[DraftContext], steps: Sequence[int], placement: Placement) -> None:
        self._device, self._drafts = device, drafts
        self._due = [draft for turn in range(max(steps, default=0)) for draft, most in enumerate(steps) if turn < most]
        waits = device.at_once or placement.through_ring
        self._before = shared_out(len(self._due), placement.streamed) if waits else {}
        self._begun: Ticket | None = None
        self.nodes = [0] * len(drafts)
        self.times = AheadTimes()
        self.failed: OutOfMemoryError | None = None

    def begin(self) -> None:
        """The pass comes now, and whatever drafts know has been issued."""
        if self._due:
            self._begun = self._device.mark()

    def before_layer(self, layer: int) -> None:
        for _ in range(self._before.get(layer, 0)):
            if self._due:
                self._step()
                if self._device.at_once:
                    self.times.until_s[layer] = self.times.spans[-1][1]

    def finish(self) -> None:
        """The pass has been issued: what is left comes now."""
        while self._due:
            self._step()

    def _step(self) -> None:
        draft, start_s = self._due.pop(0), time.monotonic()
        assert self._begun is not None
        try:
            with self._device.translated(), self._device.beside(self._begun):
                self.nodes[draft] += self._drafts[draft].grow_ahead()
        except OutOfMemoryError as error:
            self.failed = error.with_traceback(None)  # which holds all that was computed
            self._due.clear()
        self.times.spans.append((start_s, time.monotonic()))
