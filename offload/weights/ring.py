"""Layers that the device does not copy from where they lie: brought ahead, in cyclic order, into a ring of host buffers. Knows
nothing of slots or passes, nor where the layers come from."""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..device import Device, Ticket

Fill = Callable[[int, torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class RingFill:
    """One layer brought into the ring, for the trace: seconds of time.monotonic()."""

    layer: int
    start_s: float
    end_s: float


@dataclass(slots=True)
class _Filled:
    layer: int
    buffer: torch.Tensor
    error: BaseException | None


class BounceRing:
    """A thread keeps `buffers`, which are the caller's, filled with the next layers of `order`, over and over, by `fill(layer,
    buffer)`.

    The consumer asks for the layers in just that order: `ready` (never blocks), `source` (blocks), then `sent` with the ticket
    of the copy out of the buffer. A fill that failed is raised by `source` for its layer, and the ring goes on.
    """

    def __init__(self, device: Device, buffers: Sequence[torch.Tensor], order: tuple[int, ...], fill: Fill) -> None:
        self._device, self._order, self._fill = device, order, fill
        self.fills: deque[RingFill] = deque(maxlen=4096)
        self._changed = threading.Condition()
        self._filled: deque[_Filled] = deque()
        self._empty: deque[tuple[torch.Tensor, Ticket | None]] = deque((buffer, None) for buffer in buffers)
        self._handed_out: dict[int, torch.Tensor] = {}
        self._closing = False
        self._thread = threading.Thread(target=self._fill_forever, name="treestream-ring", daemon=True)
        self._thread.start()

    def ready(self) -> bool:
        """Whether `source` would return a buffer at once."""
        return bool(self._filled) and self._filled[0].error is None

    def source(self, layer: int) -> torch.Tensor:
        """The buffer that holds `layer`; blocks until it does. Raises what its filling raised."""
        with self._changed:
            self._changed.wait_for(lambda: self._filled)
            filled = self._filled.popleft()
            assert filled.layer == layer, "layers are asked for in the ring's order"
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
        """No buffer is written to from here on."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _give_back(self, buffer: torch.Tensor, ticket: Ticket | None) -> None:
        self._empty.append((buffer, ticket))
        self._changed.notify_all()

    def _fill_forever(self) -> None:
        for layer in itertools.cycle(self._order):
            with self._changed:
                self._changed.wait_for(lambda: self._empty or self._closing)
                if self._closing:
                    return
                buffer, ticket = self._empty.popleft()
            filled = self._bring(layer, buffer, ticket)
            with self._changed:
                self._filled.append(filled)
                self._changed.notify_all()

    def _bring(self, layer: int, buffer: torch.Tensor, ticket: Ticket | None) -> _Filled:
        try:
            if ticket is not None:
                self._device.drain(ticket)
            start_s = time.monotonic()
            self._fill(layer, buffer)
        except Exception as error:  # handed to the consumer, who raises it
            return _Filled(layer, buffer, error)
        self.fills.append(RingFill(layer, start_s, time.monotonic()))
        return _Filled(layer, buffer, None)
