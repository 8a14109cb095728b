"""What people see on stderr: a progress bar while loading, the numbers at the end. Bars on a terminal only."""

import argparse
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..config import bytes_text, counted

if TYPE_CHECKING:
    from ..planner.plan import Plan
    from ..report.report import Report, Weights


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class _Bar:
    """A progress bar, gone when the `with` block ends. Nothing is drawn when stderr is not a terminal."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled and sys.stderr.isatty()
        self._bar: Any = None
        self._task: Any = None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _start(self, *columns: Any, text: str, total: int | None) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task(text, total=total)
        self._bar.start()


class LoadBar(_Bar):
    """Says that the machine is looked at; then bytes, rate and time left while weights are read, or what is `doing`."""

    def __init__(self, *, enabled: bool, doing: str = "loading") -> None:
        super().__init__(enabled=enabled)
        self._doing, self._drawn_s = doing, 0.0

    def __enter__(self) -> "LoadBar":
        if self._enabled:
            from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

            numbers = (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self._start(TextColumn("{task.description}"), BarColumn(), *numbers, text="planning", total=None)
        return self

    def update(self, read_bytes: int, total_bytes: int) -> None:
        now_s = time.monotonic()
        if not self._enabled or (now_s - self._drawn_s < 0.05 and read_bytes < total_bytes):
            return
        self._drawn_s = now_s
        self._bar.update(self._task, description=self._doing, completed=read_bytes, total=total_bytes)


class PartBar(_Bar):
    """Which of `num_parts` parts is under way. It is drawn from the first part on."""

    def __init__(self, num_parts: int, *, enabled: bool) -> None:
        super().__init__(enabled=enabled)
        self._num_parts = num_parts

    def __enter__(self) -> "PartBar":
        return self

    def begin(self, part: str) -> None:
        if not self._enabled:
            return
        if self._bar is None:
            from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn

            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
            )
            self._start(*columns, text="measuring", total=self._num_parts)
        else:
            self._bar.advance(self._task)
        self._bar.update(self._task, description=f"measuring {part}")


def full_statistics(report: "Report") -> str:
    """A line per pass, where the memory went, the closing line, and what a missed prediction means."""
    lines = ["pass   rows  tokens    draft     pass   verify    stall"]
    for number, one in enumerate(report.stats.passes, start=1):
        times = (one.draft_s, one.pass_s, one.verify_s, one.stall_s)
        lines.append(
            f"{number:4d} {one.num_rows:6d} {one.emitted_tokens:7d} " + " ".join(f"{seconds:7.3f}s" for seconds in times)
        )
    deviation = report.deviation
    off = [deviation.text(), *([f"  {deviation.advice}"] if deviation.advice else [])] if deviation is not None else []
    return "\n".join([*lines, *ledgers(report.plan), report.line(), *off])


def say_weights(weights: "Weights", *, quiet: bool) -> None:
    """Of which model texts are exact, where its name does not say it: its weights are packed or coded."""
    if weights.is_coded and not quiet:
        say(f"weights: {weights.name}; the text is exactly what they give")


def say_plan(plan: "Plan", arguments: argparse.Namespace) -> None:
    """Says all of the plan with --verbose. Otherwise says why nothing is speculated, where that was nobody's wish."""
    if arguments.verbose:
        say(plan_summary(plan))
    elif plan.why_no_tree is not None and not arguments.quiet:
        say(plan.why_no_tree)


def plan_summary(plan: "Plan") -> str:
    """What is about to run, for --verbose: where the layers are, the tree, the prediction, and where the memory goes."""
    placement, tree = plan.placement, plan.tree
    resident, streamed = counted(len(placement.resident), "layer"), len(placement.streamed)
    places = f"{streamed} streamed through {counted(plan.num_slots, 'slot')}, {len(placement.disk)} of them from disk"
    return "\n".join(
        [
            f"{resident} resident" + (f", {places}" if streamed else ", nothing streamed"),
            f"tree of {counted(tree.num_nodes, 'node')} in {counted(tree.num_levels, 'level')}, "
            f"predicted {plan.prediction.s_per_token:.3g} s/token",
            *(f"note: {note}" for note in plan.notes),
            *ledgers(plan),
        ]
    )


def ledgers(plan: "Plan") -> list[str]:
    ledgers = (("device", plan.device_ledger), ("host", plan.host_ledger))
    return [
        f"{place:6} {bytes_text(num_bytes):>11}  {name}"
        for place, ledger in ledgers
        for name, num_bytes in ledger.items()
        if num_bytes
    ]
