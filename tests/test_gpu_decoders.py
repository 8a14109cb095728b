"""Decoders on a GPU make the bits of the CPU, by kernels and by plain torch, and the host does not wait for them."""

import pytest
import torch

from every_codec import EVERY_CODEC, computed_shape

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
ROWS, COLUMNS = 384, 1280  # whole blocks of 128 and of 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("name", EVERY_CODEC)
def test_the_bits_are_those_of_the_cpu_and_nobody_waits(name: str) -> None:
    codec, stored = EVERY_CODEC[name](ROWS, COLUMNS)
    on_gpu = {part: tensor.cuda() for part, tensor in stored.items()}
    for dtype in DTYPES:
        expected = torch.empty(computed_shape(name, ROWS, COLUMNS), dtype=dtype)
        codec.decode(stored, expected)
        for decode in (codec.decode, codec.kernel):
            if decode is None:
                continue
            found = torch.full_like(expected, torch.nan, device="cuda")
            decode(on_gpu, found)  # compiles, and makes tables
            found.fill_(torch.nan)
            torch.cuda.set_sync_debug_mode("error")
            try:
                decode(on_gpu, found)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert torch.equal(found.cpu().view(torch.uint8), expected.view(torch.uint8))
