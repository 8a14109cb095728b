"""Kernels round as torch does."""

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from offload.coding.kernel_rounding import rounded  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COUNT = 2**16


@triton.jit
def _round_all(source, target, COUNT: tl.constexpr):
    index = tl.arange(0, COUNT)
    tl.store(target + index, rounded(tl.load(source + index), target.dtype.element_ty))


@pytest.mark.filterwarnings("ignore:.*encountered in cast:RuntimeWarning")  # infinities, in the interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rounding_is_torchs_for_numbers_of_any_size_and_for_ties(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    any_bits = torch.randint(-(2**31), 2**31, (COUNT // 2,), generator=generator).to(torch.int32).view(torch.float32)
    halves = torch.randint(0, 2**16, (COUNT // 2,), generator=generator).to(torch.int32) << 16 | 0x8000  # ties in bfloat16
    values = torch.cat([any_bits, halves.view(torch.float32)]).to(DEVICE)
    found = torch.empty(COUNT, dtype=dtype, device=DEVICE)
    _round_all[(1,)](values, found, COUNT=COUNT)
    expected = values.to(dtype)
    assert torch.equal(found.isnan(), expected.isnan()) and values.isnan().any()
    assert torch.equal(found.nan_to_num(0.0), expected.nan_to_num(0.0))
