"""The packing of a folder that `convert` made: 16-bit weights in the code of lossless_layout.py, other tensors as they are."""

import math
from collections.abc import Mapping
from typing import Final

import torch

from .config_fields import LOSSLESS_NAME
from .lossless import FORMATS, lossless_codec
from .lossless_layout import MAX_WEIGHTS, prefix_of
from .stored_parts import check_coded
from .tensor_codec import Part, TensorCodec

VERSION: Final = 1


def read_lossless(quantization: Mapping[str, object]) -> "LosslessPacking":
    """ValueError continues the sentence "the config ..."."""
    if (version := quantization.get("version")) != VERSION:
        raise ValueError(f"has version {str(version)[:20]} of the code, and we read {VERSION}")
    return LosslessPacking()


class LosslessPacking:
    """A Packing. What is coded has its parts beside it; the files say no more than that."""

    name = LOSSLESS_NAME

    def codec_of(self, parameter: str, shape: tuple[int, ...], beside: Mapping[str, Part]) -> TensorCodec | None:
        prefix = prefix_of(parameter)
        parts = {name.removeprefix(prefix): part for name, part in beside.items() if name.startswith(prefix)}
        if "codes" not in parts:
            return None
        num_weights = math.prod(shape)
        if not 0 < num_weights <= MAX_WEIGHTS:
            raise ValueError(f"has {num_weights} weights, and is coded")
        dtype = parts["exceptions"].dtype if "exceptions" in parts else torch.bfloat16
        if dtype not in FORMATS:
            raise ValueError(f"is coded as {dtype}, which has no such code")
        num_escapes, num_exceptions = (
            math.prod(parts[name].shape) if name in parts else 0 for name in ("escapes", "exceptions")
        )
        codec = lossless_codec(parameter, shape, max(num_escapes - 1, 0), num_exceptions, dtype)
        check_coded(codec.parts, beside)
        return codec
