"""Weights that are coded while they are loaded are those of the files."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from coding import normal, same_bits
from offload.coding.tensor_codec import TensorCodec, part_name
from offload.errors import CheckpointError
from offload.weights.checkpoint import Checkpoint, open_checkpoint
from offload.weights.encoding_source import EncodingSource, lossless_source
from offload.weights.source import CheckpointSource

UP, DOWN, TRUE_HALF, NORM = "layers.0.up.weight", "layers.0.down.weight", "layers.0.gate.weight", "layers.0.norm.weight"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    tensors = {
        UP: normal(300 * 64).view(300, 64),
        DOWN: normal(64 * 300, torch.float16, seed=1).view(64, 300),
        TRUE_HALF: torch.randn(64, 300, generator=torch.Generator().manual_seed(0)).half(),
        NORM: normal(4096, seed=2),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return open_checkpoint(tmp_path)


def source_of(checkpoint: Checkpoint) -> EncodingSource:
    return lossless_source(CheckpointSource(checkpoint), {name: info.shape for name, info in checkpoint.tensors.items()}, {})


def parts_of(name: str, codec: TensorCodec) -> dict[str, torch.Tensor]:
    return {part_name(name, part.name): torch.empty(part.shape, dtype=part.dtype) for part in codec.parts}


def raw(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    tensors = {name: torch.empty(info.shape, dtype=info.dtype) for name, info in checkpoint.tensors.items()}
    with CheckpointSource(checkpoint).open() as feed:
        feed.fill(tensors)
    return tensors


@pytest.mark.parametrize("inference", [False, True])
def test_what_is_decoded_is_what_the_files_have(checkpoint: Checkpoint, inference: bool) -> None:
    source, expected = source_of(checkpoint), raw(checkpoint)
    with torch.inference_mode(inference):
        stored = {name: torch.empty_like(expected[name]) for name in (TRUE_HALF, NORM)}
        stored |= {name: part for coded, codec in source.codecs.items() for name, part in parts_of(coded, codec).items()}
        with source.open() as feed:
            feed.fill(stored)
        for name, codec in source.codecs.items():
            found = torch.empty_like(expected[name])
            codec.decode({part.name: stored[part_name(name, part.name)] for part in codec.parts}, found)
            assert same_bits(found, expected[name])
    assert all(same_bits(stored[name], expected[name]) for name in (TRUE_HALF, NORM))


def test_matrices_are_coded_where_it_pays(checkpoint: Checkpoint) -> None:
    assert source_of(checkpoint).codecs.keys() == {UP, DOWN}


def test_bytes_read_are_those_of_the_files(checkpoint: Checkpoint) -> None:
    surveyed: list[int] = []
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    source = lossless_source(CheckpointSource(checkpoint), shapes, {}, surveyed.append)
    matrices = (UP, DOWN, TRUE_HALF)
    assert sum(surveyed) == sum(checkpoint.tensors[name].num_bytes for name in matrices)
    read: list[int] = []
    stored = parts_of(UP, source.codecs[UP]) | {NORM: torch.empty(4096, dtype=torch.bfloat16)}
    with source.open() as feed:
        feed.fill(stored, read.append)
    assert sum(read) == sum(map(source.num_bytes, stored)) == sum(checkpoint.tensors[name].num_bytes for name in (UP, NORM))


def test_a_file_that_changes_after_it_was_looked_at_is_refused(checkpoint: Checkpoint) -> None:
    source = source_of(checkpoint)
    info = checkpoint.tensors[UP]
    with info.path.open("r+b") as file:
        file.seek(info.offset_bytes)
        file.write(bytes(info.num_bytes))
    with source.open() as feed, pytest.raises(CheckpointError, match=f"{UP}' has changed"):
        feed.fill(parts_of(UP, source.codecs[UP]))


def test_dtypes_are_those_of_the_parts(checkpoint: Checkpoint) -> None:
    source = source_of(checkpoint)
    for name, codec in source.codecs.items():
        assert [source.dtype(part_name(name, part.name)) for part in codec.parts] == [part.dtype for part in codec.parts]
    assert source.dtype(NORM) == torch.bfloat16 and source.dtype(TRUE_HALF) == torch.float16
