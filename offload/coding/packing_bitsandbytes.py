"""What bitsandbytes writes of four bits; its eight bits and its doubly packed scales are refused. nf4.py says how they lie."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch

from .config_fields import one_of
from .nf4 import TableDecoder
from .stored_parts import Beside, Shape, last_name, need, whole_groups
from .tensor_codec import TensorCodec

_BLOCKS = (64, 128, 256, 512, 1024, 2048, 4096)  # weights that may share a scale
_DOUBLE = "packs its scales, too (bnb_4bit_use_double_quant), which we do not read"


@dataclass(frozen=True, slots=True, kw_only=True)
class BitsAndBytesPacking:
    name: str

    def codec_of(self, parameter: str, shape: Shape, beside: Beside) -> TensorCodec | None:
        own = last_name(parameter)
        if own not in beside or beside[own].dtype != torch.uint8:
            return None
        scale, table = f"{own}.absmax", f"{own}.quant_map"
        if scale in beside and beside[scale].dtype == torch.uint8:
            raise ValueError(_DOUBLE)
        size = prod(shape)
        whole_groups(size, _BLOCKS[0], "weights")
        parts = [
            need(beside, own, [(size // 2, 1)], [torch.uint8]),
            need(beside, scale, [(size // block,) for block in _BLOCKS if size % block == 0], [torch.float32], is_scale=True),
            need(beside, table, [(16,)], [torch.float32], is_scale=True),
        ]
        # A hundred bytes of JSON that name the block and the shape, as the tensors do, too: stored with them, and not read.
        parts += [part for name, part in beside.items() if name.startswith(f"{own}.quant_state.")]
        decode = TableDecoder(packed=own, scale=scale, table=table)
        return TensorCodec(format=self.name, parts=tuple(parts), decode=decode)


def read_bitsandbytes(config: Mapping[str, object]) -> BitsAndBytesPacking:
    if config.get("load_in_8bit") or config.get("_load_in_8bit"):
        raise ValueError("has load_in_8bit, which we do not read")
    if config.get("bnb_4bit_use_double_quant"):
        raise ValueError(_DOUBLE)
    one_of(config, "bnb_4bit_quant_storage", ["uint8"], "uint8")
    return BitsAndBytesPacking(name=one_of(config, "bnb_4bit_quant_type", ["nf4", "fp4"]).upper())
