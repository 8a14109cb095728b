"""The packing of a folder that `convert` made: 16-bit matrices as a base and what it lacks of them, see residual_layout.py."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from .base_kinds import BASE_KINDS, BaseKind
from .config_fields import RESIDUAL_NAME, count, one_of
from .lossless_layout import prefix_of
from .residual import FORMATS, residual_codec
from .residual_layout import HALF, MAX_WEIGHTS
from .stored_parts import check_coded
from .tensor_codec import Part, TensorCodec

VERSION: Final = 1


def read_residual(quantization: Mapping[str, object]) -> "ResidualPacking":
    """ValueError continues the sentence "the config ..."."""
    if (version := quantization.get("version")) != VERSION:
        raise ValueError(f"has version {str(version)[:20]} of the code, and we read {VERSION}")
    kinds = {kind.bits: kind for kind in BASE_KINDS.values()}
    kind = kinds[one_of(quantization, "bits", tuple(kinds))]
    if (group := count(quantization, "group_size")) != kind.group:
        raise ValueError(f"has a group_size of {group}, and those of {kind.bits} bits are of {kind.group}")
    return ResidualPacking(kind)


@dataclass(frozen=True, slots=True)
class ResidualPacking:
    """A Packing. What is coded has its parts beside it; the files say no more than that."""

    kind: BaseKind

    @property
    def name(self) -> str:
        return f"{RESIDUAL_NAME} of {self.kind.name}"

    def codec_of(self, parameter: str, shape: tuple[int, ...], beside: Mapping[str, Part]) -> TensorCodec | None:
        prefix = prefix_of(parameter)
        parts = {name.removeprefix(prefix): part for name, part in beside.items() if name.startswith(prefix)}
        if not parts.keys() & {"remainder", HALF}:
            return None
        num_weights = math.prod(shape)
        if len(shape) != 2 or not 0 < num_weights <= MAX_WEIGHTS:
            raise ValueError(f"is of shape {list(shape)}, and is coded")
        if parts.keys() >= {"remainder", HALF}:
            raise ValueError(f"is coded, and has both a {prefix}remainder and a {prefix}{HALF}")
        dtype = parts["exceptions"].dtype if "exceptions" in parts else torch.bfloat16
        is_half = HALF in parts
        if dtype not in FORMATS or (is_half and dtype != torch.float16):
            raise ValueError(f"is coded as {dtype}, which has no such code")
        num_words, num_exceptions = (
            math.prod(parts[name].shape) if name in parts else 0 for name in (HALF if is_half else "remainder", "positions")
        )
        codec = residual_codec(
            parameter,
            shape,
            self.kind,
            num_words=max(num_words - 1, 0),
            num_exceptions=num_exceptions,
            dtype=dtype,
            is_half=is_half,
        )
        check_coded((*codec.parts, *codec.kept), beside)
        return codec
