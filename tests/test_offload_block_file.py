"""A file that is written in blocks past the page cache has the bytes that it was given, on every file system."""

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offload.weights import block_file
from offload.weights.block_file import BlockFile
from offload.weights.reader import BLOCK_BYTES

HEAD = b"head" * (BLOCK_BYTES // 4)
Refuse = Callable[[pytest.MonkeyPatch], None]


def nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pass


def the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    open_file = os.open

    def refuse(path: Any, flags: int, *mode: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return open_file(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)


def to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the flag is there; and afterwards not all at once."""
    write = os.pwrite

    def refuse(descriptor: int, view: memoryview, offset: int) -> int:
        if block_file.fcntl.fcntl(descriptor, block_file.fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return write(descriptor, view[:1000], offset)

    monkeypatch.setattr(os, "pwrite", refuse)


@pytest.mark.parametrize("refused", [nothing, the_flag, to_write])
@pytest.mark.parametrize("num_bytes", [0, 1, 4095, 4096, 4097, 3 * 4096 - 1, 3 * 4096, 50_000])
def test_bytes_are_those_that_were_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refuse, num_bytes: int
) -> None:
    monkeypatch.setattr(block_file, "BUFFER_BYTES", 3 * BLOCK_BYTES)
    refused(monkeypatch)
    rng, path = random.Random(num_bytes), tmp_path / "file"
    path.write_bytes(b"what was there" * 10_000)
    data = rng.randbytes(num_bytes)
    file, written = BlockFile(path, len(HEAD)), 0
    while written < num_bytes:
        count = rng.randint(1, num_bytes)
        file.write(memoryview(data)[written : written + count])
        written += count
    file.finish(HEAD)
    file.close()
    file.close()
    assert path.read_bytes() == HEAD + data
    assert not (file.is_direct and refused is not nothing)


def test_a_full_disk_is_an_error_and_not_another_way_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = BlockFile(tmp_path / "file", len(HEAD))
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        file.finish(HEAD)
    file.close()
