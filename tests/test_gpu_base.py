"""The draft that a base is, on a GPU: products that agree with their twin, for which the host does not wait and which can be
recorded, levels that take as long as reading the base does, and a remainder that is decoded faster than it arrives."""

import pytest
import torch

from bases import any_base
from bench_base import copy_rate, layer_of, shapes_of
from bench_formats import seconds_of
from offload.coding.base_kinds import BASE_KINDS, BaseKind
from offload.coding.base_layout import Base
from offload.coding.base_product import base_product
from offload.device.cuda import CudaDevice
from residual_coding import take_apart

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
# Rows, outputs, columns, dtype: each is compiled for itself, which takes seconds
CASES = [
    (1, 1000, 1280, torch.bfloat16),
    (17, 3, 7, torch.float16),
    (64, 999, 704, torch.bfloat16),
    (256, 1024, 8192, torch.bfloat16),
    (300, 65, 129, torch.float32),
]
LINK_BYTES_PER_S = 55e9  # of the fastest that cards have: what arrives, a decoder must take in faster
# Of the rate at which memory is copied, that of reading a base at so many rows. Kernels of a day's work reach half of it; far
# below, something is wrong with them.
LEAST_OF_COPY = {1: 0.3, 16: 0.3, 64: 0.2, 256: 0.1}


def on_gpu(base: Base) -> Base:
    return Base(codes=base.codes.cuda(), scale=base.scale.cuda(), zero=base.zero.cuda())


@pytest.mark.parametrize("kind", BASE_KINDS.values(), ids=lambda kind: kind.name)
def test_products_are_those_of_the_twin_and_nobody_waits(kind: BaseKind) -> None:
    for num_rows, num_outputs, num_columns, dtype in CASES:
        base = on_gpu(any_base(num_outputs, num_columns, kind))
        x = torch.randn(num_rows, num_columns, device="cuda").to(dtype)
        twin = base_product(x.double(), base, kind, kernels=False)
        base_product(x, base, kind, kernels=True)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            found, again = (base_product(x, base, kind, kernels=True) for _ in range(2))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(found, again)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(found.double(), twin, rtol=2 * eps, atol=4 * eps * float(twin.abs().max()))


def test_products_can_be_recorded() -> None:
    """Whatever the widths of the levels: those of programs are compiled, and partial sums find their memory, beforehand."""
    device, kind = CudaDevice(), BASE_KINDS["int4"]
    base = on_gpu(any_base(512, 4096, kind))
    for num_rows in (1, 16, 64, 256):
        x = torch.randn(num_rows, 4096, device="cuda", dtype=torch.bfloat16)
        product = torch.empty(num_rows, 512, device="cuda", dtype=torch.bfloat16)

        def work(x: torch.Tensor = x, product: torch.Tensor = product) -> None:
            product.copy_(base_product(x, base, kind, kernels=True))

        replay = device.record(work)
        for _ in range(2):
            x.normal_()
            product.zero_()
            replay()
            torch.testing.assert_close(product, base_product(x, base, kind, kernels=True), rtol=0, atol=0)
    device.close()


@pytest.mark.parametrize("kind", BASE_KINDS.values(), ids=lambda kind: kind.name)
def test_a_level_takes_as_long_as_reading_its_base_does(kind: BaseKind) -> None:
    """Layers of 70B's sizes; two, or caches would hold them. tests/bench_base.py has the figures."""
    device = torch.device("cuda")
    shapes = shapes_of(8192, 28672, 1024)
    layers = [layer_of(shapes, kind, device) for _ in range(2)]
    num_bytes = sum(tensor.nbytes for layer in layers for base in layer for tensor in (base.codes, base.scale, base.zero))
    copied = copy_rate(device, 2**30, 0.1)
    shares = {}
    for num_rows in LEAST_OF_COPY:
        inputs = {columns: torch.randn(num_rows, columns, device=device, dtype=torch.bfloat16) for _, columns in shapes}

        def level(inputs: dict[int, torch.Tensor] = inputs) -> None:
            for layer in layers:
                for base, (_, columns) in zip(layer, shapes, strict=True):
                    base_product(inputs[columns], base, kind, kernels=True)

        shares[num_rows] = num_bytes / seconds_of(level, device, 0.1) / copied
    print({rows: f"{share:.2f} of {copied / 1e9:.0f} GB/s" for rows, share in shares.items()})
    assert all(shares[rows] > least for rows, least in LEAST_OF_COPY.items()), shares


@pytest.mark.parametrize("kind", BASE_KINDS.values(), ids=lambda kind: kind.name)
def test_a_remainder_is_decoded_faster_than_it_arrives(kind: BaseKind) -> None:
    """To the bits of the weights, and at an input rate above that of a link: the next matrix arrives meanwhile."""
    weight = (torch.randn(4096, 8192, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    apart = take_apart(weight, kind, num_threads=8)
    parts = {name: tensor.cuda() for name, tensor in apart.parts.items()}
    found, kernel = torch.empty_like(weight, device="cuda"), apart.codec.kernel
    assert kernel is not None
    kernel(parts, found)
    assert torch.equal(found.cpu().view(torch.int16), weight.view(torch.int16))
    device = torch.device("cuda")
    rate = apart.streamed_bytes / seconds_of(lambda: kernel(parts, found), device, 0.2)
    host = torch.empty(2**28, dtype=torch.uint8).pin_memory()
    arrived = torch.empty_like(host, device="cuda")
    link = host.numel() / seconds_of(lambda: arrived.copy_(host, non_blocking=True), device, 0.2)
    print(f"remainder of {kind.name}: {rate / 1e9:.0f} GB/s decoded, {link / 1e9:.1f} GB/s arrive")
    assert rate > min(link, LINK_BYTES_PER_S)
