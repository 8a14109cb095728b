"""Run the schedule on a device: an iterator over the layers' weights, in order, pass after pass.

Knows nothing of models or trees. A pass is a generator: asking for the next layer ends the use of the previous one, releases
its slot and queues the slot's next copy. An abandoned or failed pass leaves the stream ready to start over.
"""

import statistics
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from ..device import CopyTicket, Device, Interval, Ticket
from ..weights.placement import Placement
from ..weights.ring import RingFill
from ..weights.store import WeightStore
from .schedule import Fetch, first_fetches, pass_steps

Weights = Mapping[str, torch.Tensor]

LINK_SAMPLES = 4


@dataclass(frozen=True, slots=True)
class LayerUse:
    """Tickets of one layer in one pass: its copy (None when resident) and the end of its compute."""

    layer: int
    copy: CopyTicket | None
    done: Ticket


@dataclass(slots=True)
class PassLog:
    start: Ticket
    uses: list[LayerUse] = field(default_factory=list)
    start_s: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True, kw_only=True)
class PassProgress:
    """How far a pass has come: computed layers, and what was streamed for them in the `elapsed_s` since it began."""

    layers_done: int
    num_layers: int
    streamed_bytes: int
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class LayerTiming:
    """One layer in one pass. `stall_s` is how long compute had nothing to do but wait for the copy."""

    layer: int
    copy: Interval | None
    compute: Interval
    stall_s: float


class ResidentWeights:
    """All layers on the device: the same iterator without a stream."""

    def __init__(self, layers: list[Weights]) -> None:
        self._layers = layers

    def one_pass(self) -> Iterator[Weights]:
        return iter(self._layers)

    def close(self) -> None:
        self._layers = []


