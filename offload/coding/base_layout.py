"""The base of a parameter: a low-bit copy that stays on the device, drafts, and knows the first bits of every weight.

Of a matrix `weight` of N rows and K columns, in integers of b bits and groups of g columns, G = ceil(K / g) in a row:

    weight_base_codes  [N, ceil(K b / 8)] uint8   code q of column j in bits [j b, j b + b) of its row, from the low ones up
    weight_base_scale  [N, G] bfloat16            s, finite and not below 0
    weight_base_zero   [N, G] uint8               z, within 0 and 2**b - 1

A weight is taken for k s with k = q - z, an integer of b + 1 bits with its sign times a number of 8 significant bits: exact in
float32, and rounded once to the dtype that computes, so it is the same number on every device.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch

from .base_kinds import BaseKind
from .tensor_codec import Part

SCALE_DTYPE = torch.bfloat16


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The tensors of one parameter, see above."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor

    @classmethod
    def of(cls, parts: Mapping[str, torch.Tensor], prefix: str) -> "Base":
        return cls(**{field.name: parts[prefix + field.name] for field in fields(cls)})


def base_prefix(parameter: str) -> str:
    """What the names of its parts begin with: `weight_base_` of `mlp.up_proj.weight`."""
    return parameter.rpartition(".")[2] + "_base_"


def base_parts(parameter: str, shape: tuple[int, ...], kind: BaseKind) -> tuple[Part, ...]:
    """Of a matrix of that shape."""
    num_rows, num_columns = shape
    num_groups = -(-num_columns // kind.group)
    prefix = base_prefix(parameter)
    return (
        Part(name=f"{prefix}codes", shape=(num_rows, -(-num_columns * kind.bits // 8)), dtype=torch.uint8),
        Part(name=f"{prefix}scale", shape=(num_rows, num_groups), dtype=SCALE_DTYPE, is_scale=True),
        Part(name=f"{prefix}zero", shape=(num_rows, num_groups), dtype=torch.uint8),
    )
