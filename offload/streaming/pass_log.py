"""What a pass leaves behind: the tickets of its layers, and when they happened."""

import time
from dataclasses import dataclass, field

from ..device import CopyTicket, Device, Interval, Ticket


@dataclass(frozen=True, slots=True)
class LayerUse:
    """Tickets of one layer in one pass: its copy (None when resident) and the end of its compute."""

    layer: int
    copy: CopyTicket | None
    done: Ticket


@dataclass(slots=True)
class PassLog:
    start: Ticket
    uses: list[LayerUse] = field(default_factory=list)
    start_s: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class LayerTiming:
    """One layer in one pass. `stall_s` is how long compute had nothing to do but wait for the copy."""

    layer: int
    copy: Interval | None
    compute: Interval
    stall_s: float


def layer_timings(device: Device, log: PassLog) -> list[LayerTiming]:
    """What happened in a finished pass; call it after the pass's host sync."""
    timings: list[LayerTiming] = []
    previous_s = device.interval(log.start).end_s
    for use in log.uses:
        copy = device.interval(use.copy) if use.copy is not None else None
        stall_s = max(0.0, copy.end_s - previous_s) if copy is not None else 0.0
        compute = Interval(previous_s + stall_s, device.interval(use.done).end_s)
        timings.append(LayerTiming(use.layer, copy, compute, stall_s))
        previous_s = compute.end_s
    return timings
