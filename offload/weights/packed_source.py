"""The tensors of a checkpoint that stores some parameters packed: whether their scales are sound, and what they compute as."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType

import torch

from ..coding.scales import bad_scale
from ..coding.tensor_codec import Part, TensorCodec, part_name
from .header import problems_error
from .source import Destinations, TensorFeed, TensorSource

Codecs = Mapping[str, TensorCodec]  # of the packed parameters, by full name
CURE = "download this checkpoint again; if it is whole, it was not made well"


def check_scales(stored: TensorSource, codecs: Codecs, where: str) -> None:
    """Reads all scales, those of one parameter at a time: some hundredths of the weights at most. CheckpointError, which names
    all that are not finite, and `where` they are."""
    scaled = {name: parts for name, codec in codecs.items() if (parts := [part for part in _all_parts(codec) if part.is_scale])}
    if not scaled:
        return
    problems: list[str] = []
    with stored.open() as feed:
        for parameter, parts in scaled.items():
            scales = {part_name(parameter, part.name): torch.empty(part.shape, dtype=part.dtype) for part in parts}
            feed.fill(scales)
            found = [bad_scale(name, scale) for name, scale in scales.items()]
            problems += [problem for problem in found if problem is not None]
    if problems:
        raise problems_error(problems, where=where, cure=CURE)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodedSource:
    """A TensorSource of parameters, of which those in `codecs` are decoded on the host from what `stored` has, by plain torch:
    for what is loaded once. `unpacked` is the dtype that they are, where they are of one. What is stored goes by its names,
    too."""

    stored: TensorSource
    codecs: Codecs
    unpacked: torch.dtype | None = None

    @property
    def equal_layers(self) -> frozenset[int]:
        return self.stored.equal_layers

    def num_bytes(self, name: str) -> int:
        codec = self.codecs.get(name)
        names = [name] if codec is None else [part_name(name, part.name) for part in _all_parts(codec)]
        return sum(map(self.stored.num_bytes, names))

    def dtype(self, name: str) -> torch.dtype:
        """Of a packed parameter `unpacked`, or that of its first part, in which nobody computes."""
        codec = self.codecs.get(name)
        return self.stored.dtype(name) if codec is None else self.unpacked or codec.parts[0].dtype

    def open(self) -> "_DecodedFeed":
        return _DecodedFeed(self)


class _DecodedFeed:
    """Peak memory beyond the destinations: what is stored of one parameter, and the workspace of its decoder."""

    def __init__(self, source: DecodedSource) -> None:
        self._inner: TensorFeed = source.stored.open()
        self._codecs = source.codecs

    def __enter__(self) -> "_DecodedFeed":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._inner.__exit__(kind, error, trace)

    def fill(self, destinations: Destinations, progress: Callable[[int], None] | None = None) -> None:
        self._inner.fill({name: view for name, view in destinations.items() if name not in self._codecs}, progress)
        for name, parameter in destinations.items():
            if (codec := self._codecs.get(name)) is None:
                continue
            parts = {part.name: torch.empty(part.shape, dtype=part.dtype) for part in _all_parts(codec)}
            self._inner.fill({part_name(name, part): tensor for part, tensor in parts.items()}, progress)
            with torch.inference_mode():
                codec.decode(parts, parameter)


def _all_parts(codec: TensorCodec) -> tuple[Part, ...]:
    return (*codec.parts, *codec.kept)
