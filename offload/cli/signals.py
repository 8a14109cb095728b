"""Ctrl-C and SIGTERM as exceptions, so that what was generated is printed and memory is given back."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_INTERRUPTED, EXIT_TERMINATED = 130, 143


class Terminated(BaseException):
    """SIGTERM has come. Like KeyboardInterrupt, no Exception: nothing catches it by accident."""


def raise_on_termination() -> None:
    """From here on, SIGTERM raises Terminated in the main thread."""
    signal.signal(signal.SIGTERM, _terminate)


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """A signal ends the process where it stands. This is for the import of torch and transformers: an exception raised in
    there may be swallowed, or come out as another one, and the process holds nothing yet. An ignored signal stays ignored."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    heeded = {number: handler for number, handler in handlers.items() if handler not in (None, signal.SIG_IGN)}
    for number in heeded:
        signal.signal(number, _leave)
    try:
        yield
    finally:
        for number, handler in heeded.items():
            signal.signal(number, handler)


def _leave(number: int, _frame: FrameType | None) -> None:
    if number == signal.SIGINT:
        print("interrupted", file=sys.stderr, flush=True)
    os._exit(EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_TERMINATED)


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    raise Terminated
