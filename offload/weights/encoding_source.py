"""The tensors of a checkpoint in 16 bit, some of which are coded while they are loaded: the disk reads all of their bytes, host
memory and link hold seven tenths."""

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from types import TracebackType

import torch

from ..coding.lossless import FORMATS, lossless_codec, pays
from ..coding.lossless_encode import Encoder, Survey
from ..coding.lossless_layout import Coded, prefix_of
from ..coding.tensor_codec import TensorCodec, part_name
from ..errors import CheckpointError
from .header import quoted
from .packed_source import Codecs
from .read_ahead import ReadAhead, Wanted
from .source import Destinations, TensorSource

Progress = Callable[[int], None]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """How a parameter of that shape and dtype is coded."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    survey: Survey
    codec: TensorCodec


def lossless_source(
    inner: TensorSource, parameters: Shapes, copies: Mapping[str, str], progress: Progress | None = None
) -> "EncodingSource":
    """Of all that `inner` has, with those of `parameters`, {name: shape}, coded for which it pays, and `copies`, {name: that of
    one of them with the same bytes}. Reads `parameters` once, to know how many bytes they will take; `progress` gets the bytes
    read since its last call."""
    encodings: dict[str, Encoding] = {}
    candidates = {name: shape for name, shape in parameters.items() if may_be_coded(shape, inner.dtype(name))}
    wanted = [Wanted(name=name, shape=shape, dtype=inner.dtype(name)) for name, shape in candidates.items()]
    with (
        inner.open() as feed,
        Encoder() as encoder,
        closing(ReadAhead(feed)) as ahead,
        closing(ahead.each(wanted, progress)) as tensors,
    ):
        for one, tensor in tensors:
            encoding = encoding_of(one.name, tensor, encoder)
            if encoding is not None:
                encodings[one.name] = encoding
    encodings |= {name: encodings[original] for name, original in copies.items() if original in encodings}
    places = {
        part_name(name, part.name): (name, number)
        for name, encoding in encodings.items()
        for number, part in enumerate(encoding.codec.parts)
    }
    return EncodingSource(inner=inner, encodings=encodings, places=places)


def may_be_coded(shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """A matrix in 16 bit: vectors are too few bytes to matter."""
    return len(shape) > 1 and dtype in FORMATS


def encoding_of(name: str, tensor: torch.Tensor, encoder: Encoder) -> Encoding | None:
    """None where a code does not pay."""
    survey, shape = encoder.survey(tensor), tuple(tensor.shape)
    if survey is None:
        return None
    codec = lossless_codec(name, shape, survey.num_escapes, survey.num_exceptions, tensor.dtype)
    return Encoding(shape=shape, dtype=tensor.dtype, survey=survey, codec=codec) if pays(codec, shape) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodingSource:
    """A TensorSource of what is stored: the parts of the parameters in `encodings`, other tensors as `inner` has them. `places`
    says of each part whose it is, and which. What is read for a parameter counts as its first part's."""

    inner: TensorSource
    encodings: Mapping[str, Encoding]
    places: Mapping[str, tuple[str, int]]

    @property
    def codecs(self) -> Codecs:
        return {name: encoding.codec for name, encoding in self.encodings.items()}

    @property
    def equal_layers(self) -> frozenset[int]:
        return self.inner.equal_layers

    def num_bytes(self, name: str) -> int:
        parameter, part = self.places.get(name, (name, 0))
        return self.inner.num_bytes(parameter) if part == 0 else 0

    def dtype(self, name: str) -> torch.dtype:
        if name not in self.places:
            return self.inner.dtype(name)
        parameter, part = self.places[name]
        return self.encodings[parameter].codec.parts[part].dtype

    def open(self) -> "_EncodingFeed":
        return _EncodingFeed(self)


class _EncodingFeed:
    """Peak memory beyond the destinations: twice the largest parameter, and what reader and encoder take."""

    def __init__(self, source: EncodingSource) -> None:
        self._source, self._encoder, self._inner = source, Encoder(), source.inner.open()
        self._ahead = ReadAhead(self._inner)

    def __enter__(self) -> "_EncodingFeed":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ahead.close()
        self._inner.__exit__(kind, error, trace)
        self._encoder.__exit__(kind, error, trace)

    def fill(self, destinations: Destinations, progress: Progress | None = None) -> None:
        """All parts of a parameter, or none. CheckpointError for one that is not what it was when it was looked at."""
        places = self._source.places
        self._inner.fill({name: view for name, view in destinations.items() if name not in places}, progress)
        names = dict.fromkeys(places[name][0] for name in destinations if name in places)  # in order, and once
        encodings = {name: self._source.encodings[name] for name in names}
        wanted = [Wanted(name=name, shape=found.shape, dtype=found.dtype) for name, found in encodings.items()]
        with closing(self._ahead.each(wanted, progress)) as tensors:
            for one, tensor in tensors:
                encoding = encodings[one.name]
                parts = {part.name: destinations[part_name(one.name, part.name)] for part in encoding.codec.parts}
                encode_into(one.name, tensor, encoding, parts, self._encoder)


def encode_into(name: str, tensor: torch.Tensor, encoding: Encoding, parts: Destinations, encoder: Encoder) -> None:
    """CheckpointError when the code of `tensor` does not give it back."""
    try:
        encoder.encode(tensor, encoding.survey, Coded.of(parts, prefix_of(name)))
    except ValueError as error:
        raise CheckpointError(
            f"tensor {quoted(name)} {error}",
            where="16-bit weights, coded without loss",
            cure="run again; if it happens again, check the disk and the memory of this machine",
        ) from error
