"""One flat buffer per decoder layer, and typed views into it. Knows neither files nor devices."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

ALIGNMENT_BYTES = 256  # what CUDA's own allocator gives; every kernel's vector loads are content with it


@dataclass(frozen=True, slots=True)
class Field:
    """One tensor inside a layer buffer: `num_bytes` bytes at `offset_bytes`."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset_bytes: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """Where each tensor of a layer lies in its flat buffer, so that a layer is one contiguous copy."""

    fields: tuple[Field, ...]
    num_bytes: int

    @classmethod
    def pack(cls, tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype]]) -> "LayerLayout":
        """Lay (name, shape, dtype) out one after another, each aligned to 256 bytes."""
        fields: list[Field] = []
        end = 0
        for name, shape, dtype in tensors:
            field = Field(name, tuple(shape), dtype, end)
            fields.append(field)
            end = _align(field.offset_bytes + field.num_bytes)
        return cls(tuple(fields), end)

    @property
    def num_elements(self) -> int:
        return sum(math.prod(field.shape) for field in self.fields)

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """Typed views into `buffer` ([>= num_bytes] uint8, 256-byte aligned). They share its memory and its lifetime."""
        assert buffer.dtype == torch.uint8 and buffer.numel() >= self.num_bytes
        return {
            field.name: buffer[field.offset_bytes : field.offset_bytes + field.num_bytes].view(field.dtype).view(field.shape)
            for field in self.fields
        }


NOTHING = LayerLayout((), 0)


def of_one_dtype(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Tensors of `shapes` for `LayerLayout.pack`."""
    return [(name, shape, dtype) for name, shape in shapes.items()]


def lay_out(layers: Sequence[Mapping[str, tuple[int, ...]]], dtype: torch.dtype) -> tuple[LayerLayout, ...]:
    """A layout for each of `layers`, {name: shape}. Layers that share one object share one layout."""
    kinds = {id(shapes): shapes for shapes in layers}
    made = {key: LayerLayout.pack(of_one_dtype(shapes, dtype)) for key, shapes in kinds.items()}
    return tuple(made[id(shapes)] for shapes in layers)


def views_of_each(layouts: Sequence[LayerLayout], buffer: torch.Tensor) -> tuple[dict[str, torch.Tensor], ...]:
    """Views into one `buffer` for each of `layouts`, which use it in turn. Equal layouts share theirs."""
    made = {layout: layout.views(buffer) for layout in set(layouts)}
    return tuple(made[layout] for layout in layouts)


def _align(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
