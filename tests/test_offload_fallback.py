"""Less memory than planned, on the device or the host, changes how a run goes and not what it says."""

import itertools
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef

from command_line import DOES_NOT_FIT, assert_error, run_command
from exactness import LENGTH, TREE, chi_square, exact_probabilities, save_pair
from exactness import PROMPT as PAIR_PROMPT
from fakes import REFUSING, AllocationFault, EagerDevice, FullHostDevice, LateDevice, layer_fault
from offload.assemble import open_engine
from offload.config import EngineSettings
from offload.device.cpu import CpuDevice
from offload.engine.engine import Engine
from offload.engine.loading import LoadProgress
from offload.errors import FitError, HostMemoryError
from offload.planner.cost import ModelCost
from offload.planner.fallback import MAX_TURNS, Fallbacks
from offload.planner.hardware import HardwareProfile
from offload.planner.plan import plan_run
from offload.planner.prediction import Offer
from offload.planner.workload import make_workload
from offload.weights.placement import RING_BUFFERS
from planning import CHAINS, GIB, L40, LLAMA_2_70B, SETTINGS, TWO_KINDS, budgets, draft_option
from tree.sampling import SamplingParams

Models = Callable[..., Path]
Request = dict[str, Any]
PROMPT = [5, 9, 33, 2, 71]
LONG_PROMPT = [(7 * place + 3) % 90 for place in range(120)]
GREEDY: Request = {"max_new_tokens": 16, "ignore_eos": True}
SHORT: Request = {**GREEDY, "max_new_tokens": 8}  # for many runs
SAMPLED: Request = {**GREEDY, "temperature": 1.0, "seed": 3}
NUM_LAYERS = 5
SLOW_LINK = replace(L40, link_bytes_per_s=1e6)  # so slow that it is all that counts
ADVERSARIES = {"eager": EagerDevice, "late": LateDevice}


@pytest.fixture(params=sorted(ADVERSARIES))
def adversary(request: pytest.FixtureRequest) -> Callable[[], CpuDevice]:
    return ADVERSARIES[request.param]


@contextmanager
def open_tiny(
    models: Models,
    device: CpuDevice | None = None,
    hardware: HardwareProfile = L40,
    progress: LoadProgress | None = None,
    **changes: object,
) -> Iterator[Engine]:
    """A target of NUM_LAYERS layers with a draft that is sometimes right."""
    folder = models(num_layers=NUM_LAYERS)
    settings: dict[str, Any] = {
        "model": str(folder),
        "draft_models": (str(models(num_layers=1, seed=1)),),
        "tree": "3x4:kary",
        "device": "cpu",
        "resident_layers": 2,
        "slots": 2,
        **changes,
    }
    with open_engine(EngineSettings(**settings), device=device, hardware=hardware, progress=progress) as engine:
        yield engine


def text(models: Models, prompt: list[int], request: Request, **changes: object) -> tuple[int, ...]:
    """What a run without a fault says."""
    with open_tiny(models, **changes) as engine:
        return engine.generate(prompt, **request).token_ids


def num_ring_threads() -> int:
    return sum(thread.name == "treestream-ring" for thread in threading.enumerate())


# -- the device, in a pass ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.matrix
def test_a_tensor_that_finds_no_room_anywhere_in_a_round_changes_no_token(
    models: Models, adversary: Callable[[], CpuDevice]
) -> None:
    """Every 149th allocation of a prompt's round and of a later one, and the last ones, when the pass itself is done; one after
    another on the same engine."""
    expected = text(models, PROMPT, SHORT)
    with open_tiny(models, adversary()) as engine:
        planned = engine.plan
        for round_number in (1, 2):
            counting = AllocationFault(0)
            run_with_fault(engine, round_number, counting)
            assert counting.num_seen > 200
            for fail_at in [*range(round_number, counting.num_seen, 149), *range(counting.num_seen - 2, counting.num_seen + 1)]:
                engine.loop._plan = planned
                fault = AllocationFault(fail_at)
                assert run_with_fault(engine, round_number, fault) == expected
                assert fault.num_seen > fail_at, "the round must have gone on behind the fault"
                assert engine.plan.tree.num_nodes == planned.tree.num_nodes // 2
        engine.loop._plan = planned
        assert engine.generate(PROMPT, **SHORT).token_ids == expected


