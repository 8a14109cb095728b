"""What people see on stderr: a progress bar while loading, the numbers at the end. Bars on a terminal only."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..planner.cost import GIB

if TYPE_CHECKING:
    from ..planner.plan import Plan
    from ..report import Report


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class LoadProgress:
    """Says that the machine is looked at; then bytes, rate and time left while weights are read. Nothing is drawn when stderr
    is not a terminal."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled and sys.stderr.isatty()
        self._bar: Any = None
        self._task: Any = None
        self._drawn_s = 0.0

    def __enter__(self) -> "LoadProgress":
        if self._enabled:
            self._start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, read_bytes: int, total_bytes: int) -> None:
        now_s = time.monotonic()
        if not self._enabled or (now_s - self._drawn_s < 0.05 and read_bytes < total_bytes):
            return
        self._drawn_s = now_s
        self._bar.update(self._task, description="loading", completed=read_bytes, total=total_bytes)

    def _start(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task("planning", total=None)
        self._bar.start()


class PartProgress:
    """Which of `num_parts` parts is under way. Nothing is drawn when stderr is not a terminal."""

    def __init__(self, num_parts: int, *, enabled: bool) -> None:
        self._num_parts, self._enabled = num_parts, enabled and sys.stderr.isatty()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> "PartProgress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, part: str) -> None:
        if not self._enabled:
            return
        if self._bar is None:
            self._start()
        else:
            self._bar.advance(self._task)
        self._bar.update(self._task, description=f"measuring {part}")

    def _start(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task("measuring", total=self._num_parts)
        self._bar.start()


def full_statistics(report: "Report") -> str:
    """A line per pass, where the memory went, and the closing line."""
    lines = ["pass   rows  tokens    draft     pass   verify    stall"]
    for number, one in enumerate(report.stats.passes, start=1):
        times = (one.draft_s, one.pass_s, one.verify_s, one.stall_s)
        lines.append(
            f"{number:4d} {one.num_rows:6d} {one.emitted_tokens:7d} " + " ".join(f"{seconds:7.3f}s" for seconds in times)
        )
    return "\n".join([*lines, *ledgers(report.plan), report.line()])


def plan_summary(plan: "Plan") -> str:
    """What is about to run, for --verbose: where the layers are, the tree, the prediction, and where the memory goes."""
    placement, tree = plan.placement, plan.tree
    layers = (len(placement.resident), len(placement.streamed), len(placement.disk))
    return "\n".join(
        [
            f"{layers[0]} layers resident, {layers[1]} streamed through {plan.num_slots} slots, {layers[2]} of them from disk",
            f"tree of {tree.num_nodes} nodes in {tree.num_levels} levels, predicted {plan.prediction.s_per_token:.3g} s/token",
            *(f"note: {note}" for note in plan.notes),
            *ledgers(plan),
        ]
    )


def ledgers(plan: "Plan") -> list[str]:
    lines = [f"device {num_bytes / GIB:9.3f} GiB  {name}" for name, num_bytes in plan.device_ledger.items() if num_bytes]
    return lines + [f"host   {num_bytes / GIB:9.3f} GiB  {name}" for name, num_bytes in plan.host_ledger.items() if num_bytes]
