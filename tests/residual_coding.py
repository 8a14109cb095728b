"""Matrices as tests ask for them: apart into a base and what it lacks, as residual_layout.py has it."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from coding import NAME
from offload.coding.base_kinds import BaseKind
from offload.coding.base_layout import Base, base_parts, base_prefix
from offload.coding.lossless_layout import num_bytes_of, prefix_of
from offload.coding.residual import residual_codec
from offload.coding.residual_encode import ResidualEncoder
from offload.coding.residual_layout import Remainder
from offload.coding.residual_survey import ResidualSurvey
from offload.coding.tensor_codec import Part, TensorCodec


@dataclass(frozen=True, slots=True)
class ResidualTensor:
    kind: BaseKind
    survey: ResidualSurvey
    codec: TensorCodec
    parts: dict[str, torch.Tensor]

    @property
    def base(self) -> Base:
        return Base.of(self.parts, base_prefix(NAME))

    @property
    def remainder(self) -> Remainder:
        return Remainder.of(self.parts, prefix_of(NAME))

    @property
    def streamed_bytes(self) -> int:
        return num_bytes_of(self.codec.parts)


def take_apart(tensor: torch.Tensor, kind: BaseKind, num_threads: int = 2) -> ResidualTensor:
    with ResidualEncoder(kind, num_threads) as encoder:
        survey = encoder.survey(tensor)
        assert survey is not None
        codec = codec_for(tensor, kind, survey)
        code = ResidualTensor(kind, survey, codec, room_for((*codec.parts, *codec.kept)))
        encoder.encode(tensor, survey, code.base, code.remainder)
    return code


def codec_for(tensor: torch.Tensor, kind: BaseKind, survey: ResidualSurvey) -> TensorCodec:
    return residual_codec(
        NAME,
        tuple(tensor.shape),
        kind,
        num_words=survey.num_words,
        num_exceptions=survey.num_exceptions,
        dtype=tensor.dtype,
        is_half=survey.is_half,
    )


def room_for(parts: tuple[Part, ...]) -> dict[str, torch.Tensor]:
    return {part.name: torch.full(part.shape, 77).to(part.dtype) for part in parts}  # nothing relies on zeros


def base_of(tensor: torch.Tensor, kind: BaseKind, num_threads: int = 2) -> Base:
    with ResidualEncoder(kind, num_threads) as encoder:
        base = Base.of(room_for(base_parts(NAME, tuple(tensor.shape), kind)), base_prefix(NAME))
        encoder.encode_base(tensor, encoder.fit(tensor), base)
    return base


def codes_by_bits(packed: torch.Tensor, num_columns: int, kind: BaseKind) -> torch.Tensor:
    """[N, K] int64, as base_layout.py says: bit by bit."""
    bits = (packed[..., None].long() >> torch.arange(8)) & 1  # [N, bytes, 8]
    of_code = bits.flatten(1)[:, : num_columns * kind.bits].unflatten(1, (num_columns, kind.bits))
    codes: torch.Tensor = (of_code << torch.arange(kind.bits)).sum(-1)
    return codes


def groups_of(num_columns: int, kind: BaseKind) -> Iterator[slice]:
    for start in range(0, num_columns, kind.group):
        yield slice(start, min(start + kind.group, num_columns))


def normal_matrix(num_rows: int, num_columns: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    """Of N(0, 0.02) in bfloat16, cast to `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(num_rows, num_columns, generator=generator) * 0.02).bfloat16().to(dtype)
