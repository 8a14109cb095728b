"""Two devices that obey the contract of offload.device.base as badly as it allows.

A real copy lands somewhere between its issue and its wait. EagerDevice lands it at once: what is overwritten too early shows.
LateDevice lands it at the last moment and fills released buffers with NaN: what is used too early or too long shows.
"""

import threading
import time

import torch

from offload.device.base import CopyTicket, Ticket
from offload.device.cpu import CpuCopy, CpuDevice, CpuMark
from offload.device.host import move

NAN_BYTE = 0xFF  # all bits set is a NaN in every float format


class EagerDevice(CpuDevice):
    name = "eager"

    def copy_async(self, dst: torch.Tensor, src: torch.Tensor, after: Ticket) -> CopyTicket:
        assert isinstance(after, CpuMark)
        ticket = CpuCopy(dst)
        ticket.start_s = time.monotonic()
        move(dst, src)
        ticket.end_s = time.monotonic()
        ticket.landed.set()
        return ticket


class LateDevice(CpuDevice):
    name = "late"

    def __init__(self) -> None:
        super().__init__()
        self._sources: dict[CpuCopy, torch.Tensor] = {}
        self._lock = threading.Lock()

    def copy_async(self, dst: torch.Tensor, src: torch.Tensor, after: Ticket) -> CopyTicket:
        assert isinstance(after, CpuMark)
        ticket = CpuCopy(dst)
        self._sources[ticket] = src
        return ticket

    def wait(self, ticket: CopyTicket) -> torch.Tensor:
        self.drain(ticket)
        return super().wait(ticket)

    def drain(self, ticket: Ticket) -> None:
        with self._lock:
            if isinstance(ticket, CpuCopy) and not ticket.landed.is_set():
                ticket.start_s = time.monotonic()
                move(ticket.dst, self._sources.pop(ticket))
                ticket.end_s = time.monotonic()
                ticket.landed.set()

    def release(self, buffer: torch.Tensor) -> Ticket:
        buffer.fill_(NAN_BYTE)
        return super().release(buffer)


class FailingDevice(CpuDevice):
    """Its `fail_at`-th copy (from 1) fails where the copy is done: on the worker thread."""

    def __init__(self, fail_at: int) -> None:
        super().__init__()
        self._left = fail_at

    def _copy(self, ticket: CpuCopy, src: torch.Tensor, after: CpuMark) -> None:
        self._left -= 1
        if self._left == 0:
            raise RuntimeError("the link broke")
        super()._copy(ticket, src, after)


DEVICES = {"cpu": CpuDevice, "eager": EagerDevice, "late": LateDevice}
