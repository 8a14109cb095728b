"""A base is what base_layout.py says, as near to its weights as its codes allow, and the same number on every device."""

import numba
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from allocations import working_bytes
from offload.coding import loops
from offload.coding.base import decode_base, decode_base_anywhere, decode_base_on_cpu
from offload.coding.base_kinds import BASE_KINDS, BaseKind
from offload.coding.base_layout import Base
from offload.coding.chunks import CPU_WORKSPACE_BYTES
from residual_coding import base_of, codes_by_bits, groups_of, normal_matrix

KINDS = list(BASE_KINDS.values())
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
GAIN = {"int8": 1.001, "int4": 0.97, "int3": 0.9}  # steps of eight bits are so small that nothing is worth cutting off
SHAPES = [(1, 1), (3, 7), (2, 64), (5, 65), (7, 129), (1, 1000), (33, 300)]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


def expected(base: Base, num_columns: int, kind: BaseKind) -> torch.Tensor:
    """[N, K] float64: exact."""
    codes = codes_by_bits(base.codes, num_columns, kind)
    values = torch.empty(codes.shape, dtype=torch.float64)
    for number, group in enumerate(groups_of(num_columns, kind)):
        steps = codes[:, group] - base.zero[:, number, None].long()
        values[:, group] = steps.double() * base.scale[:, number, None].double()
    return values


def is_sound(base: Base, kind: BaseKind) -> bool:
    return bool(base.scale.isfinite().all() and (base.scale >= 0).all() and (base.zero <= 2**kind.bits - 1).all())


@kinds
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_scales_and_zeros_mean_what_the_layout_says(shape: tuple[int, int], kind: BaseKind) -> None:
    base = base_of(normal_matrix(*shape), kind)
    values = expected(base, shape[1], kind)
    assert is_sound(base, kind)
    for dtype in FLOATS:
        for decode in (decode_base, decode_base_on_cpu, decode_base_anywhere):
            found = torch.full(shape, 7.0, dtype=dtype)
            decode(base, kind, found)
            assert torch.equal(found, values.to(torch.float32).to(dtype))


@kinds
def test_each_weight_has_the_nearest_code_of_its_group(kind: BaseKind) -> None:
    weights = normal_matrix(50, 300)
    base = base_of(weights, kind)
    found = expected(base, 300, kind)
    for number, group in enumerate(groups_of(300, kind)):
        steps = torch.arange(2**kind.bits) - base.zero[:, number, None].long()  # [N, codes]
        values = steps.double() * base.scale[:, number, None].double()
        nearest = (weights[:, group, None].double() - values[:, None, :]).abs().amin(-1)
        error = (weights[:, group].double() - found[:, group]).abs()
        assert (error <= nearest * (1 + 1e-5) + 1e-12).all()


@kinds
def test_a_search_for_the_range_is_better_than_none(kind: BaseKind) -> None:
    """By squared error, against rounding to the nearest in the range of all of a group's weights."""
    weights = normal_matrix(200, 4 * kind.group)
    groups = weights.double().view(200, 4, kind.group)
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**kind.bits - 1)).bfloat16().double()
    zero = (-low / scale).round()
    plain = ((groups / scale).round() + zero).clamp(0, 2**kind.bits - 1).sub(zero).mul(scale)
    base = base_of(weights, kind)
    error = (expected(base, weights.shape[1], kind) - weights.double()).square().sum()
    assert error < GAIN[kind.name] * (plain - groups).square().sum()


def test_more_bits_are_nearer() -> None:
    weights = normal_matrix(64, 512)
    errors = [
        (expected(base_of(weights, kind), 512, kind) - weights.double()).norm() / weights.double().norm()
        for kind in sorted(KINDS, key=lambda kind: kind.bits)
    ]
    assert errors == sorted(errors, reverse=True) and errors[0] < 0.25 and errors[-1] < 0.01


