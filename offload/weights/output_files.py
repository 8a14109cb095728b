"""The weight files of a folder that is being written, one after another: a tensor is written while the next is made, and a file
that is whole reaches the disk, and is read once more for its digest, while the next is begun."""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from .manifest import FileDigest, digest_files
from .safetensors_writer import Entry, SafetensorsWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """Tensors by name, contiguous and on the CPU, and what safetensors calls their dtypes. `is_lent`: they are overwritten when
    the next are made."""

    tensors: Mapping[str, tuple[str, torch.Tensor]]
    is_lent: bool = False


class OutputFiles:
    """In `folder`. Holds two threads, and of what is made two at a time: the next, and what is being written. `finished` gets
    the name and the digest of each file that is on the disk whole, in order, in one of the threads; all of them before
    `__exit__` returns, which raises what went wrong with the last."""

    def __init__(self, folder: Path, finished: Callable[[str, FileDigest], None]) -> None:
        self._folder, self._finished = folder, finished
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="output-writer")
        self._finishing = ThreadPoolExecutor(1, thread_name_prefix="output-finisher")
        self._last: Future[None] | None = None

    def __enter__(self) -> "OutputFiles":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._writing.shutdown(wait=True, cancel_futures=True)
        self._finishing.shutdown(wait=True)
        if kind is None:
            _see(self._last)

    def write(self, name: str, most: Iterable[Entry], made: Iterable[Made]) -> None:
        """A file of all that is `made`; `most` as in SafetensorsWriter. OSError when it cannot be written, or the one before it
        could not be. Nothing of it is left after an exception."""
        writer = SafetensorsWriter(self._folder / name, most)
        pending, written = None, None
        try:
            for one in made:
                _see(pending)
                pending, written = self._writing.submit(_add, writer, one), one
                if one.is_lent:
                    _see(pending)
            _see(pending)
            _see(self._last)
        except BaseException:
            if pending is not None:
                wait([pending])
            writer.discard()
            raise
        finally:
            del written  # until here, so that memory is given back by the thread that took it
        self._last = self._finishing.submit(self._finish, writer, name)

    def _finish(self, writer: SafetensorsWriter, name: str) -> None:
        writer.finish()
        self._finished(name, digest_files([self._folder / name], None)[name])


def _see(pending: "Future[None] | None") -> None:
    """Raises what it raised."""
    if pending is not None:
        pending.result()


def _add(writer: SafetensorsWriter, one: Made) -> None:
    for name, (dtype, tensor) in one.tensors.items():
        writer.add(name, dtype, tensor)
