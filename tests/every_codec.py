"""A codec and stored tensors of every format, in the names that people give them."""

from collections.abc import Callable, Mapping
from functools import partial

import torch

from coding import encode, normal, random_blocks
from offload.coding.base_kinds import BASE_KINDS
from offload.coding.gguf_codec import gguf_codec
from offload.coding.gguf_types import BLOCKS
from offload.coding.packings import read_packing
from offload.coding.tensor_codec import Part, TensorCodec
from packed_models import FORMS, in_bytes, powers, random_codes
from residual_coding import normal_matrix, take_apart

Parts = Mapping[str, torch.Tensor]
# Of a parameter of (rows, columns), which whole blocks make up: 48 divides the rows, 256 the columns.
Make = Callable[[int, int], tuple[TensorCodec, Parts]]


def packed(form: str, rows: int, columns: int) -> tuple[TensorCodec, Parts]:
    parts, _ = FORMS[form].pack(rows, columns, torch.Generator().manual_seed(0))
    return _read(FORMS[form].quantization, "layer.weight", (rows, columns), parts)


def experts(rows: int, columns: int) -> tuple[TensorCodec, Parts]:
    """Of gpt-oss: four, of a fourth of the rows each, which lie across."""
    generator = torch.Generator().manual_seed(0)
    shape = (4, rows // 4, columns // 32)  # [experts, rows, groups]
    parts = {
        "up_proj_blocks": in_bytes(random_codes((*shape, 32), 16, generator)),
        "up_proj_scales": powers(shape, generator),
    }
    return _read({"quant_method": "mxfp4"}, "experts.up_proj", (4, columns, rows // 4), parts)


def blocks(type_name: str, rows: int, columns: int) -> tuple[TensorCodec, Parts]:
    codec = gguf_codec("weight", type_name, (rows, columns), num_heads=3)
    assert codec is not None
    num_blocks = rows * columns // BLOCKS[type_name].num_weights
    return codec, {"weight": random_blocks(type_name, num_blocks, huge=False).view(rows, -1)}


def lossless(dtype: torch.dtype, rows: int, columns: int) -> tuple[TensorCodec, Parts]:
    code = encode(normal(rows * columns, dtype).view(rows, columns))
    return code.codec, code.parts


def residual(kind: str, dtype: torch.dtype, rows: int, columns: int) -> tuple[TensorCodec, Parts]:
    """The float16 numbers are none of bfloat16."""
    tensor = normal_matrix(rows, columns).float() + 1e-5
    code = take_apart(tensor.to(dtype), BASE_KINDS[kind])
    return code.codec, code.parts


def _read(
    quantization: Mapping[str, object], parameter: str, shape: tuple[int, ...], parts: Parts
) -> tuple[TensorCodec, Parts]:
    beside = {name: Part(name=name, shape=tuple(part.shape), dtype=part.dtype) for name, part in parts.items()}
    codec = read_packing(quantization, "config.json").codec_of(parameter, shape, beside)
    assert codec is not None
    return codec, {part.name: parts[part.name] for part in codec.parts}


EVERY_CODEC: Mapping[str, Make] = {
    **{form: partial(packed, form) for form in FORMS},
    "mxfp4": experts,
    **{f"GGUF {name}": partial(blocks, name) for name in BLOCKS if BLOCKS[name].num_weights > 1},
    "lossless bfloat16": partial(lossless, torch.bfloat16),
    "lossless float16": partial(lossless, torch.float16),
    **{f"residual bfloat16 beside {kind}": partial(residual, kind, torch.bfloat16) for kind in BASE_KINDS},
    **{f"residual float16 beside {kind}": partial(residual, kind, torch.float16) for kind in BASE_KINDS},
}


def computed_shape(name: str, rows: int, columns: int) -> tuple[int, ...]:
    return (4, columns, rows // 4) if name == "mxfp4" else (rows, columns)
