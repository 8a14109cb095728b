"""The draft that a base is, on a GPU: products that agree with their twin, for which the host does not wait and which can be
recorded, levels that take as long as reading the base does, and a remainder that is decoded faster than it arrives."""

import pytest
import torch

from bases import any_base
from bench_base import copy_rate, layer_of, shapes_of
from bench_formats import seconds_of
from offload.coding.base_kinds import BASE_KINDS
from offload.coding.base_layout import Base
from offload.coding.base_product import base_product
from offload.device.cuda import CudaDevice

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = [(1, 1000, 1280), (16, 64, 64), (17, 3, 7), (64, 999, 704), (256, 1024, 8192), (300, 65, 129)]
# Of the rate at which memory is copied, that of reading a base at so many rows. Kernels of a day's work reach half of it; far
# below, something is wrong with them.
LEAST_OF_COPY = {1: 0.3, 16: 0.3, 64: 0.2, 256: 0.1}


def on_gpu(base: Base) -> Base:
    return Base(codes=base.codes.cuda(), scale=base.scale.cuda(), zero=base.zero.cuda())


@pytest.mark.parametrize("kind", BASE_KINDS.values(), ids=lambda kind: kind.name)
def test_products_are_those_of_the_twin_and_nobody_waits(kind) -> None:
    for num_rows, num_outputs, num_columns in SIZES:
        base = on_gpu(any_base(num_outputs, num_columns, kind))
        for dtype in DTYPES:
            x = torch.randn(num_rows, num_columns, device="cuda").to(dtype)
            twin = base_product(x.double(), base, kind, kernels=False)
            base_product(x, base, kind, kernels=True)  # compiles
            torch.cuda.set_sync_debug_mode("error")
            try:
                found = base_product(x, base, kind, kernels=True)
                again = base_product(x, base, kind, kernels=True)
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
def test_a_level_takes_as_long_as_reading_its_base_does(kind, record_property) -> None:
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
        record_property(f"of copy, {num_rows} rows", shares[num_rows])
    print({rows: f"{share:.2f} of {copied / 1e9:.0f} GB/s" for rows, share in shares.items()})
    assert all(shares[rows] > least for rows, least in LEAST_OF_COPY.items()), shares
