"""Weights of four bits that number the entries of a table: what bitsandbytes calls nf4 and fp4.

A weight is its entry times the scale of its block, blocks being runs of the parameter in the order of its memory. Two are in a
byte, the first in its high half. The table is stored with the parameter.
Source: bitsandbytes (functional.py, QuantState; kDequantizeBlockwise); Dettmers et al., QLoRA, 2023, for nf4's table.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .chunks import row_chunks
from .lookup import look_up_pairs

Tensors = Mapping[str, torch.Tensor]
_WORKSPACE_PER_WEIGHT_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class TableDecoder:
    """Names of the parts."""

    packed: str
    scale: str
    table: str

    def __call__(self, parts: Tensors, parameter: torch.Tensor) -> None:
        scale, table = parts[self.scale], parts[self.table]
        blocks = parameter.view(scale.numel(), -1)  # [blocks, weights]
        packed = parts[self.packed].view(scale.numel(), -1)
        row_bytes = blocks.shape[1] * _WORKSPACE_PER_WEIGHT_BYTES
        for chunk in row_chunks(len(blocks), row_bytes, device_type=parameter.device.type):
            values = look_up_pairs(packed[chunk], table, high_first=True)  # [blocks, weights]
            blocks[chunk] = values.mul_(scale[chunk, None])
