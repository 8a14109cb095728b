"""A base of the target's own layers drafts, and what it lacks travels: the text is the target's, wherever layers lie."""

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from exactness import run, save_pair
from fakes import EagerDevice, LateDevice, RecordingDevice, RefusingEagerDevice, RefusingLateDevice, layer_fault
from offload.assemble import open_engine
from offload.cli.convert import conversion_of, scheme_of
from offload.config import EngineSettings
from offload.demo import DRAFT, TARGET
from offload.device.cpu import CpuDevice
from offload.weights.conversion import convert
from planning import L40
from self_drafts import GREEDY, NUM_LAYERS, PROMPT, RESIDENCIES, SAMPLED, open_self, text
from tree.acceptance import Acceptance
from tree.sampling import SamplingParams

Models = Callable[..., Path]
ADVERSARIES: dict[str, Callable[[], CpuDevice]] = {"eager": EagerDevice, "late": LateDevice}
CODECS, BASES = ("none", "lossless", "residual"), (None, "self:int8", "self:int4")


@pytest.fixture(scope="module")
def folder(models: Models) -> Path:
    return models(num_layers=NUM_LAYERS, dtype="bfloat16")


@pytest.fixture(scope="module")
def plain_text(folder: Path) -> tuple[int, ...]:
    """Of the target alone, as it is."""
    with open_self(folder, None, codec="none") as engine:
        assert engine.plan.tree.num_nodes == 1
        return text(engine)


@pytest.mark.slow
def test_the_base_drafts_and_every_residency_has_the_text_of_plain_decoding(folder: Path, plain_text: tuple[int, ...]) -> None:
    """The quick twin of the next."""
    others = itertools.product(("some of each",), CODECS[:2])
    for residency, codec in [*((residency, "residual") for residency in RESIDENCIES), *others]:
        with open_self(folder, "self:int4", codec=codec, residency=residency, device=LateDevice()) as engine:
            check_engine(engine, "self:int4", codec, residency)
            assert text(engine) == plain_text == text(engine)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("adversary", ADVERSARIES)
@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("draft", BASES)
@pytest.mark.parametrize("codec", CODECS)
def test_the_text_is_the_same_for_all_codecs_bases_residencies_slots_and_devices(
    folder: Path, plain_text: tuple[int, ...], codec: str, draft: str | None, slots: int, adversary: str
) -> None:
    for residency in RESIDENCIES:
        opened = open_self(folder, draft, codec=codec, residency=residency, device=ADVERSARIES[adversary](), slots=slots)
        with opened as engine:
            check_engine(engine, draft, codec, residency)
            assert text(engine) == plain_text == text(engine)


def check_engine(engine: Any, draft: str | None, codec: str, residency: str) -> None:
    """That it is what the settings ask for."""
    plan, kept = engine.plan, RESIDENCIES[residency]
    assert plan.draft == (0 if draft is not None else None)
    assert len(plan.placement.resident) == kept.num_raw + kept.num_coded
    assert len(plan.placement.coded) == (0 if codec == "none" else kept.num_coded)
    raw = len(plan.placement.resident) - len(plan.placement.coded)
    has_base = (draft is not None or codec == "residual") and raw < NUM_LAYERS
    assert (engine.memory().device_base_bytes > 0) == has_base
    ledger = sum(num_bytes for name, num_bytes in plan.device_ledger.items() if name.startswith("base of"))
    assert engine.memory().device_base_bytes == ledger


