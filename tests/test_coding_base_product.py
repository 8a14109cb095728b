"""Products with a base are those with the matrix that it stands for, by pieces and by the kernel."""

import pytest
import torch

from bases import any_base, matrix_of, nearest_base
from offload.coding.base_kinds import BASE_KINDS, BaseKind
from offload.coding.base_product import base_product
from offload.coding.kernels import has_kernels

KINDS = [*BASE_KINDS.values(), BaseKind(bits=4, group=32)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rows, outputs, columns: one row, widths that fill no program, columns that end a group and a byte early, many parts
SIZES = [(1, 70, 200), (16, 64, 64), (17, 3, 7), (33, 65, 129), (5, 9, 1100), (130, 20, 333)]
needs_triton = pytest.mark.skipif(not has_kernels(), reason="no triton")


def error_of(product: torch.Tensor, x: torch.Tensor, matrix: torch.Tensor) -> float:
    """The largest, as a share of the sum of what was added, all taken as positive."""
    exact, sizes = x.double() @ matrix.T, x.double().abs() @ matrix.abs().T
    return float(((product.double() - exact).abs() / sizes).max())


@pytest.mark.matrix
@pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=needs_triton)], ids=["pieces", "kernel"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.name}-{kind.group}")
def test_products_are_those_of_the_matrix(kind: BaseKind, kernels: bool) -> None:
    for number, (num_rows, num_outputs, num_columns) in enumerate(SIZES):
        base = any_base(num_outputs, num_columns, kind, seed=number)
        matrix = matrix_of(base, num_columns, kind)
        for dtype in {torch.float32, DTYPES[number % len(DTYPES)]}:
            x = torch.randn(num_rows, num_columns, generator=torch.Generator().manual_seed(number)).to(dtype)
            product = base_product(x, base, kind, kernels=kernels)
            assert product.dtype == dtype and product.shape == (num_rows, num_outputs)
            # A matrix is rounded once to the dtype, sums once more.
            assert error_of(product, x, matrix) < max(2 * torch.finfo(dtype).eps, 1e-6), (
                num_rows,
                num_outputs,
                num_columns,
                dtype,
            )


@needs_triton
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.name}-{kind.group}")
def test_the_kernel_agrees_with_its_twin(kind: BaseKind) -> None:
    for num_rows, num_outputs, num_columns in SIZES[::2]:
        base = any_base(num_outputs, num_columns, kind)
        x = torch.randn(num_rows, num_columns)
        found, twin = (base_product(x, base, kind, kernels=kernels) for kernels in (True, False))
        torch.testing.assert_close(found, twin, rtol=1e-5, atol=1e-5 * float(twin.abs().max()))


@needs_triton
def test_the_kernel_gives_the_same_numbers_every_time() -> None:
    """Parts of the columns are added in their order."""
    kind = BASE_KINDS["int4"]
    base, x = any_base(8, 1024, kind), torch.randn(3, 1024)
    first, again = (base_product(x, base, kind, kernels=True) for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("kind", BASE_KINDS.values(), ids=lambda kind: kind.name)
def test_products_are_near_those_of_what_was_quantised(kind: BaseKind) -> None:
    """Leading dimensions stay, and a copy of more bits is a better one."""
    weight = torch.randn(40, 300, generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, 3, 300, generator=torch.Generator().manual_seed(2))
    product = base_product(x, nearest_base(weight, kind), kind, kernels=False)
    assert product.shape == (2, 3, 40)
    error = float((product - x @ weight.T).norm() / (x @ weight.T).norm())
    assert error < {8: 0.015, 4: 0.15, 3: 0.3}[kind.bits]


def test_rows_that_are_views_and_devices_without_memory_are_taken(kind: BaseKind = BASE_KINDS["int4"]) -> None:
    base = any_base(10, 64, kind)
    x = torch.randn(64, 6).T
    torch.testing.assert_close(base_product(x, base, kind, kernels=False), x @ matrix_of(base, 64, kind).float().T)
    on_meta = base_product(torch.empty(1, 5, 64, device="meta"), base, kind, kernels=False)
    assert on_meta.shape == (1, 5, 10) and on_meta.device.type == "meta"
