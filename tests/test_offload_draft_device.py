"""A draft that computes on the CPU beside a device that has the target: its trees are brought there, texts stay its own."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from drafters import PROMPT, open_drafters
from fakes import RefusingEagerDevice, RefusingLateDevice
from offload.assemble import open_engine
from offload.config import EngineSettings
from offload.device import Device
from offload.device.cpu import CpuDevice
from offload.engine.engine import Engine
from offload.errors import FitError, UsageError
from offload.model.apart import PIECE_BYTES, ApartContext, ApartDrafter
from offload.planner.host_draft import NAMES
from offload.planner.plan import plan_run
from offload.planner.prediction import Offer
from offload.planner.workload import make_option, make_workload
from planning import L40, LLAMA_2_7B, LLAMA_2_70B, PUBLISHED, SETTINGS, budgets, draft_option
from tree.draft import DraftTree
from tree.sampling import SamplingParams

Models = Callable[..., Path]


def opened(models: Models, device: Device, tree: str = "3x3:kary", **changes: str) -> Engine:
    settings = EngineSettings(
        model=str(models()),
        draft_models=(str(models(num_layers=1, seed=1)),),
        tree=tree,
        max_context=128,
        resident_layers=1,
        ngram=("off",),
        **{"dtype": "float32", **changes},  # type: ignore[arg-type]
    )
    return open_engine(settings, device=device, hardware=L40)


@pytest.mark.parametrize(("device", "tree"), [(RefusingEagerDevice, "3x3:kary"), (RefusingLateDevice, "12:dynamic")])
def test_greedy_text_is_that_of_the_target_alone(models: Models, device: Callable[[], Device], tree: str) -> None:
    with opened(models, device(), "none") as plain, opened(models, device(), tree, draft_device="cpu") as engine:
        expected = plain.generate(PROMPT, max_new_tokens=24, ignore_eos=True).token_ids
        report = engine.generate(PROMPT, max_new_tokens=24, ignore_eos=True)
    assert report.token_ids == expected
    assert report.to_json()["plan"]["draft_device"] == "cpu"


def test_it_takes_no_memory_of_the_device_and_its_name_says_where_it_is(models: Models) -> None:
    with opened(models, RefusingLateDevice(), draft_device="cpu") as engine, opened(models, RefusingLateDevice()) as same:
        apart, there = engine.plan, same.plan
    with opened(models, RefusingLateDevice(), "12:dynamic", draft_device="cpu") as engine:
        assert engine.plan.ahead_rows > 0
    assert apart.draft_on_host and not there.draft_on_host and apart.draft_passes == "eager"
    for name in NAMES:
        assert apart.device_ledger[name] == 0 < there.device_ledger[name]
        assert apart.host_ledger[name] > 0 and name not in there.host_ledger


def test_a_seed_repeats_a_text_and_others_do_not(models: Models) -> None:
    with opened(models, RefusingLateDevice(), "12:dynamic", draft_device="cpu") as engine:

        def text(seed: int) -> tuple[int, ...]:
            engine.forget()
            return engine.generate(PROMPT, max_new_tokens=24, temperature=1.0, seed=seed, ignore_eos=True).token_ids

        assert text(1) == text(1) != text(2)


@pytest.mark.parametrize("tree", ["3x3:kary", "12:dynamic"])
def test_a_seed_repeats_a_text_that_gives_its_place_up_and_comes_back(models: Models, tree: str) -> None:
    requests = [{"prompt": [*PROMPT, seed], "max_new_tokens": 12, "temperature": 1.0, "seed": seed} for seed in (1, 2)]
    with opened(models, RefusingLateDevice(), tree, draft_device="cpu", dtype="float64") as engine:
        alone = [engine.generate(**request, ignore_eos=True).token_ids for request in requests]  # type: ignore[arg-type]
        engine.forget()
        streams = [engine.stream(**request, ignore_eos=True) for request in requests]  # type: ignore[arg-type]
        while any([next(stream, None) is not None for stream in streams]):
            pass
    assert [tuple(stream.token_ids) for stream in streams] == alone


class Elsewhere(CpuDevice):
    """Counts what is brought to it."""

    def __init__(self) -> None:
        super().__init__()
        self.uploaded_bytes: list[int] = []

    def upload(self, host: torch.Tensor) -> torch.Tensor:
        self.uploaded_bytes.append(host.nbytes)
        return host.clone()


def grown(context: ApartContext, seed: int = 5, *, sampled: bool = True) -> DraftTree:
    generator = torch.Generator().manual_seed(seed)
    return context.grow(40, 4, SamplingParams(1.0), generator, sampled=sampled)


def test_trees_are_brought_in_pieces_that_wait_for_no_layer(models: Models) -> None:
    elsewhere = Elsewhere()
    with open_drafters([CpuDevice], models()) as (inner,):
        drafter = ApartDrafter(inner, elsewhere)
        context = drafter.start(0, PROMPT, len(PROMPT))
        assert isinstance(context, ApartContext)
        wide = context._brought(torch.arange(100_000).view(10, -1))
        assert torch.equal(wide, torch.arange(100_000).view(10, -1)) and len(elsewhere.uploaded_bytes) > 10
        tree = grown(context)
        assert tree.probabilities is not None and max(elsewhere.uploaded_bytes) <= PIECE_BYTES
        brought = elsewhere.uploaded_bytes[:]
        assert grown(context, sampled=False).probabilities is None
        assert len(elsewhere.uploaded_bytes) == len(brought) + 1  # chosen tokens alone


def test_a_round_that_is_taken_back_is_drawn_again_and_the_next_one_is_another(models: Models) -> None:
    with open_drafters([CpuDevice], models()) as (inner,):
        context = ApartDrafter(inner, Elsewhere()).start(0, PROMPT, len(PROMPT))
        assert isinstance(context, ApartContext)
        first, again = grown(context), grown(context)
        assert first.token_ids.tolist() == again.token_ids.tolist()
        context.follow((0,), (int(first.token_ids[0]),), None)  # as after a text that repeats itself
        assert grown(context).token_ids.tolist()[1:] != first.token_ids.tolist()[1:]


def test_what_it_draws_is_none_of_what_the_verifier_draws(models: Models) -> None:
    """Both generators are of one kind and begin with one seed: with the same numbers, acceptance would depend on what was
    drawn."""
    with open_drafters([CpuDevice], models()) as (inner,):
        apart = ApartDrafter(inner, Elsewhere()).start(0, PROMPT, len(PROMPT))
        assert isinstance(apart, ApartContext)
        ours = grown(apart, seed=7).token_ids.tolist()
        theirs = inner.start(0, PROMPT, len(PROMPT)).grow(
            40, 4, SamplingParams(1.0), torch.Generator().manual_seed(7), sampled=True
        )
        assert ours != theirs.token_ids.tolist()
        later = ApartDrafter(inner, Elsewhere()).start(0, [*PROMPT, 4], len(PROMPT))
        assert isinstance(later, ApartContext)
        grown(apart, seed=7), grown(later, seed=7)
        assert apart._generator is not None and later._generator is not None
        assert apart._generator.initial_seed() != later._generator.initial_seed()


def test_the_planner_takes_it_where_the_device_has_better_use_for_the_memory() -> None:
    """A small target's layers all fit beside a draft that is elsewhere; with the draft, several stream."""
    hardware = replace(L40, link_bytes_per_s=1e9)
    limits = budgets(17.5, 500)
    workload = make_workload(SETTINGS, LLAMA_2_7B, hardware, limits, max_positions=4096)
    small = replace(LLAMA_2_7B, layers=LLAMA_2_7B.layers[:8])
    there = draft_option(small, hardware=hardware)
    for slower, on_host in ((2.0, True), (1e4, False)):  # then none pays, and neither does one that takes memory
        times = replace(there.times, layer_s=tuple(slower * seconds for seconds in there.times.layer_s))
        beside = replace(there, name="beside", on_host=True, times=times)
        offers = [Offer(workload=workload, drafts=(there, beside))]
        made = plan_run(SETTINGS, None, offers, max_positions=4096, budgets=limits)
        assert made.draft_on_host == on_host


def test_the_host_must_have_room_for_it() -> None:
    limits = budgets(24, 10)
    workload = make_workload(SETTINGS, LLAMA_2_70B, L40, limits, max_positions=4096)
    option = make_option(SETTINGS, L40, "7b", LLAMA_2_7B, PUBLISHED, on_host=True)
    with pytest.raises(FitError, match="draft model"):
        workload.memory(option, 64, 2, False)


def test_a_base_lies_where_the_target_does(models: Models) -> None:
    settings = EngineSettings(model=str(models()), draft_models=("self",), draft_device="cpu", dtype="float32", tree="2x2:kary")
    with pytest.raises(UsageError, match="a base of the target's layers"):
        open_engine(settings, device=RefusingLateDevice(), hardware=L40)


def test_on_a_cpu_it_is_the_same_device(models: Models) -> None:
    with opened(models, CpuDevice(), draft_device="cpu") as engine:
        assert not engine.plan.draft_on_host
