"""Layers that stay on disk: read ahead, in cyclic order, through a ring of host buffers. Knows nothing of slots or passes."""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..device import Device, Ticket
from .layout import LayerLayout
from .placement import RING_BUFFERS
from .source import Destinations, TensorFeed, TensorSource


@dataclass(frozen=True, slots=True)
class DiskRead:
    """One layer read, for the trace: seconds of time.monotonic()."""

    layer: int
    start_s: float
    end_s: float


@dataclass(slots=True)
class _Filled:
    layer: int
    buffer: torch.Tensor
    error: BaseException | None


class DiskRing:
    """A reader thread keeps RING_BUFFERS host buffers filled with the next layers of `order`, over and over.

    The consumer asks for layers in that order: `ready` (never blocks), `source` (blocks), then `sent` with the ticket of the
    copy out of the buffer. A consumer that starts over after an error may ask for a layer further on; what lies between is
    dropped. A failed read is raised by `source` for its layer, once, and the ring goes on.
    """

    def __init__(
        self,
        device: Device,
        source: TensorSource,
        layout: LayerLayout,
        order: tuple[int, ...],
        views: Callable[[int, torch.Tensor], Destinations],
    ) -> None:
        self._device, self._source, self._order, self._views = device, source, order, views
        cuts = [layout.num_bytes * (buffer + 1) for buffer in range(RING_BUFFERS)]
        self.memory = device.pin(layout.num_bytes * RING_BUFFERS, cuts)
        self.reads: deque[DiskRead] = deque(maxlen=4096)
        self._changed = threading.Condition()
        self._filled: deque[_Filled] = deque()
        self._empty: deque[tuple[torch.Tensor, Ticket | None]] = deque(
            (self.memory.tensor[cut - layout.num_bytes : cut], None) for cut in cuts
        )
        self._handed_out: dict[int, torch.Tensor] = {}
        self._closing = False
        self._thread = threading.Thread(target=self._read_forever, name="treestream-disk", daemon=True)
        self._thread.start()

    def ready(self, layer: int) -> bool:
        """Whether `source(layer)` would return at once."""
        with self._changed:
            return self._head(layer) is not None

    def source(self, layer: int) -> torch.Tensor:
        """The host buffer that holds `layer`; blocks until it has been read. DeviceError when reading failed."""
        with self._changed:
            self._changed.wait_for(lambda: self._head(layer) is not None)
            filled = self._filled.popleft()
            if filled.error is not None:
                self._give_back(filled.buffer, None)
                raise filled.error
            self._handed_out[layer] = filled.buffer
            return filled.buffer

    def sent(self, layer: int, ticket: Ticket) -> None:
        """`layer`'s buffer may be overwritten once `ticket` has passed."""
        with self._changed:
            self._give_back(self._handed_out.pop(layer), ticket)

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self.memory.close()

    def _head(self, layer: int) -> _Filled | None:
        """The first filled buffer if it holds `layer`; drops what comes before it. Caller holds the lock."""
        while self._filled and self._filled[0].layer != layer:
            self._give_back(self._filled.popleft().buffer, None)
        return self._filled[0] if self._filled else None

    def _give_back(self, buffer: torch.Tensor, ticket: Ticket | None) -> None:
        self._empty.append((buffer, ticket))
        self._changed.notify_all()

    def _read_forever(self) -> None:
        with self._source.open() as feed:
            for layer in itertools.cycle(self._order):
                with self._changed:
                    self._changed.wait_for(lambda: self._empty or self._closing)
                    if self._closing:
                        return
                    buffer, ticket = self._empty.popleft()
                if ticket is not None:
                    self._device.drain(ticket)
                filled = self._read(feed, layer, buffer)
                with self._changed:
                    self._filled.append(filled)
                    self._changed.notify_all()

    def _read(self, feed: TensorFeed, layer: int, buffer: torch.Tensor) -> _Filled:
        start_s = time.monotonic()
        try:
            feed.fill(self._views(layer, buffer))
        except Exception as error:  # handed to the consumer, who raises it
            return _Filled(layer, buffer, error)
        self.reads.append(DiskRead(layer, start_s, time.monotonic()))
        return _Filled(layer, buffer, None)
