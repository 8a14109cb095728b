"""Ctrl-C and SIGTERM as exceptions, so that what was generated is printed and memory is given back."""

import signal
from types import FrameType

EXIT_INTERRUPTED, EXIT_TERMINATED = 130, 143


class Terminated(BaseException):
    """SIGTERM has come. Like KeyboardInterrupt, no Exception: nothing catches it by accident."""


def raise_on_termination() -> None:
    """From here on, SIGTERM raises Terminated in the main thread."""
    signal.signal(signal.SIGTERM, _terminate)


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    raise Terminated
