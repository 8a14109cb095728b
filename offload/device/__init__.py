"""Machines behind one seam. `open_device` is the only place that chooses."""

from ..config import EngineSettings, check_draft_passes
from ..errors import UsageError
from .base import CopyTicket, Device, HostBuffer, Interval, Ticket
from .pinned import pinned

__all__ = ["CopyTicket", "Device", "HostBuffer", "Interval", "Ticket", "choose_passes", "device_of", "open_device", "pinned"]


def open_device(
    name: str,
    emulate_link_bytes_per_s: float | None = None,
    *,
    draft_passes: str = "auto",
    small_uploads: str = "copy",
) -> Device:
    """The device called "auto", "cpu", "cuda" or "cuda:N"; the rest are flags. UsageError for another name, and for graphs on a
    device without, DeviceError when it is not there."""
    from . import cuda  # late, so that importing this package does not initialise CUDA
    from .cpu import CpuDevice

    if name == "auto":
        name = "cuda" if cuda.is_available() and emulate_link_bytes_per_s is None else "cpu"
    kind, _, index = name.partition(":")
    if name == "cpu":
        return choose_passes(CpuDevice(emulate_link_bytes_per_s), draft_passes)
    if kind == "cuda" and (index.isdecimal() or not index):
        return choose_passes(cuda.CudaDevice(int(index or 0), small_uploads=small_uploads), draft_passes)
    raise UsageError(f"unknown device {name!r}", where="--device", cure="one of auto, cpu, cuda, cuda:N")


def device_of(settings: EngineSettings) -> Device:
    """The device that `settings` name, as they want it."""
    return open_device(
        settings.device,
        settings.emulate_link_bytes_per_s,
        draft_passes=settings.draft_passes,
        small_uploads=settings.small_uploads,
    )


def choose_passes(device: Device, draft_passes: str) -> Device:
    """`device`, which records passes unless they are to be "eager". UsageError for "graphs" where it has none: then it is
    closed."""
    try:
        check_draft_passes(draft_passes, device.replays, device.name)
    except UsageError:
        device.close()
        raise
    device.replays = device.replays and draft_passes != "eager"
    return device
