"""The weights of a scale model, made instead of read: a TensorSource. Every layer beyond the small model's is an identity,
and all of those have the same bytes."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType

import torch

from ..weights.source import Destinations, TensorFeed, TensorSource
from .geometry import Geometry
from .placing import place

_LAYER = re.compile(r".*\.layers\.([0-9]+)\..+")
_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"
_TILE_VALUES = 2**20
_READ_STD = 0.02  # finite in every dtype, whatever reads it; random, as multiplying by zeros would draw less power

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleWeights:
    """Fills tensors of `wide_shapes` from the small model's `source`, whose tensors have the same names."""

    geometry: Geometry
    source: TensorSource
    small_shapes: Shapes
    wide_shapes: Shapes

    @property
    def equal_layers(self) -> frozenset[int]:
        return frozenset(range(self.geometry.small.num_layers, self.geometry.wide.num_layers))

    def num_bytes(self, name: str) -> int:
        return torch.Size(self.wide_shapes[name]).numel() * self.dtype(name).itemsize

    def dtype(self, name: str) -> torch.dtype:
        return self.source.dtype(_EMBEDDING)

    def open(self) -> "ScaleFeed":
        return ScaleFeed(self)


class ScaleFeed:
    """Peak memory beyond the destinations: one tensor of the small model and a tile of random values."""

    def __init__(self, weights: ScaleWeights) -> None:
        self._weights = weights
        self._small: TensorFeed = weights.source.open()
        self._tile = torch.randn(_TILE_VALUES, generator=torch.Generator().manual_seed(0)) * _READ_STD

    def __enter__(self) -> "ScaleFeed":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._small.__exit__(kind, error, trace)

    def fill(self, destinations: Destinations, progress: Callable[[int], None] | None = None) -> None:
        for name, wide in destinations.items():
            place(self._weights.geometry, name, self._read(name), wide, self._tile)
            if progress is not None:
                progress(self._weights.num_bytes(name))

    def _read(self, name: str) -> torch.Tensor | None:
        """The small model's tensor in float32, None where it has none: in an identity layer."""
        layer = _LAYER.fullmatch(name)
        if layer is not None and int(layer[1]) in self._weights.equal_layers:
            return None
        shapes = self._weights.small_shapes
        if name not in shapes:
            if name != _HEAD:
                return None  # a bias that the small model does not have
            name = _EMBEDDING  # the small model ties them
        small = torch.empty(shapes[name], dtype=torch.float32)
        self._small.fill({name: small})
        return small
