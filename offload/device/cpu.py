"""The CPU as a device: it runs the product, and the tests. Copies run on a worker thread and overlap with compute; they can
be throttled to the rate of an emulated link."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from ..config import bytes_text
from ..errors import HostMemoryError, reason
from .base import CopyTicket, Interval, Ticket
from .faults import translated
from .host import HostMapping, available_bytes, move

# How torch and C++ say that the system refused memory, in a RuntimeError.
_REFUSED = ("DefaultCPUAllocator: ", "std::bad_alloc")


class CpuMark(Ticket):
    """Compute on the CPU is synchronous: a mark has happened when it is made."""

    __slots__ = ("at_s",)

    def __init__(self) -> None:
        self.at_s = time.monotonic()


class CpuCopy(CopyTicket):
    __slots__ = ("dst", "end_s", "error", "landed", "queued_s", "start_s")

    def __init__(self, dst: torch.Tensor) -> None:
        self.dst = dst
        self.queued_s = time.monotonic()
        self.start_s = self.end_s = 0.0
        self.error: BaseException | None = None
        self.landed = threading.Event()


class CpuDevice:
    """`link_bytes_per_s` throttles copies to an emulated link; None copies at memory speed."""

    name = "cpu"
    torch_device = torch.device("cpu")
    host_addressable = True
    at_once = True
    replays = False
    small_uploads: str | None = None

    def __init__(self, link_bytes_per_s: float | None = None) -> None:
        self.link_bytes_per_s = link_bytes_per_s
        self._link_free_s = 0.0  # when the emulated link has finished all it was given
        self._allocated_bytes = 0
        self._jobs: queue.SimpleQueue[tuple[CpuCopy, torch.Tensor, CpuMark] | threading.Event | None] = queue.SimpleQueue()
        self._worker = threading.Thread(target=self._copy_forever, name="treestream-copy", daemon=True)
        self._worker.start()

    def alloc(self, num_bytes: int) -> torch.Tensor:
        self._allocated_bytes += num_bytes
        return HostMapping(num_bytes).tensor

    def pin(self, num_bytes: int, cuts: Sequence[int]) -> HostMapping:
        return HostMapping(num_bytes)

    def upload(self, host: torch.Tensor) -> torch.Tensor:
        return host

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def copy_async(self, dst: torch.Tensor, src: torch.Tensor, after: Ticket) -> CopyTicket:
        assert isinstance(after, CpuMark)
        ticket = CpuCopy(dst)
        self._jobs.put((ticket, src, after))
        return ticket

    def wait(self, ticket: CopyTicket) -> torch.Tensor:
        assert isinstance(ticket, CpuCopy)
        ticket.landed.wait()
        if ticket.error is not None:
            raise ticket.error
        return ticket.dst

    def release(self, buffer: torch.Tensor) -> Ticket:
        return CpuMark()

    def mark(self) -> Ticket:
        return CpuMark()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        return work

    def first(self) -> AbstractContextManager[None]:
        return nullcontext()

    def beside(self, after: Ticket) -> AbstractContextManager[None]:
        return nullcontext()

    def drain(self, ticket: Ticket) -> None:
        if isinstance(ticket, CpuCopy):
            ticket.landed.wait()

    def drain_copies(self) -> None:
        all_landed = threading.Event()
        self._jobs.put(all_landed)
        all_landed.wait()

    def passed(self, ticket: Ticket) -> bool:
        return not isinstance(ticket, CpuCopy) or ticket.landed.is_set()

    def interval(self, ticket: Ticket) -> Interval:
        if isinstance(ticket, CpuCopy):
            return Interval(ticket.start_s, ticket.end_s)
        assert isinstance(ticket, CpuMark)
        return Interval(ticket.at_s, ticket.at_s)

    def renew_clock(self) -> None:
        pass  # it is the host's

    def translated(self) -> AbstractContextManager[None]:
        return translated(_translate)

    def free_bytes(self) -> int:
        return available_bytes()

    def peak_bytes(self) -> int:
        return self._allocated_bytes

    def close(self) -> None:
        self._jobs.put(None)
        self._worker.join()

    def _copy_forever(self) -> None:
        while (job := self._jobs.get()) is not None:
            if isinstance(job, threading.Event):
                job.set()
                continue
            ticket, src, after = job
            try:
                self._copy(ticket, src, after)
            except BaseException as error:  # raised again by wait()
                ticket.error = error
            ticket.landed.set()

    def _copy(self, ticket: CpuCopy, src: torch.Tensor, after: CpuMark) -> None:
        # The link's own clock, not the thread's: a late wake-up of this thread delays the landing of one copy, never the
        # start of the next, so an emulated link that is always given work is always busy.
        ticket.start_s = max(ticket.queued_s, after.at_s, self._link_free_s)
        move(ticket.dst, src)
        ticket.end_s = time.monotonic()
        if self.link_bytes_per_s is not None:
            ticket.end_s = max(ticket.end_s, ticket.start_s + src.numel() / self.link_bytes_per_s)
            time.sleep(max(0.0, ticket.end_s - time.monotonic()))
        self._link_free_s = ticket.end_s


def _translate(error: Exception) -> None:
    line = reason(error).partition("\n")[0]
    said = next((line[line.index(words) :] for words in _REFUSED if words in line), None)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or said is not None:
        raise HostMemoryError(
            f"out of memory: {said or line}",
            where=f"host memory, {bytes_text(available_bytes())} available",
            cure="lower --host-memory or --max-context, or free memory",
        ) from error