@pytest.mark.parametrize("draft", ["self:int8", pytest.param("self:int4", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "codec", ["residual", *(pytest.param(codec, marks=pytest.mark.slow) for codec in ("none", "lossless"))]
)
def test_the_bundled_target_is_drafted_by_its_own_base(draft: str, codec: str) -> None:
    """Of int8, most of a chain is accepted; what travels beside int4 is less than half of 16 bit."""
    prompt, request = "The Congress of the United States should", {"max_new_tokens": 40, "ignore_eos": True}
    with open_self(TARGET, None, codec="none", residency="none") as engine:
        expected = engine.generate(prompt, **request)
        raw_bytes = engine.plan.bytes_per_pass
    for residency in ("none", "some raw"):
        with open_self(TARGET, draft, codec=codec, residency=residency, tree="1x24:kary") as engine:
            found = engine.generate(prompt, **request)
            assert found.token_ids == expected.token_ids and found.stats.tokens_per_pass is not None
            assert found.stats.tokens_per_pass > (10 if draft == "self:int8" else 2)
            if residency == "none" and codec == "residual":  # computed in float32: raw layers are twice 16 bit
                assert engine.plan.bytes_per_pass < (0.25 if draft == "self:int8" else 0.48) * raw_bytes / 2
                assert engine.weights.name == f"bfloat16, coded beside a base of {draft.removeprefix('self:')}"


def test_a_draft_of_raw_layers_alone_is_always_right(folder: Path) -> None:
    with open_self(folder, "self:int3", residency="all") as engine:
        report = engine.generate(PROMPT, **GREEDY)
        assert engine.memory().device_base_bytes == 0
        assert report.stats.tokens_per_pass is not None and report.stats.tokens_per_pass > 3


@pytest.mark.slow
def test_sampled_text_does_not_depend_on_how_layers_travel(folder: Path) -> None:
    """The same base, the same seed, the same tree: the same tokens. Another seed has others."""
    texts = set[tuple[int, ...]]()
    for codec, make_device in zip(CODECS, (EagerDevice, LateDevice, LateDevice), strict=True):
        with open_self(folder, "self:int4", codec=codec, residency="some raw", device=make_device()) as engine:
            texts |= {text(engine, **SAMPLED), text(engine, **SAMPLED)}
            assert text(engine, **{**SAMPLED, "seed": 6}) not in texts
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("verifier", "temperature", "draft"),
    [
        ("traversal", 1.0, "self:int3"),
        *(
            pytest.param(verifier, temperature, draft, marks=pytest.mark.slow)
            for verifier, temperature in (("rejection", 1.5), ("sample", 1.0), ("traversal", 0.6))
            for draft in ("self:int3", "self:int4")
        ),
    ],
)
def test_sampled_text_has_the_law_of_the_16_bit_target(
    tmp_path_factory: pytest.TempPathFactory, verifier: str, temperature: float, draft: str
) -> None:
    """False-alarm probability 1e-5 a case, as in test_offload_exactness.py, whose control holds here as well."""
    target, _ = save_pair(tmp_path_factory.mktemp("pair"), torch.bfloat16)
    outcome = run(target, draft, verifier, SamplingParams(temperature=temperature), 150, seed=0)
    assert outcome.rounds > outcome.texts and outcome.p_value > 1e-5, outcome


# -- where layers lie, and when they leave -------------------------------------------------------------------------------


@pytest.mark.matrix
@pytest.mark.parametrize("make_device", [EagerDevice, LateDevice, RefusingEagerDevice, RefusingLateDevice])
@pytest.mark.parametrize("codec", ["residual", pytest.param("none", marks=pytest.mark.slow)])
def test_layers_on_disk_have_their_base_on_the_device(
    folder: Path, plain_text: tuple[int, ...], make_device: Callable[[], CpuDevice], codec: str
) -> None:
    with open_self(folder, "self:int8", codec=codec) as engine:
        slot_bytes = engine.loop._stream.slot_bytes
    with open_self(folder, "self:int8", codec=codec, device=make_device(), host_memory_bytes=3 * slot_bytes) as engine:
        assert len(engine.plan.placement.disk) >= 2
        assert text(engine) == plain_text == text(engine)


@pytest.mark.matrix
@pytest.mark.parametrize("make_device", [EagerDevice, LateDevice, RefusingLateDevice])
@pytest.mark.parametrize(
    ("codec", "residency"),
    [
        ("residual", "some raw"),
        pytest.param("none", "some raw", marks=pytest.mark.slow),
        pytest.param("residual", "some coded", marks=pytest.mark.slow),
    ],
)
def test_layers_that_leave_a_full_device_leave_their_base_behind_and_change_no_token(
    folder: Path, plain_text: tuple[int, ...], make_device: Callable[[], CpuDevice], codec: str, residency: str
) -> None:
    with open_self(folder, "self:int4", codec=codec, residency=residency, device=make_device()) as engine:
        planned, base_bytes = engine.plan, engine.memory().device_base_bytes
        with layer_fault(engine, 0, lambda: len(engine.plan.placement.resident) == 2) as failed:
            assert text(engine) == plain_text
        plan = engine.plan
        assert len(failed) >= 1 and len(plan.placement.resident) < 2
        assert engine.memory().device_base_bytes == sum(
            num_bytes for name, num_bytes in plan.device_ledger.items() if name.startswith("base of")
        )
        assert (engine.memory().device_base_bytes > base_bytes) == (residency == "some raw")
        assert sum(plan.device_ledger.values()) < sum(planned.device_ledger.values())
        assert text(engine) == plain_text


@pytest.mark.slow
def test_recorded_passes_of_a_base_have_its_text_and_are_dropped_when_layers_leave(
    folder: Path, plain_text: tuple[int, ...]
) -> None:
    with open_self(folder, "self:int4", codec="residual", residency="some raw", device=RecordingDevice()) as engine:
        drafter: Any = engine.loop._drafter
        assert engine.plan.draft_passes == "graphs" and drafter._fixed is not None
        assert text(engine) == plain_text
        with layer_fault(engine, 0, lambda: len(engine.plan.placement.resident) == 2):
            assert text(engine) == plain_text
        assert drafter._fixed is None
        assert text(engine) == plain_text


# -- what a user does with it ---------------------------------------------------------------------------------------------


def test_a_second_turn_reads_what_is_new_and_has_the_text_of_a_fresh_run(folder: Path) -> None:
    with open_self(folder, "self:int8", residency="some raw") as engine:
        first = engine.generate(PROMPT, **GREEDY)
        longer = [*PROMPT, *first.token_ids, 7, 8, 9]
        second = engine.generate(longer, **GREEDY)
        assert second.stats.reused_tokens == len(PROMPT) + len(first.token_ids) - 1
        engine.forget()
        assert engine.generate(longer, **GREEDY).token_ids == second.token_ids
    with open_self(folder, None, codec="none") as engine:
        assert engine.generate(longer, **GREEDY).token_ids == second.token_ids


def test_texts_that_share_a_pass_have_a_base_to_draft_with_each(folder: Path) -> None:
    prompts = [PROMPT, [8, 8, 3]]
    with open_self(folder, None, codec="none") as engine:
        expected = [engine.generate(prompt, **GREEDY).token_ids for prompt in prompts]
    with open_self(folder, "self:int8", codec="residual", max_sequences=2, device=LateDevice()) as engine:
        texts = [engine.stream(prompt, **GREEDY) for prompt in prompts]
        found: list[list[int]] = [[], []]
        for steps in itertools.zip_longest(*texts):
            for place, step in enumerate(steps):
                found[place] += step.token_ids if step is not None else ()
        assert [tuple(tokens) for tokens in found] == expected


@pytest.mark.slow
def test_a_base_beside_a_draft_is_made_only_where_it_drafts() -> None:
    """The planner has both; the base is not on the device when the draft was taken, and layers travel as they would without."""
    prompt, request = "The Congress of the United States should", {"max_new_tokens": 24, "ignore_eos": True}
    texts = set[tuple[int, ...]]()
    for acceptance, expected in (((0.9, 0.05), 0), ((0.05, 0.9), 1)):
        settings = EngineSettings(
            model=str(TARGET), draft_models=(str(DRAFT), "self:int8"), tree="4x4:kary", device="cpu", resident_layers=0, slots=2
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("offload.assemble.read_acceptances", lambda _settings, chances=acceptance: accepted(chances))
            with open_engine(settings, hardware=L40) as engine:
                assert engine.draft_place == expected
                assert (engine.memory().device_base_bytes > 0) == (expected == 1)
                assert ("residual" in " ".join(engine.weights.codecs(range(6)))) == (expected == 1)
                texts.add(engine.generate(prompt, **request).token_ids)
    assert len(texts) == 1


def accepted(chances: tuple[float, float]) -> tuple[Any, ...]:
    return tuple(Acceptance(levels=((chance,),), source="a test's") for chance in chances)


@pytest.mark.matrix
@pytest.mark.parametrize("draft", [None, "self:int8"])
@pytest.mark.parametrize("codec", ["auto", "none"])
def test_a_folder_that_was_coded_beside_a_base_has_the_text_of_the_one_that_it_is_of(
    folder: Path, plain_text: tuple[int, ...], tmp_path: Path, codec: str, draft: str | None
) -> None:
    """The quick twin of the next."""
    convert(conversion_of(str(folder), str(tmp_path / "coded"), scheme_of("residual", "int8")))
    check_coded_folder(tmp_path / "coded", plain_text, draft, codec, ["some of each"])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["int4", "int8", "int3"])
def test_a_coded_folder_has_that_text_in_all_residencies(
    folder: Path, plain_text: tuple[int, ...], tmp_path: Path, kind: str
) -> None:
    convert(conversion_of(str(folder), str(tmp_path / "coded"), scheme_of("residual", kind)))
    for draft, codec in itertools.product((None, f"self:{kind}", "auto"), ("auto", "none", "residual")):
        check_coded_folder(tmp_path / "coded", plain_text, draft, codec, RESIDENCIES)


def check_coded_folder(
    coded: Path, plain_text: tuple[int, ...], draft: str | None, codec: str, residencies: Iterable[str]
) -> None:
    """With its base as the draft or without one, as it is stored or unpacked."""
    for residency in residencies:
        with open_self(coded, draft, codec=codec, residency=residency, device=LateDevice()) as engine:
            assert text(engine) == plain_text
            has_base = (draft is not None or codec != "none") and len(engine.plan.placement.decoded) > 0
            assert (engine.memory().device_base_bytes > 0) == has_base
