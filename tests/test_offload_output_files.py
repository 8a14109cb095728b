"""Weight files that are written in the background are whole or not there, in order, and their digests are theirs."""

import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from offload.weights.manifest import FileDigest
from offload.weights.output_files import Made, OutputFiles
from offload.weights.safetensors_writer import SafetensorsWriter

MOST = [("lent", "F32", (1000,)), ("own", "F32", (1000,))]


def one_after_another(number: int) -> Iterator[Made]:
    """Lent memory changes as soon as more is asked for."""
    lent = torch.full((1000,), float(number))
    yield Made(tensors={"lent": ("F32", lent)}, is_lent=True)
    lent.fill_(-1)
    yield Made(tensors={"own": ("F32", torch.full((1000,), number + 0.5))})


def test_files_are_what_was_made_and_are_told_in_order_with_their_digests(tmp_path: Path) -> None:
    told: list[tuple[str, FileDigest]] = []
    with OutputFiles(tmp_path, lambda name, digest: told.append((name, digest))) as files:
        for number in range(4):
            files.write(f"{number}.safetensors", MOST, one_after_another(number))
    assert [name for name, _ in told] == [f"{number}.safetensors" for number in range(4)] == sorted(os.listdir(tmp_path))
    for number, (name, digest) in enumerate(told):
        found = load_file(tmp_path / name)
        assert {tensor: values.unique().tolist() for tensor, values in found.items()} == {
            "lent": [number],
            "own": [number + 0.5],
        }
        contents = (tmp_path / name).read_bytes()
        assert digest == FileDigest(bytes=len(contents), sha256=hashlib.sha256(contents).hexdigest())


def broken(number: int) -> Iterator[Made]:
    yield from one_after_another(number)
    raise KeyboardInterrupt


def test_what_interrupts_leaves_files_that_were_whole(tmp_path: Path) -> None:
    told: list[str] = []
    with pytest.raises(KeyboardInterrupt), OutputFiles(tmp_path, lambda name, _: told.append(name)) as files:
        files.write("0.safetensors", MOST, one_after_another(0))
        files.write("1.safetensors", MOST, broken(1))
    assert told == os.listdir(tmp_path) == ["0.safetensors"]


@pytest.mark.parametrize("num_after", [0, 1])
def test_a_file_that_does_not_reach_the_disk_is_an_error_of_the_next_or_of_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_after: int
) -> None:
    def fail(writer: SafetensorsWriter) -> None:
        writer.discard()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    told: list[str] = []
    monkeypatch.setattr(SafetensorsWriter, "finish", fail)
    with pytest.raises(OSError, match="Input/output"), OutputFiles(tmp_path, lambda name, _: told.append(name)) as files:
        for number in range(1 + num_after):
            files.write(f"{number}.safetensors", MOST, one_after_another(number))
        assert not num_after
    assert not told and not os.listdir(tmp_path)
