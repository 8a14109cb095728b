"""Writes one safetensors file tensor by tensor, keeping none of them. The format's header stands in front of the tensors and is
written when they are; the room that was left for it is filled up with spaces, as the format allows."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import torch

from .header import PREFIX_BYTES

Entry = tuple[str, str, tuple[int, ...]]  # name, dtype as in safetensors, shape
_MOST_BYTES = 2**62  # no offset is longer


class SafetensorsWriter:
    """`path` appears when the file is closed and whole, on the disk and not only on its way there. OSError when it cannot be
    written. Until then it is `path` with `.part` behind, which is gone after an exception."""

    def __init__(self, path: Path, most: Iterable[Entry]) -> None:
        """`most`: of entries that the file may get, at least those that it does."""
        self._path, self._part = path, path.with_name(f"{path.name}.part")
        self._room = len(_header({name: _entry(dtype, shape, _MOST_BYTES, _MOST_BYTES) for name, dtype, shape in most}))
        self._entries: dict[str, object] = {}
        self._num_bytes = 0
        self._file = open(self._part, "wb")  # noqa: SIM115 (open until `__exit__`)
        self._file.seek(PREFIX_BYTES + self._room)

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.finish()
        else:
            self.discard()

    def finish(self) -> None:
        """All was added: the file appears. After an exception nothing is left of it."""
        try:
            self._write_header()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._part, self._path)
            sync_folder(self._path.parent)
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Nothing is left of it."""
        try:
            self._file.close()
        finally:
            self._part.unlink(missing_ok=True)

    def add(self, name: str, dtype: str, tensor: torch.Tensor) -> None:
        """A contiguous tensor on the CPU, whose dtype safetensors calls `dtype`."""
        start = self._num_bytes
        if tensor.numel():
            self._num_bytes += self._file.write(tensor.view(-1).view(torch.uint8).numpy().data)
        self._entries[name] = _entry(dtype, tuple(tensor.shape), start, self._num_bytes)

    def _write_header(self) -> None:
        header = _header(self._entries)
        assert len(header) <= self._room, "entries that were not announced"
        self._file.seek(0)
        self._file.write(self._room.to_bytes(PREFIX_BYTES, "little") + header.ljust(self._room))
        self._file.flush()


def sync_folder(folder: Path) -> None:
    """What was renamed in it stays so, whatever happens to the power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _entry(dtype: str, shape: tuple[int, ...], start: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": (start, end)}


def _header(entries: dict[str, object]) -> bytes:
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":"), ensure_ascii=True)
    return text.encode("ascii")
