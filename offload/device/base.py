"""The seam between the engine and the machine: memory, ordered copies, and tickets.

Tickets go both ways. A copied buffer is obtained *from* `wait(copy ticket)`, and a copy into a buffer needs the ticket of
that buffer's last `release`; forgetting either does not type-check. Nothing here blocks the host except `drain`,
`drain_copies`, `download` and `renew_clock`.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class Interval:
    """When something happened, in seconds of `time.monotonic()`."""

    start_s: float
    end_s: float


class Ticket:
    """A point in a device's order of work: a copy that lands, or a use that ends. Devices subclass it."""

    __slots__ = ()


class CopyTicket(Ticket):
    """A copy under way; `Device.wait` turns it into the tensor that was written."""

    __slots__ = ()


class HostBuffer(Protocol):
    """Host memory of exact size that the device copies from at full rate."""

    tensor: torch.Tensor  # [num_bytes] uint8
    pinned_bytes: int  # how many leading bytes are page-locked for the device

    def close(self) -> None:
        """Give the memory back. Views of `tensor` are invalid afterwards."""


class Device(Protocol):
    """Where the model runs. One compute order, one copy order (FIFO), overlapping each other."""

    name: str
    torch_device: torch.device
    host_addressable: bool  # `alloc`ed memory can be written by the host directly
    at_once: bool  # what is issued has been computed when the host goes on
    replays: bool  # what `record` returns is cheaper than the work itself, so that fixed shapes pay
    small_uploads: str | None  # how small tensors reach it, "copy" or "mapped"; None where they are there already

    def alloc(self, num_bytes: int) -> torch.Tensor:
        """[num_bytes] uint8 on the device, 256-byte aligned. OutOfMemoryError when there is no room."""

    def pin(self, num_bytes: int, cuts: Sequence[int]) -> HostBuffer:
        """Host memory of exactly `num_bytes`. A copy never straddles an offset in `cuts` (ascending), so memory may be
        registered in chunks ending there, as what is pinned of it does."""

    def upload(self, host: torch.Tensor) -> torch.Tensor:
        """A small host tensor (indices, masks) on the device, in compute order, without a host sync."""

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        """What compute issued so far leaves in `tensor`, in host memory; waits for it. May be `tensor` itself."""

    def copy_async(self, dst: torch.Tensor, src: torch.Tensor, after: Ticket) -> CopyTicket:
        """Queue a copy of uint8 host memory `src` into device memory `dst`; it starts after `after`."""

    def wait(self, ticket: CopyTicket) -> torch.Tensor:
        """The copied tensor. Later compute sees the copy; an error of the copy is raised here."""

    def release(self, buffer: torch.Tensor) -> Ticket:
        """Compute issued so far is the last to use `buffer`; its contents are undefined from here on."""

    def mark(self) -> Ticket:
        """The present point in compute order, for measuring."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """`work`, to be run any number of times in compute order.

        A device may run `work` while recording it, and afterwards repeat what it computed without asking Python: on the same
        tensors, with the same numbers and shapes. So `work` reads and writes tensors that outlive it, draws no random numbers,
        copies nothing from or to the host, and waits for nothing.
        """

    def first(self) -> AbstractContextManager[None]:
        """Inside, compute comes before that of `beside`, where both want the device."""

    def beside(self, after: Ticket) -> AbstractContextManager[None]:
        """Inside, compute comes behind `after`, a mark, and beside all that was issued since, where a device can. The host
        waits for it at the end. What was computed since `after` is not to be used inside, nor what is used there changed."""

    def drain(self, ticket: Ticket) -> None:
        """Block the calling thread until `ticket` has passed. Never called by the compute thread inside a pass."""

    def drain_copies(self) -> None:
        """Block until every copy that was queued has landed, be its ticket lost: after that their memory may go. What a copy
        failed with is not raised here."""

    def passed(self, ticket: Ticket) -> bool:
        """Whether `ticket` lies behind the device's present. Asks without waiting; from any thread."""

    def interval(self, ticket: Ticket) -> Interval:
        """When `ticket` happened (start == end for marks). Only after the host has synced past it."""

    def renew_clock(self) -> None:
        """Called now and then, so that what `interval` says of later tickets stays right: the device's clock drifts away from
        the host's. May wait for compute, so only where there is little of it, as between rounds."""

    def translated(self) -> AbstractContextManager[None]:
        """Inside, errors of torch and the driver are raised as ours: OutOfMemoryError, of which the device can be relieved, and
        DeviceError, after which it is of no use. What is neither passes as it is. May be nested."""

    def free_bytes(self) -> int:
        """Bytes that could be allocated now."""

    def peak_bytes(self) -> int:
        """Most bytes ever allocated on the device by this process."""

    def close(self) -> None:
        """Stop threads, free streams. The device is unusable afterwards."""
