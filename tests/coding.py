"""Stored tensors as tests ask for them: in the code of lossless_layout.py, and in blocks of GGUF files."""

from dataclasses import dataclass

import numpy as np
import torch

from offload.coding.gguf_types import BLOCKS
from offload.coding.lossless import lossless_codec
from offload.coding.lossless_encode import Encoder
from offload.coding.lossless_layout import Coded, num_bytes_of, prefix_of
from offload.coding.tensor_codec import TensorCodec

NAME = "layer.up_proj.weight"
# Where the float16 numbers of a block are; other bytes are free to be anything.
HALVES = {
    "Q8_0": (0,),
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "MXFP4": (),
}


@dataclass(frozen=True, slots=True)
class CodedTensor:
    codec: TensorCodec
    parts: dict[str, torch.Tensor]

    @property
    def num_bytes(self) -> int:
        return num_bytes_of(self.codec.parts)

    @property
    def coded(self) -> Coded:
        return Coded.of(self.parts, prefix_of(NAME))


def encode(tensor: torch.Tensor) -> CodedTensor:
    with Encoder(2) as encoder:
        survey = encoder.survey(tensor)
        assert survey is not None
        codec = lossless_codec(NAME, tuple(tensor.shape), survey.num_escapes, survey.num_exceptions, tensor.dtype)
        parts = {part.name: torch.full(part.shape, 77).to(part.dtype) for part in codec.parts}  # nothing relies on zeros
        encoder.encode(tensor, survey, Coded.of(parts, prefix_of(NAME)))
    return CodedTensor(codec, parts)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    integers = {4: torch.int32, 2: torch.int16}[one.element_size()]
    return torch.equal(one.view(integers), other.view(integers))


def normal(num_weights: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    """Of N(0, 0.02) in bfloat16, cast to `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(num_weights, generator=generator) * 0.02).bfloat16().to(dtype)


def random_blocks(type_name: str, num_blocks: int, seed: int = 0, *, huge: bool = True) -> torch.Tensor:
    """uint8 [num_blocks, bytes], every byte pattern but scales that are not finite; those of 2**-24 to 1 unless `huge`."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (num_blocks, BLOCKS[type_name].num_bytes), dtype=np.uint8)
    for place in HALVES[type_name]:
        high = blocks[:, place + 1]
        high[(high & 0x7C) == 0x7C] ^= 0x40  # the exponent of infinities and NaNs
        if not huge:
            high &= 0xBB
    if type_name == "MXFP4" and not huge:
        blocks[:, 0] = 100 + blocks[:, 0] % 32
    return torch.from_numpy(blocks)
