"""Sizes, rates and settings as people write them, and the one line that says what was written wrongly."""

import dataclasses

import pytest

from offload.coding import base_kinds
from offload.coding.base_kinds import BASE_KINDS
from offload.config import BASES, DEFAULT_BASE, DTYPES, VERIFIERS, EngineSettings, bytes_text, counted, parse_rate, parse_size
from offload.errors import OffloadError, UsageError
from tree.verify import METHODS


def assert_refused(error: UsageError, *parts: str) -> None:
    assert error.exit_code == 2
    assert all(part in str(error) for part in parts), str(error)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("24GiB", 24 * 2**30),
        ("24GB", 24 * 10**9),
        ("24G", 24 * 2**30),
        ("512MiB", 512 * 2**20),
        ("512 MB", 512 * 10**6),
        ("1.5KiB", 1536),
        (" 2 TiB ", 2**41),
        (12345, 12345),
    ],
)
def test_sizes_are_read_as_written(text: str | int, expected: int) -> None:
    assert parse_size(text, flag="--x") == expected


@pytest.mark.parametrize(
    "text",
    ["", "GiB", "-1", -1, "1e9", "24gib", "24 G iB", "0x10", "1,5GiB", "nan", "inf", "9" * 400, "9999999TiB", True, "1\n2"],
)
def test_what_is_no_size_is_refused_with_its_flag(text: str | int) -> None:
    with pytest.raises(UsageError) as caught:
        parse_size(text, flag="--gpu-memory")
    assert_refused(caught.value, "not a size", repr(text)[1:-1], "--gpu-memory", "24GiB")


def test_one_of_a_kind_is_singular() -> None:
    assert [counted(number, "pass") for number in range(3)] == ["0 passes", "1 pass", "2 passes"]
    assert (counted(1, "node"), counted(128, "node")) == ("1 node", "128 nodes")


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 bytes"),
        (2**10, "1.0 KiB"),
        (80 * 1024, "80.0 KiB"),
        (2**20 // 4, "0.25 MiB"),
        (17_415_680, "16.6 MiB"),
        (2**30 - 1, "1.00 GiB"),
        (0.98 * 2**30, "0.98 GiB"),
        (9.999 * 2**30, "10.0 GiB"),
        (22.1 * 2**30, "22.1 GiB"),
        (127.5 * 2**30, "127.5 GiB"),
    ],
)
def test_sizes_are_written_in_a_unit_that_shows_them(num_bytes: float, text: str) -> None:
    assert bytes_text(num_bytes) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("25GB/s", 25e9),
        ("200MB/s", 200e6),
        ("1.5GiB/s", 1.5 * 2**30),
        ("200000000", 2e8),
        ("1000B/s", 1000.0),
        (2.5e9, 2.5e9),
        (7, 7.0),
    ],
)
def test_rates_are_read_as_written(text: str | float, expected: float) -> None:
    assert parse_rate(text, flag="--x") == expected


@pytest.mark.parametrize(
    "text", ["", "fast", "/s", "0", "0GB/s", 0, -1.0, "-1GB/s", "25GB/h", "25", "nan", float("nan"), float("inf")]
)
def test_what_is_no_rate_is_refused_with_its_flag(text: str | float) -> None:
    with pytest.raises(UsageError) as caught:
        parse_rate(text, flag="--emulate-link")
    assert_refused(caught.value, "not a rate", "--emulate-link", "25GB/s")


def test_auto_is_none_until_the_planner_resolves_it() -> None:
    settings = EngineSettings.parse(model="m")
    assert settings == EngineSettings(model="m")
    unresolved = (
        "gpu_memory_bytes",
        "host_memory_bytes",
        "resident_layers",
        "slots",
        "max_context",
        "emulate_link_bytes_per_s",
    )
    assert all(getattr(settings, name) is None for name in unresolved)


def test_values_are_read_by_the_flag_that_they_belong_to() -> None:
    settings = EngineSettings.parse(
        model="m",
        draft_model="none",
        gpu_memory="22GiB",
        host_memory=10**9,
        resident_layers="0",
        slots=2,
        max_context="2",
        emulate_link="200MB/s",
    )
    assert settings.draft_models == ()
    assert EngineSettings.parse(model="m", draft_model=["a", "none", "b"]).draft_models == ("a", "b")
    assert (settings.gpu_memory_bytes, settings.host_memory_bytes) == (22 * 2**30, 10**9)
    assert (settings.resident_layers, settings.slots, settings.max_context) == (0, 2, 2)
    assert settings.emulate_link_bytes_per_s == 200e6


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--gpu-memory", "much"),
        ("--host-memory", "-1GiB"),
        ("--resident-layers", "-1"),
        ("--resident-layers", "3.0"),
        ("--resident-layers", 2.7),
        ("--slots", "0"),
        ("--slots", "two"),
        ("--slots", True),
        ("--max-context", "1"),
        ("--max-context", ""),
        ("--dtype", "int8"),
        ("--verifier", "hope"),
        ("--device", "tpu"),
        ("--device", "cuda:"),
        ("--device", "cuda:-1"),
        ("--device", "CPU"),
        ("--emulate-link", "25GB/h"),
    ],
)
def test_a_value_that_no_flag_takes_is_refused_by_its_flag(flag: str, value: object) -> None:
    with pytest.raises(UsageError) as caught:
        EngineSettings.parse(model="m", **{flag.removeprefix("--").replace("-", "_"): value})  # type: ignore[arg-type]
    assert_refused(caught.value, flag)


def test_a_link_is_emulated_on_the_cpu_only() -> None:
    with pytest.raises(UsageError) as caught:
        EngineSettings.parse(model="m", device="cuda:0", emulate_link="1GB/s")
    assert_refused(caught.value, "--emulate-link with --device cuda")


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineSettings(model="m").model = "other"  # type: ignore[misc]


def test_every_dtype_and_verifier_is_admitted() -> None:
    assert all(EngineSettings(model="m", dtype=dtype).dtype == dtype for dtype in DTYPES)
    assert all(EngineSettings(model="m", verifier=verifier).verifier == verifier for verifier in VERIFIERS)


def test_verifiers_are_those_of_the_tree_package() -> None:
    assert ("auto", *METHODS) == VERIFIERS


def test_no_name_breaks_an_error_into_more_lines() -> None:
    error = OffloadError("a\nb\r\x1b[2J\udc80", where="folder\nname", cure="x\u2028y")
    assert str(error).splitlines() == ["a b\\r\\x1b[2J\\udc80", "  in: folder name", "  fix: x\\u2028y"]


def test_a_base_of_the_target_is_named_among_drafts() -> None:
    for names, kind, others in (
        ((), None, ()),
        (("self",), "int4", ()),
        (("auto",), "int4", ()),
        (("d", "self:int8", "e"), "int8", ("d", "e")),
        (("selfish", "./self"), None, ("selfish", "./self")),
    ):
        wanted = EngineSettings.parse(model="m", draft_model=names)
        assert (wanted.self_kind, wanted.other_drafts) == (kind, others)
    with pytest.raises(UsageError) as caught:
        EngineSettings(model="m", draft_models=("self:int5",))
    assert_refused(caught.value, "'int5'", "--draft-model self:int5", "int8, int4, int3")
    with pytest.raises(UsageError) as caught:
        EngineSettings(model="m", draft_models=("self", "auto"))
    assert_refused(caught.value, "more than one base", "--draft-model")


def test_the_bases_that_flags_name_are_those_that_there_are() -> None:
    assert tuple(BASE_KINDS) == BASES and DEFAULT_BASE == base_kinds.DEFAULT_BASE
