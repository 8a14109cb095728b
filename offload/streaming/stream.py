"""Run the schedule on a device: an iterator over the layers' weights, in order, pass after pass.

Knows nothing of models or trees. A pass is a generator: asking for the next layer ends the use of the previous one, releases
its slot and queues the slot's next copy. A layer that is decoded leaves its slot before it is used. An abandoned or failed pass
leaves the stream ready to start over.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from ..device import CopyTicket, Device, Ticket
from ..weights.layout import views_of_each
from ..weights.placement import Placement
from ..weights.ring import RingFill
from ..weights.store import WeightStore
from .pass_log import LayerUse, PassLog
from .schedule import Decode, Fetch, first_fetches, pass_steps

Weights = Mapping[str, torch.Tensor]
BeforeLayer = Callable[[int], None]

LINK_SAMPLES = 4
NO_MEMORY = torch.empty(0, dtype=torch.uint8)


@dataclass(frozen=True, slots=True, kw_only=True)
class PassProgress:
    """How far a pass has come: computed layers, and what was streamed for them in the `elapsed_s` since it began."""

    layers_done: int
    num_layers: int
    streamed_bytes: int
    elapsed_s: float


class ResidentWeights:
    """All layers on the device: the same iterator without a stream."""

    def __init__(self, layers: list[Weights]) -> None:
        self._layers = layers

    def one_pass(self, before_layer: BeforeLayer | None = None) -> Iterator[Weights]:
        for layer, weights in enumerate(self._layers):
            if before_layer is not None:
                before_layer(layer)
            yield weights

    def close(self) -> None:
        self._layers = []


class LayerStream:
    """Yields the layers of `store` in order, streaming what is not resident through `num_slots` device buffers."""

    def __init__(self, device: Device, store: WeightStore, num_slots: int) -> None:
        assert num_slots >= 1 or not store.placement.streamed
        self.slot_bytes = store.slot_bytes
        self.log: PassLog | None = None
        self._device, self._store = device, store
        self._num_layers = store.placement.num_layers
        is_streaming = bool(store.placement.streamed)
        self._slots = [device.alloc(self.slot_bytes) for _ in range(num_slots if is_streaming else 0)]
        has_scratch = (is_streaming or store.placement.coded) and store.scratch_bytes
        self._scratch = device.alloc(store.scratch_bytes) if has_scratch else NO_MEMORY
        self._see_placement()
        self._free: list[Ticket] = []
        self._queue: deque[Fetch] = deque()
        self._flying: dict[int, CopyTicket] = {}
        self._pass_number = -1  # no copy is under way
        self._watchers: list[Callable[[], None]] = []

    @property
    def bytes_per_pass(self) -> int:
        return sum(self._store.stored_bytes[layer] for layer in self._streamed)

    @property
    def num_slots(self) -> int:
        return len(self._slots)

    @property
    def any_slot(self) -> torch.Tensor | None:
        """[slot_bytes] to write to before the first pass, if there is one."""
        return self._slots[0] if self._slots else None

    @property
    def scratch_bytes(self) -> int:
        """Device memory that layers are decoded into, one at a time."""
        return self._scratch.numel()

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
            streamed_bytes=sum(self._store.stored_bytes[use.layer] for use in done if use.copy is not None),
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
            num_bytes, ticket = self._copy_any()
            self._device.drain(ticket)
            interval = self._device.interval(ticket)
            rates.append(num_bytes / max(interval.end_s - interval.start_s, 1e-9))
        return max(rates)

    def measure_move(self) -> float | None:
        """Bytes per second at which layers that are not pinned get into the ring while the link is busy; None when there are
        none. Before the first pass, or after `evict`: it scribbles on a slot."""
        if not self.placement.pageable:
            return None
        assert self._pass_number < 0
        rates: list[float] = []
        for _ in range(LINK_SAMPLES):
            _, ticket = self._copy_any()
            rates.append(self._store.move_rate())
            self._device.drain(ticket)
        return statistics.median(rates)

    def evict(self, placement: Placement, num_slots: int) -> None:
        """Go on with fewer resident layers; between passes. Their buffers become the slots that are missing up to `num_slots`,
        and the scratch, where they are large enough; the others are free once nobody else holds them. HostMemoryError, or
        OutOfMemoryError for what is allocated: then all stays as it is."""
        self._abandon()
        spare = self._store.leaving(placement)
        slots = [self._memory(self.slot_bytes, spare) for _ in range(num_slots - len(self._slots))]
        scratch = self._scratch
        if scratch.numel() < self._store.scratch_bytes:
            scratch = self._memory(self._store.scratch_bytes, spare)
        self._store.evict(placement, spare)
        self._slots, self._scratch = [*self._slots, *slots], scratch
        self._see_placement()
        for moved in self._watchers:
            moved()

    def watch(self, moved: Callable[[], None]) -> None:
        """`moved` is called when resident layers have left the device: for those who hold them, too."""
        self._watchers.append(moved)

    def close(self) -> None:
        """Let copies under way land, so that their memory may go; and let go of ours."""
        self._abandon()
        for memory in (self._slots, self._views, self._targets, self._resident, self._coded, self._decoded):
            memory.clear()
        self._watchers.clear()
        self._scratch, self.log = NO_MEMORY, None

    def prefetch(self) -> None:
        """Start the next pass's first copies, those that are not under way already, so that they hide what comes before it."""
        try:
            if self._pass_number < 0:
                self._start_over()
            self._send(None)
        except BaseException:
            self._abandon()
            raise

    def one_pass(self, before_layer: BeforeLayer | None = None) -> Iterator[Weights]:
        """The weights of layers 0, 1, ...; each is valid until the next is asked for. Errors of a copy are raised here.
        `before_layer` is called with each when the slot of the one before is free, and its next copy queued, and this one is
        not waited for yet: work in there delays neither, as long as copies are under way."""
        self.prefetch()
        self.log = PassLog(self._device.mark())
        try:
            yield from self._run_pass(self.log, before_layer)
            self._pass_number += 1
        except BaseException:
            self._abandon()
            raise

    def _run_pass(self, log: PassLog, before_layer: BeforeLayer | None) -> Iterator[Weights]:
        copy: CopyTicket | None = None  # of the layer that was decoded last
        begun = -1
        for step in pass_steps(self._num_layers, self._streamed, len(self._slots), self._pass_number, self._decoded.keys()):
            if isinstance(step, Fetch):
                self._queue.append(step)
                self._send(None)
                continue
            if before_layer is not None and step.layer != begun:
                before_layer(begun := step.layer)
            if isinstance(step, Decode):
                copy = self._decode(step)
            elif step.slot is not None:
                arrived, stored = self._arrived(step.slot)
                yield self._views[step.slot][step.layer]
                self._free[step.slot] = done = self._device.release(stored)
                log.uses.append(LayerUse(step.layer, arrived, done))
            elif step.layer in self._decoded:
                yield self._decoded[step.layer]
                log.uses.append(LayerUse(step.layer, copy, self._device.release(self._scratch)))
            else:
                yield self._resident[step.layer]
                log.uses.append(LayerUse(step.layer, None, self._device.mark()))

    def _decode(self, step: Decode) -> CopyTicket | None:
        """Queue it, and the slot's release behind it. The copy that it waits for, if the layer is not resident."""
        decode = self._store.codecs[step.layer].decode
        assert decode is not None, "only layers that are decoded have this step"
        if step.slot is None:
            decode(self._coded[step.layer], self._decoded[step.layer])
            return None
        copy, stored = self._arrived(step.slot)
        decode(self._views[step.slot][step.layer], self._decoded[step.layer])
        self._free[step.slot] = self._device.release(stored)
        return copy

    def _arrived(self, slot: int) -> tuple[CopyTicket, torch.Tensor]:
        """The copy that `slot` waits for, and the bytes that it has brought."""
        self._send(slot)
        copy = self._flying.pop(slot)
        return copy, self._device.wait(copy)

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
            ticket = self._device.copy_async(self._targets[fetch.slot][fetch.layer], source, self._free[fetch.slot])
            self._store.sent(fetch.layer, ticket)
            self._flying[fetch.slot] = ticket

    def _start_over(self) -> None:
        self._pass_number = 0
        self._free = [self._device.mark() for _ in self._slots]
        self._queue.extend(first_fetches(self._streamed, len(self._slots)))

    def _see_placement(self) -> None:
        self._streamed = self._store.placement.streamed
        codecs, bases = self._store.codecs, [self._store.base(layer) for layer in range(self._num_layers)]
        self._resident = self._store.resident
        self._coded = {layer: {**bases[layer], **stored} for layer, stored in self._store.coded.items()}
        # By slot and layer: the bytes that a copy fills, and the tensors in them, beside what the device keeps of the layer.
        self._targets = [tuple(slot[:num_bytes] for num_bytes in self._store.stored_bytes) for slot in self._slots]
        views = [views_of_each([codec.stored for codec in codecs], slot) for slot in self._slots]
        self._views = [tuple({**base, **stored} for base, stored in zip(bases, each, strict=True)) for each in views]
        decoded = [layer for layer in (*self._streamed, *self._coded) if codecs[layer].decode is not None]
        self._decoded = {layer: codecs[layer].computed.views(self._scratch) for layer in decoded}

    def _memory(self, num_bytes: int, spare: list[torch.Tensor]) -> torch.Tensor:
        """[num_bytes] of the device: taken out of `spare` where that has a buffer as large, or new."""
        place = next((place for place, buffer in enumerate(spare) if buffer.numel() >= num_bytes), None)
        return spare.pop(place)[:num_bytes] if place is not None else self._device.alloc(num_bytes)

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

    def _copy_any(self) -> tuple[int, CopyTicket]:
        """A copy of some layer's size: its bytes, and its ticket."""
        source = self._store.any_source()
        return source.numel(), self._device.copy_async(self._slots[0][: source.numel()], source, self._device.mark())