class LayerStream:
    """Yields the layers of `store` in order, streaming what is not resident through `num_slots` device buffers."""

    def __init__(self, device: Device, store: WeightStore, num_slots: int) -> None:
        assert num_slots >= 1 or not store.placement.streamed
        self.layer_bytes = store.layout.num_bytes
        self.log: PassLog | None = None
        self._device, self._store = device, store
        self._num_layers = store.placement.num_layers
        self._slots = [device.alloc(self.layer_bytes) for _ in range(num_slots if store.placement.streamed else 0)]
        self._see_placement()
        self._free: list[Ticket] = []
        self._queue: deque[Fetch] = deque()
        self._flying: dict[int, CopyTicket] = {}
        self._pass_number = -1  # no copy is under way

    @property
    def bytes_per_pass(self) -> int:
        return self.layer_bytes * len(self._streamed)

    @property
    def num_slots(self) -> int:
        return len(self._slots)

    @property
    def placement(self) -> Placement:
        """Which layer lives where, as it came out."""
        return self._store.placement

    def take_ring_fills(self) -> list[RingFill]:
        """Layers brought through the ring since the last call, for the trace."""
        return self._store.take_fills()

    def progress(self) -> PassProgress:
        """Of the newest pass, under way or ended. Any thread may ask, as often as it likes: nothing waits for the device."""
        log = self.log
        done = [use for use in log.uses if self._device.passed(use.done)] if log is not None else []
        return PassProgress(
            layers_done=len(done),
            num_layers=self._num_layers,
            streamed_bytes=self.layer_bytes * sum(use.copy is not None for use in done),
            elapsed_s=time.monotonic() - log.start_s if log is not None else 0.0,
        )

    def measure_link(self) -> float | None:
        """Bytes per second of the fastest of a few whole-layer copies, with nothing else under way; None when no layer is
        streamed. Before the first pass only: it scribbles on a slot."""
        if not self._slots:
            return None
        assert self._pass_number < 0
        rates: list[float] = []
        for _ in range(LINK_SAMPLES):
            ticket = self._copy_any()
            self._device.drain(ticket)
            interval = self._device.interval(ticket)
            rates.append(self.layer_bytes / max(interval.end_s - interval.start_s, 1e-9))
        return max(rates)

    def measure_move(self) -> float | None:
        """Bytes per second at which layers that are not pinned get into the ring while the link is busy; None when there are
        none. Before the first pass, or after `give_up`: it scribbles on a slot."""
        if not self.placement.pageable:
            return None
        assert self._pass_number < 0
        times_s: list[float] = []
        for _ in range(LINK_SAMPLES):
            ticket = self._copy_any()
            times_s.append(self._store.time_move())
            self._device.drain(ticket)
        return self.layer_bytes / max(statistics.median(times_s), 1e-9)

    def give_up(self, placement: Placement, num_slots: int) -> None:
        """Go on with fewer resident layers; between passes. Their buffers become slots while there are fewer than `num_slots`,
        the others are free once nobody else holds them. HostMemoryError when the host has no room: then all stays as it is."""
        self._abandon()
        buffers = self._store.give_up(placement)
        self._slots += buffers[: num_slots - len(self._slots)]
        self._see_placement()

    def close(self) -> None:
        """Let copies under way land, so that their memory may go; and let go of ours."""
        self._abandon()
        for views in (self._slots, self._views, self._resident):
            views.clear()
        self.log = None

    def prefetch(self) -> None:
        """Start the next pass's first copies, those that are not under way already, so that they hide what comes before it."""
        try:
            if self._pass_number < 0:
                self._start_over()
            self._send(None)
        except BaseException:
            self._abandon()
            raise

    def one_pass(self) -> Iterator[Weights]:
        """The weights of layers 0, 1, ...; each is valid until the next is asked for. Errors of a copy are raised here."""
        self.prefetch()
        self.log = PassLog(self._device.mark())
        try:
            yield from self._run_pass(self.log)
            self._pass_number += 1
        except BaseException:
            self._abandon()
            raise

    def _run_pass(self, log: PassLog) -> Iterator[Weights]:
        for step in pass_steps(self._num_layers, self._streamed, len(self._slots), self._pass_number):
            if isinstance(step, Fetch):
                self._free[step.slot] = log.uses[-1].done
                self._queue.append(step)
                self._send(None)
            elif step.slot is None:
                yield self._resident[step.layer]
                log.uses.append(LayerUse(step.layer, None, self._device.mark()))
            else:
                self._send(step.slot)
                copy = self._flying.pop(step.slot)
                slot = self._device.wait(copy)
                yield self._views[step.slot]
                log.uses.append(LayerUse(step.layer, copy, self._device.release(slot)))

    def _send(self, needed_slot: int | None) -> None:
        """Queue copies whose source is at hand. A layer that the ring has not brought holds back those behind it in the ring
        and no others; block for it only while `needed_slot` is among the waiting."""
        held_back = False
        for fetch in tuple(self._queue):
            urgent = needed_slot is not None and needed_slot not in self._flying
            if self._store.through_ring(fetch.layer) and not urgent:
                held_back = held_back or not self._store.ready(fetch.layer)
                if held_back:
                    continue
            source = self._store.source(fetch.layer)
            self._queue.remove(fetch)
            ticket = self._device.copy_async(self._slots[fetch.slot], source, self._free[fetch.slot])
            self._store.sent(fetch.layer, ticket)
            self._flying[fetch.slot] = ticket

    def _start_over(self) -> None:
        self._pass_number = 0
        self._free = [self._device.mark() for _ in self._slots]
        self._queue.extend(first_fetches(self._streamed, len(self._slots)))

    def _see_placement(self) -> None:
        self._streamed = self._store.placement.streamed
        self._resident = self._store.resident
        self._views = [self._store.layout.views(slot) for slot in self._slots]

    def _abandon(self) -> None:
        """Let copies under way land, those that compute waits for, too; forget the rest. The next pass fills all slots anew.
        Waiting fails on a device that is lost: then, too, nothing of the old pass is remembered."""
        try:
            self._device.drain_copies()
            self._device.drain(self._device.mark())
        finally:
            self._flying.clear()
            self._queue.clear()
            self._pass_number = -1
            self._store.start_over()

    def _copy_any(self) -> CopyTicket:
        return self._device.copy_async(self._slots[0], self._store.any_direct_layer(), self._device.mark())


def layer_timings(device: Device, log: PassLog) -> list[LayerTiming]:
    """What happened in a finished pass; call it after the pass's host sync."""
    timings: list[LayerTiming] = []
    previous_s = device.interval(log.start).end_s
    for use in log.uses:
        copy = device.interval(use.copy) if use.copy is not None else None
        stall_s = max(0.0, copy.end_s - previous_s) if copy is not None else 0.0
        compute = Interval(previous_s + stall_s, device.interval(use.done).end_s)
        timings.append(LayerTiming(use.layer, copy, compute, stall_s))
        previous_s = compute.end_s
    return timings
