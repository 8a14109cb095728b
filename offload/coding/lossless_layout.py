"""16-bit weights in 11.3 bits each, exactly: the exponents of a tensor are few, so each is a number of three bits.

A weight is a sign, an exponent of 8 bits and a mantissa of 7: bfloat16. A float16 tensor that was cast from bfloat16, as many
are, is coded as the bfloat16 numbers it came from. Of a parameter `weight` of N numbers in K = ceil(N / 2048) blocks:

    weight_bytes       [N] uint8             sign and mantissa: s mmmmmmm
    weight_codes       [3, ceil(N/8)] uint8  three bits each: how far the exponent lies above the base, if that is below 7;
                                             7 says that it is the next of the escapes
    weight_base        [1] uint8             the least exponent that has a code
    weight_escapes     [E + 1] uint8         exponents without a code, in the order of their weights, and a byte that none has
    weight_offsets     [K] int32             how many escapes lie in front of the block
    weight_positions   [X] int32             where the numbers above are not the tensor's, ascending
    weight_exceptions  [X] its dtype         and what is there

Bit j of byte k in row r of the codes is bit r of the code of weight 8 k + j; what is left over is 0.

That exponents of trained weights carry 2.6 bits of information is measured by DFloat11 (arXiv 2504.11651) and others, whose
codes have variable lengths. A code of one width gives half a bit away, and is decoded by shifts and one prefix sum.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Final

import torch

from .tensor_codec import Part

BLOCK: Final = 2048  # weights
CODE_BITS: Final = 3
NUM_CODES: Final = 7  # exponents that have one
ESCAPE: Final = 7
MAX_WEIGHTS: Final = 2**31 - BLOCK  # whole blocks of them are counted in int32


@dataclass(frozen=True, slots=True, kw_only=True)
class Coded:
    """The tensors that are stored of one parameter, see above."""

    bytes: torch.Tensor
    codes: torch.Tensor
    base: torch.Tensor
    escapes: torch.Tensor
    offsets: torch.Tensor
    positions: torch.Tensor
    exceptions: torch.Tensor

    @classmethod
    def of(cls, parts: Mapping[str, torch.Tensor], prefix: str) -> "Coded":
        return cls(**{field.name: parts[prefix + field.name] for field in fields(cls)})

    @property
    def num_blocks(self) -> int:
        return self.offsets.shape[0]


def prefix_of(parameter: str) -> str:
    """What the names of its parts begin with: `weight_` of `mlp.up_proj.weight`."""
    return parameter.rpartition(".")[2] + "_"


def parts_of(parameter: str, num_weights: int, num_escapes: int, num_exceptions: int, dtype: torch.dtype) -> tuple[Part, ...]:
    num_blocks = -(-num_weights // BLOCK)
    tensors = {
        "bytes": ((num_weights,), torch.uint8),
        "codes": ((CODE_BITS, -(-num_weights // 8)), torch.uint8),
        "base": ((1,), torch.uint8),
        "escapes": ((num_escapes + 1,), torch.uint8),
        "offsets": ((num_blocks,), torch.int32),
        "positions": ((num_exceptions,), torch.int32),
        "exceptions": ((num_exceptions,), dtype),
    }
    prefix = prefix_of(parameter)
    return tuple(Part(name=prefix + name, shape=shape, dtype=kind) for name, (shape, kind) in tensors.items())


def num_bytes_of(parts: tuple[Part, ...]) -> int:
    return sum(math.prod(part.shape) * part.dtype.itemsize for part in parts)
