"""Errors of torch and of the libraries below it, told as ours. Each device knows its own; nobody above it reads theirs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..errors import OffloadError


@contextmanager
def translated(translate: Callable[[Exception], None]) -> Iterator[None]:
    """`translate` raises what an error means, and returns where it does not know it: then the error passes as it is.

    It raises instead of returning: a frame that holds an error which holds the frame, and with it all that was computed,
    would keep that memory until the garbage collector comes.
    """
    try:
        yield
    except OffloadError:
        raise
    except Exception as error:
        translate(error)
        raise
