"""Orders of work beside each other, of streams that somebody else has made."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol


class Stream(Protocol):
    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...


Use = Callable[[Any], AbstractContextManager[Any]]  # of a stream, inside


@contextmanager
def inserted(stream: Stream, current: Stream, use: Use) -> Iterator[None]:
    """What is issued inside goes to `stream`, behind all that `current` was given before, and before all that it is given
    then."""
    stream.wait_stream(current)
    try:
        with use(stream):
            yield
    finally:
        current.wait_stream(stream)


@contextmanager
def beside(stream: Stream, event: Any, use: Use) -> Iterator[None]:
    """What is issued inside goes to `stream`, behind `event`; the host waits for it at the end.

    What the host lets go of, the allocator gives to the next who asks on the stream that it was made on, be it in use on
    another. After the wait it is not; and what a pass under way was given, its caller holds until the verdict.
    """
    stream.wait_event(event)
    try:
        with use(stream):
            yield
    finally:
        stream.synchronize()
