"""A tensor in the code of lossless_layout.py, as tests ask for it."""

from dataclasses import dataclass

import torch

from offload.coding.lossless import lossless_codec
from offload.coding.lossless_encode import Encoder
from offload.coding.lossless_layout import Coded, num_bytes_of, prefix_of
from offload.coding.tensor_codec import TensorCodec

NAME = "layer.up_proj.weight"


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
