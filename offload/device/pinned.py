"""Host memory that is pinned for a while."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from .base import Device, HostBuffer


@contextmanager
def pinned(device: Device, num_bytes: int, cuts: Sequence[int] = ()) -> Iterator[HostBuffer]:
    """As `Device.pin`. Copies have landed before the memory goes, whatever ends the while: the other end of theirs must live
    as long."""
    buffer = device.pin(num_bytes, cuts)
    try:
        yield buffer
    finally:
        try:
            device.drain_copies()
        finally:
            buffer.close()