def run_with_fault(engine: Engine, round_number: int, fault: AllocationFault) -> tuple[int, ...]:
    engine.forget()
    generation = engine.stream(PROMPT, **SHORT)
    for _ in range(round_number - 1):
        next(generation)
    with fault:
        next(generation)
    assert list(generation), "rounds must lie behind that of the fault"
    return generation.result().token_ids


def test_the_tree_goes_first_then_a_resident_layer_and_the_report_says_so(
    models: Models, adversary: Callable[[], CpuDevice], caplog: pytest.LogCaptureFixture
) -> None:
    expected = text(models, PROMPT, GREEDY)
    with open_tiny(models, adversary(), SLOW_LINK) as engine:
        planned = engine.plan
        with layer_fault(engine, 3, lambda: len(engine.plan.placement.resident) > 1) as failed:
            report = engine.generate(PROMPT, **GREEDY)
        assert report.token_ids == expected and len(failed) == 2
        plan = report.plan
        assert (plan.tree.num_nodes, len(plan.placement.resident)) == (planned.tree.num_nodes // 2, 1)
        assert plan.bytes_per_pass == planned.bytes_per_pass + engine.loop._stream.slot_bytes
        assert {one.bytes_streamed for one in report.stats.passes} == {plan.bytes_per_pass}
        assert engine.memory().host_weights_bytes == plan.bytes_per_pass == sum(plan.host_ledger.values())
        assert sum(plan.device_ledger.values()) < sum(planned.device_ledger.values())
        assert plan.prediction.s_per_token > planned.prediction.s_per_token
        assert [note.partition(";")[0] for note in plan.notes] == [
            f"out of device memory: a tree of 6 nodes, not {planned.tree.num_nodes}",
            "out of device memory: 1 resident layer, not 2",
        ]
        warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert len(warned) == 2 and all("Tried to allocate" in line and "s/token" in line for line in warned)
        assert engine.generate(PROMPT, **GREEDY).token_ids == expected
        assert len(engine.plan.notes) == 2


def test_what_a_failed_pass_has_computed_is_gone_before_the_next_try(models: Models) -> None:
    computed: list[StorageWeakRef] = []

    def hook(_module: object, _args: object, output: torch.Tensor) -> None:
        assert all(old.expired() for old in computed)
        computed.append(StorageWeakRef(output.untyped_storage()))
        if len(computed) < 4:
            raise torch.OutOfMemoryError("full")

    with open_tiny(models) as engine:
        handle = list(engine.loop._target._model.get_submodule("model.layers").children())[1].register_forward_hook(hook)
        next(engine.stream(PROMPT, **GREEDY))
        handle.remove()
    assert len(computed) == 4


@pytest.mark.matrix
@pytest.mark.parametrize("resident", [1, NUM_LAYERS])
def test_a_layer_that_leaves_the_device_leaves_its_memory(
    models: Models, adversary: Callable[[], CpuDevice], resident: int
) -> None:
    """From a stream, one layer; where nothing was streamed, three, of which two become the slots. Sampled text stays as it is,
    since the tree, the root alone, stays."""
    changes = {"draft_models": (), "tree": "none", "resident_layers": resident}
    expected = text(models, PROMPT, SAMPLED, **changes)
    with open_tiny(models, adversary(), **changes) as engine:
        store = engine.loop._stream._store
        buffers = [StorageWeakRef(buffer.untyped_storage()) for buffer in store._resident.values()]
        left = resident - 1 if resident < NUM_LAYERS else NUM_LAYERS - 3
        engine.generate(PROMPT, max_new_tokens=1)  # so that the model has seen all layers, and might hold on to them
        num_alive: list[int] = []

        def is_full() -> bool:
            num_alive.append(sum(not buffer.expired() for buffer in buffers))
            return len(engine.plan.placement.resident) > left

        with layer_fault(engine, 0, is_full) as failed:
            assert engine.generate(PROMPT, **SAMPLED).token_ids == expected
        in_slots = 2 if resident == NUM_LAYERS else 0
        assert num_alive[:2] == [resident, left + in_slots], "the pass that is tried again has their memory"
        assert len(failed) == 1 and engine.loop._stream.num_slots == 2
        assert store.host_bytes == (NUM_LAYERS - left) * store.slot_bytes
        assert not any("nothing is streamed" in note for note in engine.plan.notes)
        assert engine.generate(PROMPT, **SAMPLED).token_ids == expected


@pytest.mark.matrix
def test_a_layer_goes_back_to_disk_where_the_host_has_no_room(models: Models, adversary: Callable[[], CpuDevice]) -> None:
    changes: dict[str, Any] = {"draft_models": (), "tree": "none", "resident_layers": 2}
    expected = text(models, PROMPT, SAMPLED, **changes)
    with open_tiny(models, **changes) as engine:
        layer_bytes = engine.loop._stream.slot_bytes
    with open_tiny(models, adversary(), **changes, host_memory_bytes=2 * layer_bytes) as engine:
        assert len(engine.plan.placement.disk) == 3
        with layer_fault(engine, 2, lambda: len(engine.plan.placement.resident) > 1):
            assert engine.generate(PROMPT, **SAMPLED).token_ids == expected
        assert len(engine.plan.placement.disk) == 4 and num_ring_threads() == 1
        assert engine.memory().host_weights_bytes == RING_BUFFERS * layer_bytes
        assert engine.generate(PROMPT, **SAMPLED).token_ids == expected
    assert num_ring_threads() == 0
    with open_tiny(models, adversary(), **changes, host_memory_bytes=3 * layer_bytes) as engine:
        assert not engine.plan.placement.disk
        with layer_fault(engine, 2, lambda: True), pytest.raises(FitError):
            engine.generate(PROMPT, **SAMPLED)
        assert engine.plan.placement.resident and sum(engine.plan.host_ledger.values()) == 3 * layer_bytes


@pytest.mark.matrix
@pytest.mark.parametrize("request_", [GREEDY, pytest.param(SAMPLED, marks=pytest.mark.slow)], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("pass_rows", "failing_rows", "smaller"), [(160, 119 + 13, 66), (128, 119, 64)])
def test_a_long_prompt_is_read_in_smaller_pieces_before_the_tree_shrinks(
    models: Models, adversary: Callable[[], CpuDevice], pass_rows: int, failing_rows: int, smaller: int, request_: Request
) -> None:
    """The tree keeps its shape, so the sampled text is the same, too: its randomness is taken back with the pass."""
    expected = text(models, LONG_PROMPT, request_)
    with open_tiny(models, adversary()) as engine:
        planned = engine.loop._plan = replace(engine.plan, pass_rows=pass_rows)
        with layer_fault(engine, 4, lambda: engine.plan.pass_rows > smaller) as failed:
            report = engine.generate(LONG_PROMPT, **request_)
        assert failed == [failing_rows]
        assert report.token_ids == expected and report.plan.tree == planned.tree
        assert report.plan.pass_rows == smaller == engine.loop._drafter.chunk_tokens  # type: ignore[union-attr]
        assert engine.generate(LONG_PROMPT, **request_).token_ids == expected


@pytest.mark.slow
def test_text_of_passes_that_failed_and_ran_again_with_a_smaller_tree_has_the_law_of_the_target(tmp_path: Path) -> None:
    """The first pass of every text fails once in its last layer, when the tree has been drawn. False-alarm probability 1e-5;
    the seeds are fixed."""
    target, draft = save_pair(tmp_path)
    counts: Counter[tuple[int, ...]] = Counter()
    params, num_texts = SamplingParams(temperature=1.0), 200
    settings = EngineSettings(model=str(target), draft_models=(str(draft),), tree=TREE, device="cpu")
    with open_engine(settings, hardware=L40) as engine:
        planned = engine.plan
        with layer_fault(engine, 0, lambda: engine.plan.tree.num_nodes == planned.tree.num_nodes) as failed:
            for seed in range(num_texts):
                engine.loop._plan = planned
                request: Request = {"max_new_tokens": LENGTH, "temperature": 1.0, "seed": seed, "ignore_eos": True}
                counts[engine.generate(PAIR_PROMPT, **request).token_ids] += 1
    assert len(failed) == num_texts
    assert chi_square(counts, exact_probabilities(target, params), num_texts)[0] > 1e-5


def test_what_cannot_be_remedied_is_an_error_of_three_lines_after_a_bounded_number_of_tries(
    models: Models, adversary: Callable[[], CpuDevice]
) -> None:
    expected = text(models, PROMPT, SAMPLED, tree="none", draft_models=())
    with open_tiny(models, adversary()) as engine:
        with layer_fault(engine, 1, lambda: True) as failed, pytest.raises(FitError) as caught:
            engine.generate(PROMPT, **GREEDY)
        assert 2 < len(failed) <= 1 + 3 * MAX_TURNS
        assert engine.plan.tree.num_nodes == 1 and not engine.plan.placement.resident
        lines = str(caught.value).splitlines()
        assert caught.value.exit_code == 4 and len(lines) == 3
        assert (
            "Tried to allocate 2.00 MiB.; " in lines[0] and "0.68 MiB were planned" in lines[0] and "more lines" not in lines[0]
        )
        assert "a tree of 1 node and 0 resident layers" in lines[1]
        assert engine.generate(PROMPT, **SAMPLED).token_ids == expected


def test_the_command_line_ends_with_code_4(
    models: Models, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 2.00 MiB.\nmore lines")

    monkeypatch.setattr("offload.engine.decode.DecodeLoop._run_target", full)
    request = ["--prompt-ids", "1,2,3", "--max-new-tokens", 4, "--device", "cpu", "--resident-layers", 0]
    finished = run_command(capsys, "--model", models(num_layers=1), *request)
    assert_error(
        finished,
        DOES_NOT_FIT,
        "no pass finds the memory that it needs: out of memory: Tried to allocate 2.00 MiB.",
        "0 resident layers",
    )


def test_a_layer_that_moves_to_the_host_takes_the_room_of_kept_conversations(models: Models) -> None:
    changes: dict[str, Any] = {"draft_models": (), "tree": "none", "resident_layers": 2}
    expected = text(models, PROMPT, SAMPLED, **changes)
    with open_tiny(models, **changes) as engine:
        layer_bytes = engine.loop._stream.slot_bytes
    with open_tiny(models, **changes, host_memory_bytes=4 * layer_bytes) as engine:
        engine.generate(list(range(30)), max_new_tokens=8, ignore_eos=True)
        assert engine.generate(PROMPT, **SAMPLED).token_ids == expected and engine.memory().host_sessions_bytes > 0
        with layer_fault(engine, 2, lambda: len(engine.plan.placement.resident) > 1):
            assert engine.generate(PROMPT, **SAMPLED).token_ids == expected
        memory = engine.memory()
        assert memory.host_weights_bytes == 4 * layer_bytes and memory.host_sessions_bytes == 0


def test_a_host_without_room_for_a_layer_ends_the_request_and_nothing_else(models: Models) -> None:
    changes: dict[str, Any] = {"draft_models": (), "tree": "none"}
    expected = text(models, PROMPT, SAMPLED, **changes)
    device = FullHostDevice(2**30)
    with open_tiny(models, device, **changes) as engine:
        planned, device.room_bytes = engine.plan, 0
        with layer_fault(engine, 1, lambda: True), pytest.raises(HostMemoryError):
            engine.generate(PROMPT, **SAMPLED)
        assert engine.plan == planned
        assert engine.generate(PROMPT, **SAMPLED).token_ids == expected


@given(
    target=st.sampled_from([LLAMA_2_70B, TWO_KINDS]),
    max_sequences=st.integers(1, 3),
    device_gib=st.floats(30, 200),
    host_gib=st.one_of(st.none(), st.floats(100, 160)),
    prompt_rows=st.integers(0, 4000),
)
def test_every_plan_that_follows_another_takes_less_and_they_come_to_an_end(
    target: ModelCost, max_sequences: int, device_gib: float, host_gib: float | None, prompt_rows: int
) -> None:
    limits, draft, wanted = budgets(device_gib, host_gib), draft_option(), replace(SETTINGS, max_sequences=max_sequences)
    workload = make_workload(wanted, target, L40, limits, max_positions=4096)
    planned = plan_run(wanted, CHAINS, [Offer(workload=workload, drafts=(draft,))], max_positions=4096, budgets=limits)
    fallbacks = Fallbacks(settings=wanted, workload=workload, draft=draft, budgets=limits)
    plans, turn = [planned], 0
    while (found := fallbacks.relief(plans[-1], prompt_rows, turn)) is not None:
        smaller, turn = found
        plans.append(smaller)
    assert len(plans) <= 1 + 3 * MAX_TURNS
    for before, after in itertools.pairwise(plans):
        assert sum(after.device_ledger.values()) < sum(before.device_ledger.values())
        assert after.context_rows == before.context_rows and len(after.notes) >= len(before.notes)
        assert after.prediction.s_per_token >= before.prediction.s_per_token * (1 - 1e-9)
        assert host_gib is None or sum(after.host_ledger.values()) <= host_gib * GIB
        assert after.max_sequences == max_sequences and after.pass_rows >= max_sequences * (after.tree.num_nodes + 1)
        streamed = {*after.placement.host, *after.placement.disk}
        assert streamed | after.placement.resident == set(range(target.num_layers))
        assert after.bytes_per_pass == sum(target.layers[layer].stored_bytes for layer in streamed)


# -- the host, when a model is loaded -----------------------------------------------------------------------------------


@contextmanager
def open_refusing(
    models: Models, kind: str, room_layers: int, hardware: HardwareProfile = SLOW_LINK, **changes: object
) -> Iterator[Engine]:
    """On a device that pins `room_layers` layers."""
    with open_tiny(models, **changes) as engine:
        layer_bytes = engine.loop._stream.slot_bytes
    device = REFUSING[kind]()
    device.room_bytes = room_layers * layer_bytes
    with open_tiny(models, device, hardware, **changes) as engine:
        yield engine
    assert device.pinned == [] and num_ring_threads() == 0


@pytest.mark.matrix
@pytest.mark.parametrize("kind", [kind if kind == "late" else pytest.param(kind, marks=pytest.mark.slow) for kind in REFUSING])
@pytest.mark.parametrize("disk", [0, 2])
def test_memory_that_cannot_be_pinned_changes_no_token(models: Models, kind: str, disk: int) -> None:
    changes: dict[str, Any] = {"resident_layers": 0}
    with open_tiny(models, **changes) as engine:
        expected = engine.generate(PROMPT, **SAMPLED).token_ids
        layer_bytes = engine.loop._stream.slot_bytes
    if disk:
        changes["host_memory_bytes"] = (NUM_LAYERS - disk + RING_BUFFERS) * layer_bytes - 1
    for slots, room_layers in ((2, 0), (3, 3)):
        with open_refusing(models, kind, room_layers, **changes, slots=slots) as engine:
            placement, memory = engine.plan.placement, engine.memory()
            assert placement.pageable and bool(placement.disk) == bool(disk)
            assert engine.generate(PROMPT, **SAMPLED).token_ids == expected
            assert engine.generate(PROMPT, **SAMPLED).token_ids == expected
            assert memory.host_pinned_bytes == room_layers * layer_bytes
            assert memory.host_weights_bytes == sum(engine.plan.host_ledger.values())


@pytest.mark.parametrize("rate", [4e5, 4e6])
def test_memory_that_cannot_be_pinned_slows_the_prediction_as_its_timeline_has_it_and_is_said(
    models: Models, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, rate: float
) -> None:
    """Three of five layers are moved at a rate of which the link is the double or a quarter: either the ring is busy all the
    time, or the link."""
    with open_refusing(models, "cpu", 100, resident_layers=0) as engine:
        planned, layer_bytes = engine.plan, engine.loop._stream.slot_bytes
        assert planned.notes == () and engine.memory().host_pinned_bytes == 5 * layer_bytes and not caplog.text
        assert planned.prediction.pass_s == pytest.approx(5 * layer_bytes / 1e6)
    monkeypatch.setattr("offload.streaming.stream.LayerStream.measure_move", lambda _: rate)
    with open_refusing(models, "cpu", 4, resident_layers=0) as engine:
        plan = engine.plan
        assert len(plan.placement.pageable) == 3 and engine.memory().host_weights_bytes == 7 * layer_bytes
        assert {name: size // layer_bytes for name, size in plan.host_ledger.items()} == {
            "pinned layers": 2,
            "pageable layers": 3,
            "bounce ring": RING_BUFFERS,
        }
        assert plan.prediction.pass_s == pytest.approx(max(3 * layer_bytes / rate, 5 * layer_bytes / 1e6))
        how = f"moved into a ring at {rate / 1e9:.3g} GB/s on their way"
        note = f"3 of 5 streamed layers could not be pinned and are {how}"
        assert [one.partition(";")[0] for one in plan.notes] == [note]
        assert ("; predicted" in plan.notes[0]) == (plan.prediction.pass_s > planned.prediction.pass_s * 1.1)
        assert f" of host memory could be pinned: {plan.notes[0]}" in caplog.text


@pytest.mark.matrix
@pytest.mark.parametrize("kind", sorted(REFUSING))
def test_a_layer_that_leaves_the_device_and_is_not_pinned_is_told_in_the_plan(models: Models, kind: str) -> None:
    changes: dict[str, Any] = {"draft_models": (), "tree": "none", "resident_layers": 2}
    expected = text(models, PROMPT, SAMPLED, **changes)
    with open_refusing(models, kind, 3, **changes) as engine:
        assert not engine.plan.placement.pageable
        with layer_fault(engine, 2, lambda: len(engine.plan.placement.resident) > 1):
            assert engine.generate(PROMPT, **SAMPLED).token_ids == expected
        plan = engine.plan
        assert plan.placement == engine.loop._stream.placement and len(plan.placement.pageable) == 1 + RING_BUFFERS
        assert engine.memory().host_weights_bytes == sum(plan.host_ledger.values())
        assert plan.notes[-2].startswith("out of device memory: 1 resident layer, not 2")
        assert plan.notes[-1].startswith("3 of 4 streamed layers could not be pinned and are moved into a ring at ")
        assert engine.generate(PROMPT, **SAMPLED).token_ids == expected


def test_layers_that_went_to_disk_for_a_ring_stay_there_when_the_pass_fails_once_more(models: Models) -> None:
    """In one round, one layer leaves and takes a ring, for which two more go to disk; so the next one goes there, too."""
    changes: dict[str, Any] = {"draft_models": (), "tree": "none", "resident_layers": 2}
    expected = text(models, PROMPT, SAMPLED, **changes)
    with open_tiny(models, **changes) as engine:
        layer_bytes = engine.loop._stream.slot_bytes
    with open_refusing(models, "late", 3, **changes, host_memory_bytes=5 * layer_bytes) as engine:
        with layer_fault(engine, 2, lambda: bool(engine.plan.placement.resident)) as failed:
            assert engine.generate(PROMPT, **SAMPLED).token_ids == expected
        plan = engine.plan
        assert len(failed) == 2 and len(plan.placement.disk) == 3 and plan.placement == engine.loop._stream.placement
        assert engine.memory().host_weights_bytes == sum(plan.host_ledger.values()) == 4 * layer_bytes
        assert "2 more stay on disk" in plan.notes[-2] and plan.notes[-1].startswith("out of device memory: 0 resident layers")


@pytest.mark.parametrize("budget_layers", [6, 100])
def test_the_loading_bar_ends_full_where_a_ring_sent_layers_to_disk(models: Models, budget_layers: int) -> None:
    """Once it ended two layers short."""
    with open_tiny(models, resident_layers=0) as engine:
        layer_bytes = engine.loop._stream.slot_bytes
    device, read = REFUSING["cpu"](), [(0, 1)]
    device.room_bytes = 2 * layer_bytes
    changes = {"resident_layers": 0, "host_memory_bytes": budget_layers * layer_bytes}
    with open_tiny(models, device, SLOW_LINK, lambda *done: read.append(done), **changes) as engine:
        assert len(engine.plan.placement.disk) == (RING_BUFFERS if budget_layers == 6 else 0)
    assert read[-1][0] == read[-1][1]


def test_a_ring_takes_no_more_host_memory_than_the_budget(models: Models) -> None:
    with open_tiny(models, resident_layers=0) as engine:
        expected = engine.generate(PROMPT, **SAMPLED).token_ids
        layer_bytes = engine.loop._stream.slot_bytes
    changes: dict[str, Any] = {"resident_layers": 0, "host_memory_bytes": 6 * layer_bytes}
    for room_layers in (0, 2, 4):
        with open_refusing(models, "late", room_layers, **changes) as engine:
            plan = engine.plan
            assert engine.generate(PROMPT, **SAMPLED).token_ids == expected
            assert len(plan.placement.disk) == 2 and "2 more stay on disk, as the host has no room for a ring" in plan.notes[0]
            assert engine.memory().host_weights_bytes == sum(plan.host_ledger.values()) == 5 * layer_bytes


def test_host_memory_that_is_refused_or_gone_goes_to_disk_with_a_warning(
    models: Models, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"resident_layers": 0, "host_memory_bytes": 2**30}
    expected = text(models, PROMPT, SAMPLED, **changes)
    with open_tiny(models, **changes) as engine:
        layer_bytes, device_bytes = engine.loop._stream.slot_bytes, sum(engine.plan.device_ledger.values())
    with open_tiny(models, FullHostDevice(4 * layer_bytes), **changes) as engine:
        assert len(engine.plan.placement.disk) == NUM_LAYERS
        assert engine.memory().host_weights_bytes == RING_BUFFERS * layer_bytes
        assert engine.generate(PROMPT, **SAMPLED).token_ids == expected
        assert engine.plan.notes[-1].startswith("less host memory than planned: 0 layers resident, 0 in host memory, 5 on disk")
        assert f"refused {5 * layer_bytes} bytes: {engine.plan.notes[-1]}" in caplog.text
    monkeypatch.setattr("offload.engine.loading.HOST_RESERVE_BYTES", 0)
    monkeypatch.setattr("offload.engine.loading.available_bytes", lambda: device_bytes + 4 * layer_bytes)
    for host_memory in (None, 2**30):
        with open_tiny(models, **{**changes, "host_memory_bytes": host_memory}) as engine:
            plan = engine.plan
            planned_bytes = sum(plan.host_ledger.values()) + sum(plan.device_ledger.values())
            assert planned_bytes <= device_bytes + 4 * layer_bytes and plan.notes
            assert plan.placement.disk or host_memory is None
            assert engine.generate(PROMPT, **SAMPLED).token_ids == expected


def test_a_host_without_room_for_the_ring_is_refused_once_and_for_all(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {"host_memory_bytes": 2**30}
    with open_tiny(models, **changes) as engine:
        layer_bytes, device_bytes = engine.loop._stream.slot_bytes, sum(engine.plan.device_ledger.values())
    with pytest.raises(FitError, match="refused") as refused, open_tiny(models, FullHostDevice(layer_bytes), **changes):
        pass
    assert len(str(refused.value).splitlines()) == 3
    monkeypatch.setattr("offload.engine.loading.HOST_RESERVE_BYTES", 0)
    monkeypatch.setattr("offload.engine.loading.available_bytes", lambda: device_bytes + layer_bytes)
    with pytest.raises(FitError, match="a ring of 2 layers") as caught, open_tiny(models, **changes):
        pass
    assert caught.value.exit_code == 4 and len(str(caught.value).splitlines()) == 3
