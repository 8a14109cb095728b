"""16-bit matrices survive being taken apart into a base and what it lacks: every bit pattern, any shape, by every decoder."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import load_file

from allocations import working_bytes
from coding import NAME, same_bits
from offload.coding import number_loops
from offload.coding.base_kinds import BASE_KINDS, BaseKind
from offload.coding.chunks import CPU_WORKSPACE_BYTES
from offload.coding.lossless_numpy import cast_halves
from offload.coding.residual import decode_anywhere, residual_pays
from offload.coding.residual_cpu import RUN, decode_on_cpu
from offload.coding.residual_encode import ResidualEncoder
from offload.coding.residual_layout import BLOCK, MAX_WIDTH
from offload.demo import TARGET
from residual_coding import ResidualTensor, base_of, normal_matrix, take_apart

# Infinities that other infinities are made of, in Triton's interpreter
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in (cast|multiply):RuntimeWarning")
KINDS = list(BASE_KINDS.values())
HALVES = (torch.bfloat16, torch.float16)
ALL_BITS = torch.arange(-(2**15), 2**15).to(torch.int16)
DECODERS = (decode_on_cpu, decode_anywhere)
SHARES = {"int8": 0.25, "int4": 0.48, "int3": 0.54}  # of 16 bits, that a matrix of trained weights is streamed in
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
halves = pytest.mark.parametrize("dtype", HALVES, ids=str)


def decoded(code: ResidualTensor, decode: Callable[..., None], like: torch.Tensor) -> torch.Tensor:
    found = torch.full_like(like, 7.0)
    decode(code.remainder, code.base, code.kind, found)
    return found


def assert_survives(tensor: torch.Tensor, kind: BaseKind) -> ResidualTensor:
    code = take_apart(tensor, kind)
    for decode in DECODERS:
        assert same_bits(decoded(code, decode, tensor), tensor)
    return code


def demo_layers() -> list[torch.Tensor]:
    tensors = {name: tensor for path in sorted(TARGET.glob("*.safetensors")) for name, tensor in load_file(path).items()}
    return [tensor for name, tensor in tensors.items() if ".layers." in name and tensor.dim() == 2]


@pytest.mark.matrix
@kinds
@halves
def test_layers_of_the_bundled_target_survive_and_take_half_of_their_bytes(dtype: torch.dtype, kind: BaseKind) -> None:
    layers = [tensor.bfloat16().to(dtype) for tensor in demo_layers()]
    streamed = sum(assert_survives(layer, kind).streamed_bytes for layer in layers)
    assert layers and streamed <= SHARES[kind.name] * sum(2 * layer.numel() for layer in layers)


@kinds
def test_true_float16_is_coded_with_its_mantissas(kind: BaseKind) -> None:
    tensor = (torch.randn(100, 500, generator=torch.Generator().manual_seed(0)) * 0.02).half()
    code = assert_survives(tensor, kind)
    assert code.survey.is_half and residual_pays(code.codec, (100, 500))
    assert "weight_remainder_half" in code.parts and not take_apart(tensor.bfloat16().half(), kind).survey.is_half


@kinds
@pytest.mark.parametrize("share", [0.02, 0.04, 0.09, 0.2])
def test_float16_takes_the_way_of_fewer_bits(share: float, kind: BaseKind) -> None:
    """Beside the bfloat16 numbers that it was cast from, some that have no such number: one in sixteen decides."""
    generator = torch.Generator().manual_seed(0)
    tensor = normal_matrix(200, 512).half()
    others = torch.rand(tensor.shape, generator=generator) < share
    tensor[others] = (tensor[others].view(torch.int16) | 1).view(torch.float16)
    assert assert_survives(tensor, kind).survey.is_half == (share > 1 / 16)


@kinds
@halves
@pytest.mark.parametrize("order", ["ascending", "shuffled"])
def test_all_bit_patterns_survive(order: str, dtype: torch.dtype, kind: BaseKind) -> None:
    """Payloads of NaN, infinities, numbers below the normal ones, zeros of both signs."""
    generator = torch.Generator().manual_seed(0)
    bits = ALL_BITS if order == "ascending" else ALL_BITS[torch.randperm(2**16, generator=generator)]
    assert_survives(bits.view(dtype).view(64, 1024), kind)
    mixed = torch.cat([bits.view(dtype), normal_matrix(1, 10**5, dtype)[0], bits.view(dtype)])
    assert_survives(mixed.view(-1, 4).T.contiguous(), kind)


@kinds
@halves
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, float("inf"), float("nan"), 1e-7, -3e4])
def test_constant_matrices_survive(value: float, dtype: torch.dtype, kind: BaseKind) -> None:
    assert_survives(torch.full((3, BLOCK), value, dtype=dtype), kind)


@kinds
@halves
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (1, 7), (9, 1), (3, 31), (1, BLOCK - 1), (4, BLOCK // 4), (1, BLOCK + 1), (65, 63), (7, 1000), (129, 513)],
)
def test_matrices_of_any_shape_survive(shape: tuple[int, int], dtype: torch.dtype, kind: BaseKind) -> None:
    assert_survives(normal_matrix(*shape, dtype), kind)


@pytest.mark.matrix
@kinds
def test_matrices_that_threads_share_survive(kind: BaseKind) -> None:
    tensor = normal_matrix(3 * RUN // 1000, 1001)
    torch.set_num_threads(before := torch.get_num_threads())
    try:
        torch.set_num_threads(3)
        assert_survives(tensor, kind)
    finally:
        torch.set_num_threads(before)


@kinds
@halves
def test_rows_of_very_different_scale_survive(dtype: torch.dtype, kind: BaseKind) -> None:
    scales = torch.logspace(-30, 30, 64)[:, None]
    assert_survives((normal_matrix(64, 1000).float() * scales).to(dtype), kind)


@kinds
def test_the_number_of_threads_changes_nothing(kind: BaseKind) -> None:
    tensor = normal_matrix(1100, 1001)
    one, three = take_apart(tensor, kind, 1), take_apart(tensor, kind, 3)
    assert one.parts.keys() == three.parts.keys()
    assert all(torch.equal(one.parts[name], three.parts[name]) for name in one.parts)


@kinds
@halves
def test_a_matrix_has_the_base_that_drafts_alone(dtype: torch.dtype, kind: BaseKind) -> None:
    """It is the same, whether what it lacks is stored beside it or not."""
    tensor = normal_matrix(50, 300, dtype)
    code, alone = take_apart(tensor, kind), base_of(tensor, kind)
    assert torch.equal(code.base.codes, alone.codes)
    assert torch.equal(code.base.scale, alone.scale) and torch.equal(code.base.zero, alone.zero)


@given(data=st.data(), dtype=st.sampled_from(HALVES), kind=st.sampled_from(KINDS))
def test_any_matrix_survives(data: st.DataObject, dtype: torch.dtype, kind: BaseKind) -> None:
    shape = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 400)))
    few = st.sampled_from(data.draw(st.lists(st.integers(-(2**15), 2**15 - 1), min_size=1, max_size=9)))
    bits = data.draw(hnp.arrays("int16", shape, elements=few | st.integers(-(2**15), 2**15 - 1), fill=few))
    assert_survives(torch.from_numpy(bits.copy()).view(dtype), kind)


@kinds
@halves
@pytest.mark.parametrize("decode", DECODERS)
@pytest.mark.parametrize("computed", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_get_what_torch_converts(
    computed: torch.dtype, decode: Callable[..., None], dtype: torch.dtype, kind: BaseKind
) -> None:
    tensor = torch.cat([ALL_BITS.view(dtype).nan_to_num(1.0).view(64, -1), normal_matrix(5, 1024, dtype)])
    found = decoded(take_apart(tensor, kind), decode, torch.empty(tensor.shape, dtype=computed))
    assert torch.equal(found, tensor.to(computed)) and torch.equal(found.signbit(), tensor.signbit())


def test_loops_convert_all_numbers_as_numpy_and_torch_do() -> None:
    bits = ALL_BITS.numpy().view(np.uint16)
    halves, bfloats = ALL_BITS.view(torch.float16), ALL_BITS.view(torch.bfloat16)
    words, shorts, differs = np.empty(2**16, np.uint32), np.empty(2**16, np.uint16), np.empty(2**16, np.bool_)
    number_loops.widen_bfloats(bits, words)
    assert same_numbers(torch.from_numpy(words.view(np.float32)), bfloats.float())
    number_loops.widen_halves(bits, words)
    assert same_numbers(torch.from_numpy(words.view(np.float32)), halves.float())
    number_loops.halve_bfloats(bits, shorts)
    assert same_numbers(torch.from_numpy(shorts.view(np.float16)), bfloats.half())
    number_loops.cut_halves(bits, shorts, differs)
    expected = cast_halves(bits)
    sure = ~np.isnan(bits.view(np.float16))
    assert np.array_equal(shorts[sure], expected.bits[sure]) and np.array_equal(differs, expected.differs)


def same_numbers(found: torch.Tensor, expected: torch.Tensor) -> bool:
    there = ~expected.isnan()
    return torch.equal(found.isnan(), ~there) and same_bits(found[there], expected[there])


def by_kernel(code: ResidualTensor, like: torch.Tensor) -> torch.Tensor:
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = torch.full_like(like, 7.0, device=device)
    assert code.codec.kernel is not None
    code.codec.kernel({name: part.to(device) for name, part in code.parts.items()}, found)
    return found.cpu()


@pytest.mark.matrix
@kinds
@halves
@pytest.mark.parametrize("computed", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 3), (3, BLOCK), (25, 77), (7, 129)])
def test_the_kernel_makes_the_bits_of_its_twin(
    shape: tuple[int, int], computed: torch.dtype, dtype: torch.dtype, kind: BaseKind
) -> None:
    code = take_apart(normal_matrix(*shape, dtype), kind)
    like = torch.empty(shape, dtype=computed)
    assert same_bits(by_kernel(code, like), decoded(code, decode_anywhere, like))


@pytest.mark.matrix
@kinds
@halves
def test_the_kernel_keeps_every_bit_pattern(dtype: torch.dtype, kind: BaseKind) -> None:
    for tensor in (ALL_BITS.view(dtype).view(64, 1024), (torch.randn(5, 777) * 0.02).to(dtype)):
        assert same_bits(by_kernel(take_apart(tensor, kind), tensor), tensor)


@pytest.mark.matrix
@kinds
@halves
@pytest.mark.parametrize("width", range(MAX_WIDTH + 1))
def test_decoders_agree_at_every_width(width: int, dtype: torch.dtype, kind: BaseKind) -> None:
    """Of fields that hold anything: also where blocks end in front of their last word."""
    generator = torch.Generator().manual_seed(width)
    tensor = (torch.randn(3, 1000, generator=generator) * 0.02).to(dtype)
    code = take_apart(tensor, kind)
    remainder = code.remainder
    remainder.widths.copy_(torch.randint(0, width + 1, remainder.widths.shape, generator=generator))
    remainder.widths[0] = width
    remainder.words.copy_(torch.randint(-(2**31), 2**31, remainder.words.shape, generator=generator))
    found = [decoded(code, decode, tensor) for decode in DECODERS]
    assert same_bits(*found) and same_bits(by_kernel(code, tensor), found[0])


@pytest.mark.matrix
@kinds
@pytest.mark.parametrize(
    "part", ["offsets", "widths", "positions", "remainder", "base_codes", "base_zero", "base_scale", "every part"]
)
def test_damage_changes_weights_and_nothing_else(part: str, kind: BaseKind) -> None:
    """A file that lies makes no decoder read or write outside of what it is given, and all of them the same of it."""
    generator = torch.Generator().manual_seed(0)
    tensor = torch.cat([ALL_BITS.view(torch.bfloat16)[::16], normal_matrix(1, 4003)[0]]).view(-1, 89)
    code = take_apart(tensor, kind)
    for name, damaged in code.parts.items():
        if part == "every part" or name == f"weight_{part}":
            low, high = (0, 256) if damaged.dtype == torch.uint8 else (-(2**31), 2**31)
            some = torch.randint(low, high, damaged.shape, generator=generator)
            damaged.copy_(
                some.to(torch.int16).view(torch.bfloat16).nan_to_num(1.0).abs() if damaged.is_floating_point() else some
            )
    assert code.codec.kernel is not None
    found = []
    for decode in (
        code.codec.decode,
        code.codec.kernel,
        lambda _, into: decode_anywhere(code.remainder, code.base, kind, into),
    ):
        guarded = torch.full((3, *tensor.shape), 7.0, dtype=torch.bfloat16)
        decode(code.parts, guarded[1])
        assert guarded[0].eq(7).all() and guarded[2].eq(7).all()
        found.append(guarded[1])
    if part not in ("positions", "every part"):  # of two exceptions at one place, either may be the last
        assert same_bits(found[0], found[1]) and same_bits(found[0], found[2])


@kinds
def test_a_matrix_that_changes_under_the_encoder_is_refused(kind: BaseKind) -> None:
    tensor = normal_matrix(100, 1000)
    with ResidualEncoder(kind, 1) as encoder:
        survey = encoder.survey(tensor)
        code = take_apart(tensor, kind)
        assert survey is not None
        for changed in (tensor * 1e9, torch.zeros_like(tensor), -tensor):
            with pytest.raises(ValueError, match="changed"):
                encoder.encode(changed, survey, code.base, code.remainder)


@kinds
def test_every_weight_is_decoded_and_compared(kind: BaseKind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a field says wrongly is found before anybody computes with it."""
    from offload.coding import residual_cpu

    tensor, right = normal_matrix(10, 1000), residual_cpu.read_fields
    code = take_apart(tensor, kind)

    def wrong_once(*arguments: object) -> None:
        right(*arguments)
        arguments[-1][777] ^= 1  # type: ignore[index]

    monkeypatch.setattr(residual_cpu, "read_fields", wrong_once)
    with ResidualEncoder(kind, 1) as encoder, pytest.raises(ValueError, match="changed"):
        encoder.encode(tensor, code.survey, code.base, code.remainder)


