"""Decoders on a GPU make the bits of the CPU, by kernels and by plain torch, and the host does not wait for them."""

from collections.abc import Callable, Mapping

import pytest
import torch

from coding import encode, normal, random_blocks
from offload.coding.gguf_codec import gguf_codec
from offload.coding.gguf_types import BLOCKS
from offload.coding.packings import read_packing
from offload.coding.tensor_codec import Part, TensorCodec
from packed_models import FORMS

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
ROWS, COLUMNS = 384, 1280  # whole blocks of 128 and of 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Parts = Mapping[str, torch.Tensor]


def packed(form: str) -> tuple[TensorCodec, Parts]:
    parts, _ = FORMS[form].pack(ROWS, COLUMNS, torch.Generator().manual_seed(0))
    beside = {name: Part(name=name, shape=tuple(part.shape), dtype=part.dtype) for name, part in parts.items()}
    codec = read_packing(FORMS[form].quantization, "config.json").codec_of("layer.weight", (ROWS, COLUMNS), beside)
    assert codec is not None
    return codec, parts


def blocks(type_name: str) -> tuple[TensorCodec, Parts]:
    codec = gguf_codec("weight", type_name, (ROWS, COLUMNS), num_heads=3)
    assert codec is not None
    num_blocks = ROWS * COLUMNS // BLOCKS[type_name].num_weights
    return codec, {"weight": random_blocks(type_name, num_blocks, huge=False).view(ROWS, -1)}


def lossless(dtype: torch.dtype) -> tuple[TensorCodec, Parts]:
    code = encode(normal(ROWS * COLUMNS, dtype).view(ROWS, COLUMNS))
    return code.codec, code.parts


MADE: dict[str, Callable[[], tuple[TensorCodec, Parts]]] = {
    **{form: lambda form=form: packed(form) for form in FORMS},  # type: ignore[misc]
    **{name: lambda name=name: blocks(name) for name in BLOCKS if BLOCKS[name].num_weights > 1},  # type: ignore[misc]
    **{f"lossless {dtype}": lambda dtype=dtype: lossless(dtype) for dtype in DTYPES[:2]},  # type: ignore[misc]
}


@pytest.mark.parametrize("name", MADE)
def test_the_bits_are_those_of_the_cpu_and_nobody_waits(name: str) -> None:
    codec, parts = MADE[name]()
    stored = {part.name: parts[part.name] for part in codec.parts}
    on_gpu = {part: tensor.cuda() for part, tensor in stored.items()}
    for dtype in DTYPES:
        expected = torch.empty(ROWS, COLUMNS, dtype=dtype)
        codec.decode(stored, expected)
        for decode in (codec.decode, codec.kernel):
            if decode is None:
                continue
            found = torch.full((ROWS, COLUMNS), torch.nan, dtype=dtype, device="cuda")
            decode(on_gpu, found)  # compiles, and makes tables
            found.fill_(torch.nan)
            torch.cuda.set_sync_debug_mode("error")
            try:
                decode(on_gpu, found)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert torch.equal(found.cpu().view(torch.uint8), expected.view(torch.uint8))
