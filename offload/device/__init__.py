"""Machines behind one seam. `open_device` is the only place that chooses."""

from ..errors import UsageError
from .base import CopyTicket, Device, HostBuffer, Interval, Ticket
from .pinned import pinned

__all__ = ["CopyTicket", "Device", "HostBuffer", "Interval", "Ticket", "open_device", "pinned"]


def open_device(name: str, emulate_link_bytes_per_s: float | None = None) -> Device:
    """The device called "auto", "cpu", "cuda" or "cuda:N". UsageError for another name, DeviceError when it is not there."""
    from . import cuda  # late, so that importing this package does not initialise CUDA
    from .cpu import CpuDevice

    if name == "auto":
        name = "cuda" if cuda.is_available() and emulate_link_bytes_per_s is None else "cpu"
    kind, _, index = name.partition(":")
    if name == "cpu":
        return CpuDevice(emulate_link_bytes_per_s)
    if kind == "cuda" and (index.isdecimal() or not index):
        return cuda.CudaDevice(int(index or 0))
    raise UsageError(f"unknown device {name!r}", where="--device", cure="one of auto, cpu, cuda, cuda:N")