def test_matrices_without_weights_have_no_code() -> None:
    with ResidualEncoder(KINDS[0], 1) as encoder:
        assert encoder.survey(torch.empty(0, 5, dtype=torch.bfloat16)) is None


def test_noise_is_not_worth_a_code() -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**15), 2**15, (64, 1000), generator=generator).to(torch.int16)
    assert not residual_pays(assert_survives(bits.view(torch.bfloat16), BASE_KINDS["int4"]).codec, (64, 1000))


@kinds
def test_decoders_keep_within_their_workspace(kind: BaseKind) -> None:
    code = take_apart(normal_matrix(300, BLOCK), kind)
    for dtype in (torch.bfloat16, torch.float32):
        found = torch.empty(300, BLOCK, dtype=dtype)
        for decode in DECODERS:
            assert working_bytes(lambda decode=decode, found=found: decoded(code, decode, found)) <= (  # type: ignore[misc]
                CPU_WORKSPACE_BYTES + found.numel() * found.element_size()
            )


def test_codecs_of_equal_parameters_are_equal() -> None:
    one, other = (take_apart(normal_matrix(4, 256), BASE_KINDS["int4"]).codec for _ in range(2))
    assert one == other and hash(one) == hash(other)
    assert NAME.endswith(".weight") and one.parts[0].name == "weight_remainder"
