"""The tensors of a checkpoint in 16 bit, some of which are coded while they are loaded: the disk reads all of their bytes, host
memory and link hold seven tenths, or half beside a base that the device holds."""

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from types import TracebackType

import torch

from ..coding.tensor_codec import Part, part_name
from .encoding import Coder, Encoding, Scheme, unread
from .packed_source import Codecs
from .read_ahead import ReadAhead, Wanted
from .source import Destinations, TensorSource

Progress = Callable[[int], None]
Shapes = Mapping[str, tuple[int, ...]]


def encoding_source(
    inner: TensorSource, parameters: Shapes, copies: Mapping[str, str], scheme: Scheme, progress: Progress | None = None
) -> "EncodingSource":
    """Of all that `inner` has, with those of `parameters`, {name: shape}, stored as `scheme` has it for which it can, and
    `copies`, {name: that of one of them with the same bytes}. Reads once those of `parameters` that travel as others than they
    are, to know how many bytes they will take; `progress` gets the bytes read since its last call. Of a base, what was searched
    for is kept: 0.4 bits a weight."""
    wanted = [Wanted(name=name, shape=shape, dtype=inner.dtype(name)) for name, shape in parameters.items()]
    looked_at = [one for one in wanted if scheme.may_be_coded(one.shape, one.dtype)]
    found = {one.name: unread(scheme, one.name, one.shape, one.dtype) for one in wanted}
    if looked_at:
        with (
            inner.open() as feed,
            Coder(scheme) as coder,
            closing(ReadAhead(feed)) as ahead,
            closing(ahead.each(looked_at, progress)) as tensors,
        ):
            for one, tensor in tensors:
                found[one.name] = coder.look(one.name, tensor)
    encodings = {name: encoding for name, encoding in found.items() if encoding is not None}
    encodings |= {name: encodings[original] for name, original in copies.items() if original in encodings}
    places = {
        part_name(name, part.name): (name, number)
        for name, encoding in encodings.items()
        for number, part in enumerate(encoding.parts)
    }
    return EncodingSource(inner=inner, scheme=scheme, encodings=encodings, places=places)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodingSource:
    """A TensorSource of what is stored: the parts of the parameters in `encodings`, other tensors as `inner` has them. `places`
    says of each part whose it is, and which. What is read for a parameter counts as the first part of its codec, or as the
    parameter where it travels as it is: a base is made of what is read anyhow, if both are asked for at once."""

    inner: TensorSource
    scheme: Scheme
    encodings: Mapping[str, Encoding]
    places: Mapping[str, tuple[str, int]]

    @property
    def codecs(self) -> Codecs:
        """Of the parameters that travel as others than they are."""
        return {name: encoding.codec for name, encoding in self.encodings.items() if encoding.codec is not None}

    @property
    def bases(self) -> Mapping[str, tuple[Part, ...]]:
        """Of the parameters that have a base, its parts."""
        return {name: encoding.base for name, encoding in self.encodings.items() if encoding.base}

    @property
    def equal_layers(self) -> frozenset[int]:
        return self.inner.equal_layers

    def num_bytes(self, name: str) -> int:
        if name not in self.places:
            return self.inner.num_bytes(name)
        parameter, part = self.places[name]
        return self.inner.num_bytes(parameter) if part == 0 and self.encodings[parameter].codec is not None else 0

    def dtype(self, name: str) -> torch.dtype:
        if name not in self.places:
            return self.inner.dtype(name)
        parameter, part = self.places[name]
        return self.encodings[parameter].parts[part].dtype

    def open(self) -> "_EncodingFeed":
        return _EncodingFeed(self)


class _EncodingFeed:
    """Peak memory beyond the destinations: twice the largest parameter, and what reader and encoder take."""

    def __init__(self, source: EncodingSource) -> None:
        self._source, self._coder, self._inner = source, Coder(source.scheme), source.inner.open()
        self._ahead = ReadAhead(self._inner)

    def __enter__(self) -> "_EncodingFeed":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ahead.close()
        self._inner.__exit__(kind, error, trace)
        self._coder.__exit__(kind, error, trace)

    def fill(self, destinations: Destinations, progress: Progress | None = None) -> None:
        """Of a parameter all that travels or none, and all of its base or none. What is asked for of one parameter is made of
        one reading of it. CheckpointError for one that is not what it was when it was looked at."""
        source, wanted = self._source, dict[str, dict[str, torch.Tensor]]()
        for name, view in destinations.items():
            if name in source.places:
                parameter, part = source.places[name]
                wanted.setdefault(parameter, {})[source.encodings[parameter].parts[part].name] = view
        plain = {name: view for name, view in destinations.items() if name not in source.places and name not in wanted}
        self._inner.fill(plain, progress)
        reading = [Wanted(name=name, shape=source.encodings[name].shape, dtype=source.encodings[name].dtype) for name in wanted]
        with closing(self._ahead.each(reading)) as tensors:
            for one, tensor in tensors:
                encoding, parts = source.encodings[one.name], wanted[one.name]
                self._coder.encode(one.name, tensor, encoding, parts)
                if one.name in destinations:
                    destinations[one.name].copy_(tensor)
                counted = [one.name] if one.name in destinations else [part_name(one.name, part) for part in parts]
                if progress is not None:
                    progress(sum(map(source.num_bytes, counted)))
