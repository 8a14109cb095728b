"""Device memory that the host cannot write to, filled from a source through host memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..device import CopyTicket, Device, pinned
from .source import Destinations, TensorFeed


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """Device `memory` to be filled, by the tensors that `lay_out` finds in a host buffer of the same size. `then` computes with
    what has landed; `memory` may be that of the next upload, too."""

    memory: torch.Tensor
    lay_out: Callable[[torch.Tensor], Destinations]
    then: Callable[[], None] | None = None


def load_through_host(
    device: Device,
    uploads: Sequence[Upload],
    staging: Sequence[torch.Tensor],
    feed: TensorFeed,
    progress: Callable[[int], None] | None,
) -> None:
    """Through `staging`, host buffers that any upload fits into; one is made when there is none. One copy flies while the next
    buffer is read."""
    if not staging:
        with pinned(device, max(upload.memory.numel() for upload in uploads)) as owned:
            load_through_host(device, uploads, [owned.tensor], feed, progress)
        return
    flying: list[CopyTicket] = []
    try:
        free = device.mark()
        for number, upload in enumerate(uploads):
            if number >= len(staging):
                device.drain(flying[number - len(staging)])
            host = staging[number % len(staging)][: upload.memory.numel()]
            feed.fill(upload.lay_out(host), progress)
            flying.append(device.copy_async(upload.memory, host, free))
            if upload.then is not None:
                landed = device.wait(flying[-1])
                upload.then()
                free = device.release(landed)
    finally:
        device.drain_copies()
    for ticket in flying:
        device.wait(ticket)  # an error of a copy is raised here
