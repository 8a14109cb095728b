"""Weights of four bits that are floats, E2M1, with a scale for each group along the input: MXFP4 and NVFP4.

E2M1 is sign, two bits of exponent, one of mantissa: 0 0.5 1 1.5 2 3 4 6. Two are in a byte, the first in its low half. MXFP4
has a power of two for each 32 weights. NVFP4 has an E4M3 number for each 16, and one float32 for all: a scale is the two
multiplied, or in compressed-tensors the first divided by the second, in float32.
Sources: OCP Microscaling Formats (MX) 1.0; compressed-tensors 0.20 (nvfp4_pack_quantized, mxfp4_pack_quantized); NVIDIA
ModelOpt (weight_scale, weight_scale_2); gpt-oss's checkpoints, whose experts lie transposed.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .chunks import row_chunks
from .lookup import look_up_pairs
from .scales import scale_values

Tensors = Mapping[str, torch.Tensor]
_WORKSPACE_PER_WEIGHT_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp4Groups:
    """Names of the parts, and how they are read. `whole` is the scale of all; `divides`: by which the others are divided.
    `group` is in weights. `transposed`: the parameter is [..., columns, rows] of what is stored."""

    packed: str
    scale: str
    group: int
    whole: str | None = None
    divides: bool = False
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Fp4Decoder:
    groups: Fp4Groups

    def __call__(self, parts: Tensors, parameter: torch.Tensor) -> None:
        groups = self.groups
        target = parameter.transpose(-1, -2) if groups.transposed else parameter
        num_rows, num_columns = target.shape[-2:]
        target = target.view(-1, num_rows, num_columns)  # [matrices, rows, columns]
        packed = parts[groups.packed].view(len(target), num_rows, num_columns // 2)
        scale = parts[groups.scale].view(len(target), num_rows, num_columns // groups.group)
        numbers = e2m1_values(parameter.device)
        row_bytes = num_columns * _WORKSPACE_PER_WEIGHT_BYTES
        for number, matrix in enumerate(target):
            for chunk in row_chunks(num_rows, row_bytes, device_type=parameter.device.type):
                values = look_up_pairs(packed[number, chunk], numbers)  # [rows, columns]
                factor = scale_values(scale[number, chunk])  # [rows, groups]
                if groups.whole is not None:
                    whole = parts[groups.whole].to(torch.float32)
                    factor = factor / whole if groups.divides else factor * whole
                values.unflatten(1, (-1, groups.group)).mul_(factor.unsqueeze(-1))
                matrix[chunk] = values


@dataclass(frozen=True, slots=True)
class Fp4Kernel:
    groups: Fp4Groups

    def __call__(self, parts: Tensors, parameter: torch.Tensor) -> None:
        from .packed_kernels import decode_fp4  # triton, which need not be installed

        decode_fp4(self.groups, parts, parameter)


def e2m1_values(device: torch.device) -> torch.Tensor:
    """Of the sixteen codes, in float32."""
    codes = torch.arange(16, dtype=torch.int16, device=device)
    # The three bits as a float16's lowest bits of exponent and highest of mantissa, whose exponent is then 14 too small.
    bits = ((codes & 8) << 12) | ((codes & 7) << 9)
    return bits.view(torch.float16).to(torch.float32) * 2.0**14