@kinds
def test_groups_of_zeros_are_zeros(kind: BaseKind) -> None:
    weights = normal_matrix(4, 3 * kind.group)
    weights[1] = 0
    weights[2, : kind.group] = -0.0
    base = base_of(weights, kind)
    found = expected(base, weights.shape[1], kind)
    assert is_sound(base, kind) and found[1].eq(0).all() and found[2, : kind.group].eq(0).all()


@kinds
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_leaves_its_group_its_scale(value: float, kind: BaseKind) -> None:
    weights = normal_matrix(3, kind.group)
    weights[:, 5] = 0
    sound = base_of(weights, kind)
    weights[:2, 5] = value
    found = base_of(weights, kind)
    assert torch.equal(found.scale, sound.scale) and torch.equal(found.zero, sound.zero)
    weights[0] = value
    assert is_sound(base_of(weights, kind), kind)


@kinds
@pytest.mark.parametrize("scale", [1e-40, 1e-37, 1e-20, 1e20, 3e36, 1e38])
def test_scales_at_the_ends_of_the_range_are_sound(scale: float, kind: BaseKind) -> None:
    weights = (normal_matrix(8, 200).float().clamp(-0.06, 0.06) * 50 * scale).bfloat16()
    base = base_of(weights, kind)
    assert is_sound(base, kind)
    if scale > 1e-37:
        error = (expected(base, 200, kind) - weights.double()).norm() / weights.double().norm()
        assert error < 0.25


@kinds
@pytest.mark.parametrize("dtype", FLOATS)
def test_other_dtypes_have_the_base_of_their_bfloat16_numbers(dtype: torch.dtype, kind: BaseKind) -> None:
    weights = normal_matrix(9, 300)
    expected_base, found = base_of(weights, kind), base_of(weights.to(dtype), kind)
    assert all(torch.equal(getattr(found, name), getattr(expected_base, name)) for name in ("codes", "scale", "zero"))


@kinds
def test_the_number_of_threads_changes_nothing(kind: BaseKind) -> None:
    weights = normal_matrix(1100, 1000)
    one, three = base_of(weights, kind, 1), base_of(weights, kind, 3)
    assert all(torch.equal(getattr(one, name), getattr(three, name)) for name in ("codes", "scale", "zero"))


@given(data=st.data(), kind=st.sampled_from(KINDS))
def test_any_matrix_has_a_sound_base_that_every_decoder_reads_alike(data: st.DataObject, kind: BaseKind) -> None:
    shape = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 200)))
    few = st.sampled_from(data.draw(st.lists(st.integers(-(2**15), 2**15 - 1), min_size=1, max_size=9)))
    bits = data.draw(hnp.arrays("int16", shape, elements=few | st.integers(-(2**15), 2**15 - 1), fill=few))
    base = base_of(torch.from_numpy(bits.copy()).view(torch.bfloat16), kind)
    assert is_sound(base, kind)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        one, other = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
        decode_base_on_cpu(base, kind, one)
        decode_base_anywhere(base, kind, other)
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def test_loops_run_where_they_cannot_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """As numba says it of a folder that nothing can be written to."""
    right = numba.njit

    def keeps_nothing(*arguments: object, cache: bool = False, **options: object) -> object:
        if cache:
            raise RuntimeError("cannot cache function 'loop': no locator available for file 'loops.py'")
        return right(*arguments, **options)

    monkeypatch.setattr(numba, "njit", keeps_nothing)
    assert loops.loop(lambda number: number + 1)(2) == 3


@kinds
def test_the_decoder_keeps_within_its_workspace(kind: BaseKind) -> None:
    base = base_of(normal_matrix(512, 1024), kind)
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        into = torch.empty(512, 1024, dtype=dtype)
        assert working_bytes(lambda into=into: decode_base_anywhere(base, kind, into)) <= CPU_WORKSPACE_BYTES  # type: ignore[misc]
    halves = torch.empty(512, 1024, dtype=torch.float16)  # into the others, the loop writes by itself
    assert working_bytes(lambda: decode_base_on_cpu(base, kind, halves)) <= CPU_WORKSPACE_BYTES
