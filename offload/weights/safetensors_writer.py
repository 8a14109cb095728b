"""Writes one safetensors file tensor by tensor, keeping none of them. The format's header stands in front of the tensors and is
written when they are; the room that was left for it is filled up with spaces, as the format allows."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch

from .block_file import BlockFile
from .header import PREFIX_BYTES
from .reader import BLOCK_BYTES

Entry = tuple[str, str, tuple[int, ...]]  # name, dtype as in safetensors, shape
_MOST_BYTES = 2**62  # no offset is longer


class SafetensorsWriter:
    """`path` appears with `finish`, when the file is whole, on the disk and not only on its way there. Until then it is `path`
    with `.part` behind, which `discard` removes. OSError when it cannot be written."""

    def __init__(self, path: Path, most: Iterable[Entry]) -> None:
        """`most`: of entries that the file may get, at least those that it does."""
        self._path, self._part = path, path.with_name(f"{path.name}.part")
        header = _header({name: _entry(dtype, shape, _MOST_BYTES, _MOST_BYTES) for name, dtype, shape in most})
        self._head_bytes = -(-(PREFIX_BYTES + len(header)) // BLOCK_BYTES) * BLOCK_BYTES
        self._entries: dict[str, object] = {}
        self._num_bytes = 0
        self._file = BlockFile(self._part, self._head_bytes)

    def finish(self) -> None:
        """All was added: the file appears. After an exception nothing is left of it."""
        try:
            self._file.finish(self._head())
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
            data = tensor.view(-1).view(torch.uint8).numpy().data
            self._file.write(data)
            self._num_bytes += len(data)
        self._entries[name] = _entry(dtype, tuple(tensor.shape), start, self._num_bytes)

    def _head(self) -> bytes:
        header, room = _header(self._entries), self._head_bytes - PREFIX_BYTES
        assert len(header) <= room, "entries that were not announced"
        return room.to_bytes(PREFIX_BYTES, "little") + header.ljust(room)


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
