"""How one parameter is stored in fewer bytes than it computes with. Knows neither layers nor files."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One stored tensor of a parameter. In a checkpoint it has the parameter's name with `name` in place of what follows the
    last dot: of `mlp.up_proj.weight`, the part `weight_scale` is `mlp.up_proj.weight_scale`. `is_scale`: its values multiply
    weights, and must be finite."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_scale: bool = False


class Decoder(Protocol):
    """Writes all of `parameter`, contiguous and of any float dtype, from its `parts` by name. Values are computed exactly or in
    float32 and rounded once, so that every device makes the same bits of them.

    All tensors are on one device. It issues its work and waits for nothing: no `.item()`, no shape that depends on data. Beyond
    its arguments it takes WORKSPACE_BYTES of workspace.py at most, and keeps nothing. A module-level function, a partial of one
    is not equal to another: a frozen dataclass with `__call__` where it has settings, so that equal codecs are equal.
    """

    def __call__(self, parts: Mapping[str, torch.Tensor], parameter: torch.Tensor) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorCodec:
    """Of one parameter. `format` is what people call it: "FP8", "Q4_K", "GPTQ int4". `decode` is plain torch; `kernel`, where
    there is one, makes the same bits faster on a CUDA device. `kept` are parts that stay on the device whenever the others come
    and go, as those of a base do: decoders get them, too."""

    format: str
    parts: tuple[Part, ...]
    decode: Decoder
    kernel: Decoder | None = None
    kept: tuple[Part, ...] = ()


class Packing(Protocol):
    """How a checkpoint says that its tensors are stored."""

    @property
    def name(self) -> str:
        """What people call it, for every output that says exact."""

    def codec_of(self, parameter: str, shape: tuple[int, ...], beside: Mapping[str, Part]) -> TensorCodec | None:
        """Of the parameter of that name and shape; None where it is stored as it is. `beside` are the checkpoint's tensors that
        differ from it in what follows the last dot, by that; their `is_scale` says nothing. ValueError continues the sentence
        "tensor 'name' ..." and says what is wrong."""


def part_name(parameter: str, part: str) -> str:
    """The name in a checkpoint of a part of `parameter`."""
    return f"{parameter.rpartition('.')[0]}.{part}" if "." in parameter else part
