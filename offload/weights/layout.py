"""One flat buffer per decoder layer, and typed views into it. Knows neither files nor devices."""

import math
from collections.abc import Iterable
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
    """Where each tensor of a layer lies in its flat buffer. All layers of a model share one layout, so that a layer is
    one contiguous copy and a slot fits any of them."""

    fields: tuple[Field, ...]
    num_bytes: int

    @classmethod
    def pack(cls, tensors: Iterable[tuple[str, tuple[int, ...]]], dtype: torch.dtype) -> "LayerLayout":
        """Lay `(name, shape)` pairs out one after another, each aligned to 256 bytes."""
        fields: list[Field] = []
        end = 0
        for name, shape in tensors:
            field = Field(name, tuple(shape), dtype, end)
            fields.append(field)
            end = _align(field.offset_bytes + field.num_bytes)
        return cls(tuple(fields), end)

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """Typed views into `buffer` ([>= num_bytes] uint8, 256-byte aligned). They share its memory and its lifetime."""
        assert buffer.dtype == torch.uint8 and buffer.numel() >= self.num_bytes
        return {
            field.name: buffer[field.offset_bytes : field.offset_bytes + field.num_bytes].view(field.dtype).view(field.shape)
            for field in self.fields
        }


def _align(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
