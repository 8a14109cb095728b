"""How fast the link copies: alone, by size, from pinned and pageable memory; and a link that is busy beside other work."""

import itertools
import statistics
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ..device import Device, pinned

BUSY_PRODUCTS = 8  # of 1024 x 1024 matrices, beside a copy
COPY_S = 0.01  # a copy beside what is measured, at most: the last one is waited for
MOST_PIECES = 64  # of the memory that is copied beside


def measure_idle_link(device: Device, num_bytes: int, repeats: int) -> float:
    """Bytes per second of one copy of `num_bytes` from pinned host memory, nothing else under way; the best of a few."""
    slot, rates = device.alloc(num_bytes), []
    with pinned(device, num_bytes) as source:
        for _ in range(repeats + 1):
            ticket = device.copy_async(slot, source.tensor, device.mark())
            device.drain(ticket)
            device.wait(ticket)
            interval = device.interval(ticket)
            rates.append(num_bytes / max(interval.end_s - interval.start_s, 1e-9))
    return max(rates)


@contextmanager
def busy_link(device: Device, num_bytes: int, link_bytes_per_s: float) -> Iterator[None]:
    """Copies one after another, as they are in a run: what is computed beside them is slower for it."""
    piece_bytes = max(int(link_bytes_per_s * COPY_S), 1)
    num_bytes = min(num_bytes, MOST_PIECES * piece_bytes)
    slot, over, before = device.alloc(num_bytes), threading.Event(), device.mark()
    with pinned(device, num_bytes) as source:
        source.tensor.fill_(1)  # pages that nobody has written to are all the same one
        pieces = list(zip(slot.split(piece_bytes), source.tensor.split(piece_bytes), strict=True))

        def copy() -> None:
            for dst, src in itertools.cycle(pieces):
                if over.is_set():
                    return
                device.drain(device.copy_async(dst, src, before))

        thread = threading.Thread(target=copy, name="treestream-busy-link", daemon=True)
        try:
            thread.start()
            yield
        finally:
            over.set()
            if thread.ident is not None:
                thread.join()


def measure_copies(device: Device, sizes: Sequence[int], repeats: int) -> dict[str, dict[int, float]]:
    """Median bytes per second by copy size: from pinned memory, from pageable memory, and from pinned memory while the
    device multiplies matrices."""
    slot, pageable = device.alloc(max(sizes)), torch.zeros(max(sizes), dtype=torch.uint8)
    generator = torch.Generator(device.torch_device).manual_seed(0)
    square = torch.randn(1024, 1024, device=device.torch_device, generator=generator)

    def rate(source: torch.Tensor, num_bytes: int, *, busy: bool) -> float:
        seconds = []
        for _ in range(repeats):
            ticket = device.copy_async(slot[:num_bytes], source[:num_bytes], device.mark())
            if busy:
                for _ in range(BUSY_PRODUCTS):
                    torch.mm(square, square)
            device.drain(ticket)
            device.wait(ticket)
            interval = device.interval(ticket)
            seconds.append(max(interval.end_s - interval.start_s, 1e-9))
        return num_bytes / statistics.median(seconds)

    with pinned(device, max(sizes)) as fast:
        kinds = {"pinned": (fast.tensor, False), "pageable": (pageable, False), "pinned, busy device": (fast.tensor, True)}
        return {kind: {size: rate(source, size, busy=busy) for size in sizes} for kind, (source, busy) in kinds.items()}
