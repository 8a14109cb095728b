"""A parameter that is stored as a tensor of a GGUF file is: in blocks, or with the rows of its heads in another order."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from .chunks import row_chunks
from .gguf_blocks import BLOCK_DECODERS
from .gguf_types import BLOCKS
from .tensor_codec import Part, TensorCodec

WORKSPACE_BYTES_PER_WEIGHT: Final = 16  # of BLOCK_DECODERS, at most: a test measures it
KERNELS: Final = frozenset({"Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K"})
_FLOATS: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufDecoder:
    """Of a parameter [N, C] whose one part holds N rows of blocks, uint8 [N, row bytes], or N numbers or rows of them.

    `num_heads`: the rows of each of so many heads are stored as 0, N/2, 1, N/2 + 1 and so on, N being those of a head. So ggml
    wants queries and keys of the Llama family, whose rotary pairs are neighbours there, and halves of a head in transformers.
    """

    type_name: str
    num_heads: int | None = None

    def __call__(self, parts: Mapping[str, torch.Tensor], parameter: torch.Tensor) -> None:
        (stored,) = parts.values()
        rows = parameter.view(parameter.shape[0], -1)  # [N, C]
        head_rows = rows.shape[0] // self.num_heads if self.num_heads else 1
        row_bytes = rows.shape[1] * WORKSPACE_BYTES_PER_WEIGHT
        for chunk in row_chunks(rows.shape[0], row_bytes, device_type=rows.device.type, multiple=head_rows):
            decoded = self._rows(stored[chunk])  # [n, C]
            if self.num_heads:
                pairs = decoded.view(-1, head_rows // 2, 2, rows.shape[1])
                rows[chunk].view(-1, 2, head_rows // 2, rows.shape[1]).copy_(pairs.transpose(1, 2))
            else:
                rows[chunk].copy_(decoded)

    def _rows(self, stored: torch.Tensor) -> torch.Tensor:
        if self.type_name in _FLOATS:
            return stored.view(stored.shape[0], -1)
        blocks = stored.reshape(-1, BLOCKS[self.type_name].num_bytes)
        return BLOCK_DECODERS[self.type_name](blocks).view(stored.shape[0], -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufKernel:
    """`GgufDecoder` as a kernel, of the types in KERNELS."""

    type_name: str
    num_heads: int | None = None

    def __call__(self, parts: Mapping[str, torch.Tensor], parameter: torch.Tensor) -> None:
        from .gguf_kernels import decode  # triton, which need not be installed

        (stored,) = parts.values()
        decode(self.type_name, stored, parameter, self.num_heads)


def gguf_codec(part: str, type_name: str, shape: tuple[int, ...], num_heads: int | None = None) -> TensorCodec | None:
    """Of a parameter of `shape` whose tensor is called `part` and has a type of BLOCKS; None where it is stored as it is.
    ValueError where blocks do not make up its rows, or heads its number of rows."""
    if num_heads and shape[0] % (2 * num_heads):
        raise ValueError(f"has {shape[0]:,} rows, which {num_heads} heads of pairs do not make up")
    if type_name in _FLOATS:
        if not num_heads:
            return None
        stored = Part(name=part, shape=shape, dtype=_FLOATS[type_name])
        return TensorCodec(format=type_name, parts=(stored,), decode=GgufDecoder(type_name=type_name, num_heads=num_heads))
    block = BLOCKS[type_name]
    if len(shape) != 2 or shape[1] % block.num_weights:
        raise ValueError(f"has the shape {shape}, whose rows blocks of {block.num_weights} ({type_name}) do not make up")
    row_bytes = shape[1] // block.num_weights * block.num_bytes
    return TensorCodec(
        format=type_name,
        parts=(Part(name=part, shape=(shape[0], row_bytes), dtype=torch.uint8),),
        decode=GgufDecoder(type_name=type_name, num_heads=num_heads),
        kernel=GgufKernel(type_name=type_name, num_heads=num_heads) if type_name in KERNELS else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredAs:
    """How one parameter is stored: its type, and how many heads have their rows in pairs."""

    type_name: str
    num_heads: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufPacking:
    """A Packing. `parameters` says of each how it is stored."""

    name: str
    parameters: Mapping[str, StoredAs]

    def codec_of(self, parameter: str, shape: tuple[int, ...], beside: Mapping[str, Part]) -> TensorCodec | None:
        stored = self.parameters.get(parameter)
        if stored is None:
            return None
        return gguf_codec(parameter.rpartition(".")[2], stored.type_name, shape, stored.num_heads)
