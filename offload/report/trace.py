"""What happened when: spans on six lanes, written for Perfetto (Chrome trace JSON) or drawn as a PNG timeline."""

import json
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LANES = ("ring", "link", "compute", "draft", "draft ahead", "verify")
_COLOURS = ("#8c6d31", "#1f77b4", "#2ca02c", "#ff7f0e", "#e7ba52", "#d62728")
MAX_SPANS = 1_000_000  # about 100 MB of JSON; older spans go first


@dataclass(frozen=True, slots=True)
class Span:
    """Seconds of time.monotonic()."""

    lane: str
    name: str
    start_s: float
    end_s: float


class Trace:
    """Collects spans; `save` writes them."""

    def __init__(self) -> None:
        self.spans: deque[Span] = deque(maxlen=MAX_SPANS)

    def add(self, lane: str, name: str, start_s: float, end_s: float) -> None:
        assert lane in LANES
        self.spans.append(Span(lane, name, start_s, end_s))

    def to_json(self) -> dict[str, object]:
        """Chrome trace events: complete events ("X") in microseconds since the first span, one thread per lane."""
        origin_s = min((span.start_s for span in self.spans), default=0.0)
        names: list[dict[str, object]] = [
            {"name": "thread_name", "ph": "M", "pid": 1, "tid": tid, "args": {"name": lane}} for tid, lane in enumerate(LANES)
        ]
        events: list[dict[str, object]] = [
            {
                "name": span.name,
                "cat": span.lane,
                "ph": "X",
                "ts": round((span.start_s - origin_s) * 1e6, 3),
                "dur": round((span.end_s - span.start_s) * 1e6, 3),
                "pid": 1,
                "tid": LANES.index(span.lane),
            }
            for span in sorted(self.spans, key=lambda span: span.start_s)
        ]
        return {"displayTimeUnit": "ms", "traceEvents": names + events}

    def save(self, path: Path) -> None:
        """Chrome JSON, or a PNG of the last seconds when `path` ends in .png. OSError when it cannot be written."""
        if path.suffix == ".png":
            self._draw(path)
        else:
            path.write_text(json.dumps(self.to_json()))

    def _draw(self, path: Path, seconds: float = 3.0) -> None:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        end_s = max((span.end_s for span in self.spans), default=0.0)
        start_s = max(end_s - seconds, min((span.start_s for span in self.spans), default=0.0))
        figure: Any
        axes: Any
        figure, axes = plt.subplots(figsize=(14, 3.2), layout="constrained")
        for row, (lane, colour) in enumerate(zip(LANES, _COLOURS, strict=True)):
            shown = [span for span in self.spans if span.lane == lane and span.end_s > start_s]
            bars = [(max(s.start_s, start_s) - start_s, s.end_s - max(s.start_s, start_s)) for s in shown]
            axes.broken_barh(bars, (row - 0.4, 0.8), facecolors=colour, edgecolor="white", linewidth=0.3)
        axes.set(yticks=range(len(LANES)), yticklabels=LANES, xlabel="seconds", xlim=(0, max(end_s - start_s, 1e-6)))
        axes.set_ylim(len(LANES) - 0.4, -0.6)  # the first lane on top
        figure.savefig(path, dpi=130)
        plt.close(figure)
