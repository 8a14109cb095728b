"""The numbers of a round, read off the device's clock and the stream's log once the round's host sync has passed."""

import time

from ..device import Device
from ..report.stats import PassStats
from ..report.trace import Trace
from ..streaming.pass_log import LayerTiming, layer_timings
from ..streaming.stream import LayerStream


def round_stats(
    device: Device,
    stream: LayerStream,
    trace: Trace | None,
    *,
    num_rows: int,
    num_tokens: int,
    extra_bytes: int,
    start_s: float,
    verified_s: float,
) -> PassStats:
    """Of the round that began at `start_s`, had its verdict at `verified_s`, and ends now. `extra_bytes` were streamed in it
    besides those of its pass."""
    log = stream.log
    assert log is not None
    timings = layer_timings(device, log)
    drafted_s = device.interval(log.start).end_s
    computed_s = timings[-1].compute.end_s
    end_s = time.monotonic()
    if trace is not None:
        _record(trace, stream, timings, (start_s, drafted_s, computed_s, verified_s, end_s))
    return PassStats(
        num_rows=num_rows,
        emitted_tokens=num_tokens,
        bytes_streamed=stream.bytes_per_pass + extra_bytes,
        draft_s=drafted_s - start_s,
        pass_s=computed_s - drafted_s,
        verify_s=end_s - computed_s,
        round_s=end_s - start_s,
        stall_s=sum(timing.stall_s for timing in timings),
        stall_by_layer_s=tuple(timing.stall_s for timing in timings),
        copied_s=sum(timing.copy.end_s - timing.copy.start_s for timing in timings if timing.copy),
    )


def _record(trace: Trace, stream: LayerStream, timings: list[LayerTiming], times_s: tuple[float, ...]) -> None:
    start_s, drafted_s, computed_s, verified_s, end_s = times_s
    trace.add("draft", "draft", start_s, drafted_s)
    for timing in timings:
        trace.add("compute", f"layer {timing.layer}", timing.compute.start_s, timing.compute.end_s)
        if timing.copy is not None:
            trace.add("link", f"layer {timing.layer}", timing.copy.start_s, timing.copy.end_s)
    for fill in stream.take_ring_fills():
        verb = "read" if fill.layer in stream.placement.disk else "move"
        trace.add("ring", f"{verb} layer {fill.layer}", fill.start_s, fill.end_s)
    trace.add("verify", "verify", computed_s, max(verified_s, computed_s))
    trace.add("verify", "commit", verified_s, end_s)
