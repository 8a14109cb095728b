"""How far the pass under way has come, on the line below the answer, and the answer's text above it. On a terminal only."""

import os
import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING

from ..config import rate_text

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TextIO

    from ..streaming.stream import PassProgress

INTERVAL_S = 0.1
# Make room for a line below (scrolling if need be), remember where the cursor is, go to the start of that line, empty it.
_BELOW = "\033D\033[A\0337\033[B\r\033[K"
_BACK = "\0338"


def draws_on(stream: "TextIO") -> bool:
    """Whether `stream` is a terminal that understands escapes."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def progress_line(progress: "PassProgress", answer_s: float) -> str:
    """`layer 37/80 | 24.6 GB/s | 3.1 s`: layers done, the rate of this pass once it has streamed something, the time since the
    question. Between two passes the draft is at work."""
    if progress.layers_done == progress.num_layers:
        return f"drafting | {answer_s:.1f} s"
    parts = [f"layer {progress.layers_done}/{progress.num_layers}"]
    if progress.streamed_bytes and progress.elapsed_s > 0:
        parts.append(rate_text(progress.streamed_bytes / progress.elapsed_s))
    return " | ".join([*parts, f"{answer_s:.1f} s"])


class PassDisplay:
    """While it is entered, a thread asks `progress` and draws below the cursor on stderr. Text for stdout goes through
    `write`, so that the two never mix."""

    def __init__(self, progress: "Callable[[], PassProgress]", *, enabled: bool) -> None:
        self._progress, self._enabled = progress, enabled and draws_on(sys.stderr)
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        self._drawn = False

    def __enter__(self) -> "PassDisplay":
        if self._enabled:
            start_s = time.monotonic()
            self._thread = threading.Thread(target=self._draw_forever, args=(start_s,), name="treestream-progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        self._erase()

    def write(self, text: str) -> None:
        with self._lock:
            self._erase()
            sys.stdout.write(text)
            sys.stdout.flush()

    def _draw_forever(self, start_s: float) -> None:
        while not self._ended.wait(INTERVAL_S):
            line = progress_line(self._progress(), time.monotonic() - start_s)
            with self._lock:
                try:
                    width = os.get_terminal_size(sys.stderr.fileno()).columns or 80  # 0: it does not know
                    print(f"{_BELOW}{line[: width - 1]}{_BACK}", end="", file=sys.stderr, flush=True)
                except OSError:  # the terminal has gone; whoever writes the answer will notice
                    return
                self._drawn = True

    def _erase(self) -> None:
        if self._drawn:
            print(f"{_BELOW}{_BACK}", end="", file=sys.stderr, flush=True)
            self._drawn = False
