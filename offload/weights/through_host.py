"""Device memory that the host cannot write to, filled from a source through host memory."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..device import CopyTicket, Device, pinned
from .source import Destinations, TensorFeed


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """Device `memory` to be filled, by the tensors that `lay_out` finds in a host buffer of the same size: of all pieces, one
    behind another. It may name others in host memory, which then are read along; what goes to two places is named in two of
    its answers. `then` computes with what has landed; `memory` may be that of the next upload, too."""

    memory: tuple[torch.Tensor, ...]
    lay_out: Callable[[torch.Tensor], Sequence[Destinations]]
    then: Callable[[], None] | None = None

    @property
    def num_bytes(self) -> int:
        return sum(piece.numel() for piece in self.memory)


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
        with pinned(device, max(upload.num_bytes for upload in uploads)) as owned:
            load_through_host(device, uploads, [owned.tensor], feed, progress)
        return
    flying: list[list[CopyTicket]] = []
    try:
        free = device.mark()
        for number, upload in enumerate(uploads):
            if number >= len(staging):
                for ticket in flying[number - len(staging)]:
                    device.drain(ticket)
            host = staging[number % len(staging)][: upload.num_bytes]
            for destinations in upload.lay_out(host):
                feed.fill(destinations, progress)
            pieces = host.split([piece.numel() for piece in upload.memory])
            flying.append([])
            for piece, staged in zip(upload.memory, pieces, strict=True):
                flying[-1].append(device.copy_async(piece, staged, free))
            if upload.then is not None:
                (landed,) = map(device.wait, flying[-1])
                upload.then()
                free = device.release(landed)
    finally:
        device.drain_copies()
    for ticket in itertools.chain.from_iterable(flying):
        device.wait(ticket)  # an error of a copy is raised here
