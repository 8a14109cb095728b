"""Weights that are coded while they are loaded are those of the files, whichever way they travel and whatever is made
beside."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from coding import normal, same_bits
from offload.coding.base_kinds import BASE_KINDS
from offload.coding.base_layout import Base, base_prefix
from offload.coding.residual_encode import ResidualEncoder
from offload.coding.tensor_codec import Part, TensorCodec, part_name
from offload.errors import CheckpointError
from offload.weights.checkpoint import Checkpoint, open_checkpoint
from offload.weights.encoding import LOSSLESS, Scheme
from offload.weights.encoding_source import EncodingSource, encoding_source
from offload.weights.source import CheckpointSource, Destinations, TensorFeed, TensorSource

UP, DOWN, TRUE_HALF, NORM = "layers.0.up.weight", "layers.0.down.weight", "layers.0.gate.weight", "layers.0.norm.weight"
MATRICES = (UP, DOWN, TRUE_HALF)
INT4 = BASE_KINDS["int4"]
SCHEMES = {
    "lossless": LOSSLESS,
    "residual": Scheme("residual", INT4),
    "residual int8": Scheme("residual", BASE_KINDS["int8"]),
    "residual int3": Scheme("residual", BASE_KINDS["int3"]),
    "base": Scheme("none", INT4),
    "base and lossless": Scheme("lossless", INT4),
}
every_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
based = pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES.values() if scheme.base is not None], ids=str)


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


@dataclass
class Watched:
    """A TensorSource that notes what is read of it."""

    inner: TensorSource
    read: list[str] = field(default_factory=list)
    equal_layers: frozenset[int] = frozenset()

    def num_bytes(self, name: str) -> int:
        return self.inner.num_bytes(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.inner.dtype(name)

    def open(self) -> "WatchedFeed":
        return WatchedFeed(self.inner.open(), self.read)


class WatchedFeed:
    def __init__(self, inner: TensorFeed, read: list[str]) -> None:
        self._inner, self._read = inner, read

    def __enter__(self) -> "WatchedFeed":
        return self

    def __exit__(self, *error: object) -> None:
        self._inner.__exit__(None, None, None)

    def fill(self, destinations: Destinations, progress: Callable[[int], None] | None = None) -> None:
        self._read += destinations
        self._inner.fill(destinations, progress)


def source_of(
    checkpoint: Checkpoint, scheme: Scheme, progress: Callable[[int], None] | None = None, watched: Watched | None = None
) -> EncodingSource:
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    return encoding_source(watched or CheckpointSource(checkpoint), shapes, {}, scheme, progress)


def empty(name: str, parts: tuple[Part, ...]) -> dict[str, torch.Tensor]:
    return {part_name(name, part.name): torch.full(part.shape, 77).to(part.dtype) for part in parts}


def stored_of(source: EncodingSource, name: str, raw: torch.Tensor) -> dict[str, torch.Tensor]:
    codec = source.codecs.get(name)
    return {name: torch.empty_like(raw)} if codec is None else empty(name, codec.parts)


def base_of(source: EncodingSource, name: str) -> dict[str, torch.Tensor]:
    return empty(name, source.bases.get(name, ()))


def read_raw(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    tensors = {name: torch.empty(info.shape, dtype=info.dtype) for name, info in checkpoint.tensors.items()}
    with CheckpointSource(checkpoint).open() as feed:
        feed.fill(tensors)
    return tensors


def fill(source: EncodingSource, *destinations: Destinations) -> None:
    with source.open() as feed:
        for some in destinations:
            feed.fill(some)


def decoded(name: str, codec: TensorCodec, found: Destinations, like: torch.Tensor) -> torch.Tensor:
    parameter = torch.empty_like(like)
    codec.decode({part.name: found[part_name(name, part.name)] for part in (*codec.parts, *codec.kept)}, parameter)
    return parameter


@every_scheme
@pytest.mark.parametrize("inference", [False, True])
def test_what_is_decoded_is_what_the_files_have(checkpoint: Checkpoint, scheme: Scheme, inference: bool) -> None:
    source, expected = source_of(checkpoint, scheme), read_raw(checkpoint)
    with torch.inference_mode(inference):
        found: dict[str, torch.Tensor] = {}
        for name, raw in expected.items():
            found |= stored_of(source, name, raw) | base_of(source, name)
        fill(source, found)
        for name, raw in expected.items():
            codec = source.codecs.get(name)
            assert same_bits(found[name] if codec is None else decoded(name, codec, found, raw), raw)


@every_scheme
def test_it_is_the_same_asked_for_apart_or_at_once(checkpoint: Checkpoint, scheme: Scheme) -> None:
    source, raw = source_of(checkpoint, scheme), read_raw(checkpoint)
    for name in MATRICES:
        at_once = stored_of(source, name, raw[name]) | base_of(source, name)
        stored, base = stored_of(source, name, raw[name]), base_of(source, name)
        fill(source, at_once)
        fill(source, base, stored)
        assert all(torch.equal(at_once[part], tensor) for part, tensor in {**stored, **base}.items())


@based
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_base_is_the_encoders_whatever_travels(tmp_path: Path, scheme: Scheme, dtype: torch.dtype) -> None:
    save_file({UP: normal(30 * 200).view(30, 200).to(dtype)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    source, tensor = source_of(checkpoint, scheme), read_raw(checkpoint)[UP]
    found = base_of(source, UP)
    fill(source, found)
    expected = empty(UP, source.bases[UP])
    assert scheme.base is not None
    with ResidualEncoder(scheme.base, 1) as encoder:
        by_part = {part.name: expected[part_name(UP, part.name)] for part in source.bases[UP]}
        encoder.encode_base(tensor, encoder.fit(tensor), Base.of(by_part, base_prefix(UP)))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert (UP in source.codecs) == (scheme.travel != "none" and dtype == torch.bfloat16)


def test_what_is_coded_and_what_has_a_base(checkpoint: Checkpoint) -> None:
    """Codes without a base where they pay; a remainder of every matrix, as a base knows something of each; of a vector
    nothing."""
    halves = {UP, DOWN}
    for name, coded in {"lossless": halves, "residual": set(MATRICES), "base": set(), "base and lossless": halves}.items():
        source = source_of(checkpoint, SCHEMES[name])
        assert (set(source.codecs), set(source.bases)) == (coded, set() if name == "lossless" else set(MATRICES))
        for tensor, codec in source.codecs.items():
            assert codec.kept == (source.bases[tensor] if name == "residual" else ())


@pytest.mark.parametrize(("name", "looks"), [("lossless", 1), ("residual", 1), ("base", 0), ("base and lossless", 1)])
def test_everything_of_a_matrix_is_made_of_one_reading_and_a_base_alone_asks_for_no_look(
    checkpoint: Checkpoint, name: str, looks: int
) -> None:
    watched = Watched(CheckpointSource(checkpoint))
    source = source_of(checkpoint, SCHEMES[name], watched=watched)
    assert watched.read == looks * list(MATRICES)
    watched.read.clear()
    wanted: dict[str, torch.Tensor] = {}
    for one, raw in read_raw(checkpoint).items():
        wanted |= stored_of(source, one, raw) | base_of(source, one)
    fill(source, wanted)
    assert sorted(watched.read) == sorted((*MATRICES, NORM))


@every_scheme
def test_bytes_read_are_those_of_the_files(checkpoint: Checkpoint, scheme: Scheme) -> None:
    surveyed: list[int] = []
    source, raw = source_of(checkpoint, scheme, surveyed.append), read_raw(checkpoint)
    assert sum(surveyed) == (scheme.travel != "none") * sum(checkpoint.tensors[name].num_bytes for name in MATRICES)
    read: list[int] = []
    wanted = stored_of(source, UP, raw[UP]) | base_of(source, UP) | {NORM: torch.empty(4096, dtype=torch.bfloat16)}
    with source.open() as feed:
        feed.fill(wanted, read.append)
    assert sum(read) == sum(map(source.num_bytes, wanted)) == sum(checkpoint.tensors[name].num_bytes for name in (UP, NORM))


@pytest.mark.parametrize("name", ["lossless", "residual", "base and lossless"])
def test_a_file_that_changes_after_it_was_looked_at_is_refused(checkpoint: Checkpoint, name: str) -> None:
    source = source_of(checkpoint, SCHEMES[name])
    info = checkpoint.tensors[UP]
    with info.path.open("r+b") as file:
        file.seek(info.offset_bytes)
        file.write(bytes(info.num_bytes))
    with pytest.raises(CheckpointError, match=f"{UP}' has changed"):
        fill(source, empty(UP, source.codecs[UP].parts))


@every_scheme
def test_dtypes_are_those_of_the_parts(checkpoint: Checkpoint, scheme: Scheme) -> None:
    source = source_of(checkpoint, scheme)
    parts = [(name, part) for name, codec in source.codecs.items() for part in codec.parts]
    parts += [(name, part) for name, base in source.bases.items() for part in base]
    assert parts and all(source.dtype(part_name(name, part.name)) == part.dtype for name, part in parts)
    assert source.dtype(NORM) == torch.bfloat16 and source.dtype(TRUE_HALF) == torch.float16


@based
def test_equal_tensors_are_looked_at_once_and_each_is_there(checkpoint: Checkpoint, scheme: Scheme) -> None:
    watched = Watched(CheckpointSource(checkpoint))
    shapes = {UP: checkpoint.tensors[UP].shape}
    source = encoding_source(watched, shapes, {"layers.1.up.weight": UP}, scheme)
    assert watched.read.count(UP) <= 1 and set(watched.read) <= {UP}
    assert source.bases.keys() == {UP, "layers.1.up.weight"} and source.bases[UP] == source.bases["layers.1.up.weight"]
    assert source.dtype("layers.1.up.weight_base_scale") == torch.bfloat16


def test_a_remainder_of_nothing_is_no_scheme() -> None:
    with pytest.raises(ValueError, match="no scheme"):
        Scheme("residual")
    with pytest.raises(ValueError, match="no scheme"):
        Scheme("residal", INT4)
