"""The numbers of a pass that is over, from the device's clock and the stream's log, once its host sync has passed."""

import time
from dataclasses import dataclass

from tree.verify import Verdict

from ..device import Device
from ..report.stats import PassStats
from ..report.trace import Trace
from ..streaming.pass_log import LayerTiming, layer_timings
from ..streaming.stream import LayerStream
from .ahead import AheadTimes
from .turn import Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class PassTimes:
    """When drafting and computing ended, and the pass with all that follows it; layer by layer. `ahead_s` and
    `late_s` as in PassStats."""

    drafted_s: float
    computed_s: float
    end_s: float
    ahead_s: float
    late_s: float
    layers: tuple[LayerTiming, ...]

    def stats(self, start_s: float, turn: Turn, verdict: Verdict, bytes_streamed: int) -> PassStats:
        """Of one sequence that waited for this pass since `start_s`. `bytes_streamed` are those of all passes since then."""
        draft = turn.draft
        return PassStats(
            num_rows=turn.unread + turn.num_nodes,
            num_nodes=turn.num_nodes,
            emitted_tokens=len(verdict.token_ids),
            ngram_tokens=sum(node in draft.found for node in verdict.path[1:]) if draft is not None else 0,
            foreseen_nodes=draft.foreseen if draft is not None else 0,
            ahead_nodes=turn.sequence.ahead_nodes,
            ahead_s=self.ahead_s,
            late_s=self.late_s,
            bytes_streamed=bytes_streamed,
            draft_s=self.drafted_s - start_s,
            pass_s=self.computed_s - self.drafted_s,
            verify_s=self.end_s - self.computed_s,
            round_s=self.end_s - start_s,
            stall_s=sum(timing.stall_s for timing in self.layers),
            stall_by_layer_s=tuple(timing.stall_s for timing in self.layers),
            copied_s=sum(timing.copy.end_s - timing.copy.start_s for timing in self.layers if timing.copy),
        )


def pass_times(
    device: Device, stream: LayerStream, ahead: AheadTimes, trace: Trace | None, start_s: float, verified_s: float
) -> PassTimes:
    """Of the pass that has just ended. It was begun with its drafts at `start_s` and had its verdicts at `verified_s`."""
    log = stream.log
    assert log is not None
    timings = tuple(layer_timings(device, log))
    times = PassTimes(
        drafted_s=device.interval(log.start).end_s,
        computed_s=timings[-1].compute.end_s,
        end_s=time.monotonic(),
        ahead_s=sum([end_s - begin_s for begin_s, end_s in ahead.spans]) if ahead.until_s else 0.0,
        late_s=sum([max(ahead.until_s.get(one.layer, 0.0) - one.compute.start_s, 0.0) for one in timings]),
        layers=timings,
    )
    if trace is not None:
        _record(trace, stream, times, start_s, verified_s)
    return times


def _record(trace: Trace, stream: LayerStream, times: PassTimes, start_s: float, verified_s: float) -> None:
    trace.add("draft", "draft", start_s, times.drafted_s)
    for timing in times.layers:
        trace.add("compute", f"layer {timing.layer}", timing.compute.start_s, timing.compute.end_s)
        if timing.copy is not None:
            trace.add("link", f"layer {timing.layer}", timing.copy.start_s, timing.copy.end_s)
    for fill in stream.take_ring_fills():
        verb = "read" if fill.layer in stream.placement.disk else "move"
        trace.add("ring", f"{verb} layer {fill.layer}", fill.start_s, fill.end_s)
    trace.add("verify", "verify", times.computed_s, max(verified_s, times.computed_s))
    trace.add("verify", "commit", verified_s, times.end_s)
