"""Trees that follow the text, and go on growing while a pass runs: the text is that of plain decoding, and a seed repeats it,
whatever device it is, wherever layers lie, whoever else is in the pass, and whatever runs out of memory."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fakes import DEVICES, RecordingDevice, layer_fault
from offload import assemble
from offload.assemble import open_engine
from offload.config import EngineSettings
from offload.device.cpu import CpuDevice
from offload.engine.engine import Engine
from offload.model.causal_lm import CausalLM
from offload.planner.plan import plan_run
from offload.report.report import Report
from planning import L40
from test_offload_rope import KINDS, NATIVE, SHORT
from test_offload_side_by_side import alone, requests, together
from tree.context import TreeContext

Models = Callable[..., Path]
PROMPT = [5, 9, 33, 2, 71]


class AwayDevice(CpuDevice):
    """Looks as if what is issued were computed later: steps come behind the pass."""

    name, at_once = "away", False


KINDS_OF_DEVICES = {**DEVICES, "recording": RecordingDevice, "away": AwayDevice}


@contextmanager
def open_growing(
    target: Path,
    draft: Path | None = None,
    kind: str = "cpu",
    *,
    ahead_steps: int = 3,
    **changes: Any,
) -> Iterator[Engine]:
    """Dynamic trees of at most 12 nodes. The draft is the target itself, unless it is another."""
    ahead = {"ahead_steps": ahead_steps, "ahead_rows": 24}
    settings = EngineSettings(
        model=str(target),
        draft_models=(str(draft or target),),
        device="cpu",
        fixed_plan=True,
        **{"tree": "12:dynamic", "dtype": "float32", "resident_layers": 1, "slots": 2, **changes},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assemble, "plan_run", lambda *args, **names: replace(plan_run(*args, **names), **ahead))
        engine = open_engine(settings, device=KINDS_OF_DEVICES[kind](), hardware=L40)
    with engine:
        yield engine


def plain(target: Path, num_tokens: int, prompt: list[int] = PROMPT, **changes: Any) -> tuple[int, ...]:
    """Without any tree, greedily."""
    settings = EngineSettings(model=str(target), device="cpu", **{"tree": "none", "dtype": "float32", **changes})
    with open_engine(settings, hardware=L40) as engine:
        return engine.generate(prompt, max_new_tokens=num_tokens, ignore_eos=True).token_ids


def foreseen(report: Report) -> int:
    return sum(one.foreseen_nodes for one in report.stats.passes)


@pytest.mark.matrix
@pytest.mark.parametrize("kind", sorted(KINDS_OF_DEVICES))
@pytest.mark.parametrize("draft", ["perfect", pytest.param("random", marks=pytest.mark.slow)])
def test_greedy_text_is_that_of_plain_decoding(models: Models, kind: str, draft: str) -> None:
    target = models(num_layers=3)
    expected, other = plain(target, 40), models(num_layers=1, seed=1)
    for resident_layers in (0, 3):
        with open_growing(target, other if draft == "random" else None, kind, resident_layers=resident_layers) as engine:
            report = engine.generate(PROMPT, max_new_tokens=40, ignore_eos=True)
            assert report.token_ids == expected
            assert sum(one.ahead_nodes for one in report.stats.passes) > 0
            assert any(one.ahead_s > 0 for one in report.stats.passes) is (
                resident_layers == 0 and kind != "away"
            )  # between layers that are waited for
            assert all(0 < one.compute_s <= one.pass_s and (one.ahead_s > 0 or not one.late_s) for one in report.stats.passes)
            assert foreseen(report) > 0 or draft == "random"


@pytest.mark.slow
def test_a_seed_repeats_a_text_wherever_layers_lie_and_whatever_the_device(models: Models) -> None:
    target, texts, numbers = models(num_layers=3), set(), set()
    for kind, resident_layers in [("cpu", 0), ("recording", 2), ("late", 1), ("eager", 1), ("away", 3)]:
        with open_growing(target, None, kind, resident_layers=resident_layers, dtype="float64") as engine:
            for _ in range(2):
                engine.forget()
                report = engine.generate(PROMPT, max_new_tokens=30, temperature=0.2, seed=3, ignore_eos=True)
                texts.add(report.token_ids)
                numbers.add((foreseen(report), report.stats.wasted_nodes, tuple(one.num_nodes for one in report.stats.passes)))
    assert len(texts) == len(numbers) == 1 and foreseen(report) > 0


def test_a_text_that_comes_back_to_a_place_goes_on_with_what_it_has_grown_ahead(models: Models) -> None:
    """A seed repeats a text, whoever else was answered in the meantime."""
    asked: list[dict[str, Any]] = [
        {"prompt": [*PROMPT, number], "max_new_tokens": 20, "temperature": 0.4, "seed": number, "ignore_eos": True}
        for number in range(3)
    ]
    with open_growing(models(num_layers=3), dtype="float64", max_sequences=1) as engine:
        expected = alone(engine, asked)
        engine.forget()
        streams = [engine.stream(**request) for request in asked]
        while any([next(stream, None) is not None for stream in streams]):
            pass
        assert [stream.result().token_ids for stream in streams] == expected
        assert all(foreseen(stream.result()) > 0 for stream in streams)


def test_texts_of_one_pass_are_those_of_each_alone(models: Models) -> None:
    target = models(num_layers=3)
    for greedy in (True, False):
        asked = [{**request, "prompt": [*PROMPT, number]} for number, request in enumerate(requests(4, greedy=greedy))]
        with open_growing(target, max_sequences=4, dtype="float64") as engine:
            expected = alone(engine, asked)
            assert together(engine.loop, asked)[0] == expected


def test_a_conversation_goes_on_and_layers_may_lie_on_disk(models: Models) -> None:
    target = models(num_layers=4)
    expected = plain(target, 40)
    with open_growing(target) as engine:
        layer_bytes = engine.loop._stream.slot_bytes
    for host_layers in (8, 2):
        with open_growing(target, resident_layers=0, host_memory_bytes=host_layers * layer_bytes) as engine:
            assert bool(engine.plan.placement.disk) is (host_layers == 2)
            first = engine.generate(PROMPT, max_new_tokens=20, ignore_eos=True)
            engine.generate([7] * 40, max_new_tokens=9, ignore_eos=True)
            second = engine.generate([*PROMPT, *first.token_ids], max_new_tokens=20, ignore_eos=True)
            assert (*first.token_ids, *second.token_ids) == expected
            assert foreseen(first) + foreseen(second) > 0


@pytest.mark.parametrize("fail_at", [0, 3])
def test_layers_may_be_given_up_while_drafts_grow_ahead(models: Models, fail_at: int) -> None:
    target = models(num_layers=4)
    expected = plain(target, 30)
    with open_growing(target, resident_layers=4, slots=2, gpu_memory_bytes=2**30) as engine:
        num_passes = itertools.count()
        with layer_fault(engine, 3, lambda: len(engine.plan.placement.resident) == 4 and next(num_passes) >= fail_at):
            report = engine.generate(PROMPT, max_new_tokens=30, ignore_eos=True)
        assert len(engine.plan.placement.resident) < 4 and engine.plan.ahead_steps == 3
        assert report.token_ids == expected and foreseen(report) > 0


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["cpu", "away", "recording"])
@pytest.mark.parametrize("fail_at", [1, 7, 20])
def test_an_error_of_memory_ends_growing_ahead_and_nothing_else(
    models: Models, kind: str, fail_at: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes in the middle of the model's pass."""
    target, calls = models(num_layers=3), itertools.count(1)
    expected, grow_ahead = plain(target, 40), TreeContext.grow_ahead

    def failing(context: TreeContext) -> int:
        with monkeypatch.context() as patch:
            if next(calls) == fail_at:
                patch.setattr(CausalLM, "inputs", fail)
            return grow_ahead(context)

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("Out of memory. Tried to allocate 2.00 MiB.\nmore lines")

    monkeypatch.setattr(TreeContext, "grow_ahead", failing)
    with open_growing(target, None, kind) as engine:
        for _ in range(2):
            engine.forget()
            assert engine.generate(PROMPT, max_new_tokens=40, ignore_eos=True).token_ids == expected
        assert engine.plan.ahead_steps == 0 and next(calls) <= fail_at + 3
        assert sum("do not grow ahead any more" in note for note in engine.plan.notes) == 1
    assert sum("do not grow ahead any more" in record.message for record in caplog.records) == 1


def test_ctrl_c_while_a_draft_grows_ahead_leaves_the_engine_usable(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    target, calls = models(num_layers=3), itertools.count(1)
    expected, grow_ahead = plain(target, 30), TreeContext.grow_ahead

    def interrupted(context: TreeContext) -> int:
        if next(calls) == 8:
            raise KeyboardInterrupt
        return grow_ahead(context)

    monkeypatch.setattr(TreeContext, "grow_ahead", interrupted)
    with open_growing(target) as engine:
        stream = engine.stream(PROMPT, max_new_tokens=30, ignore_eos=True)
        with pytest.raises(KeyboardInterrupt):
            list(stream)
        assert stream.token_ids == list(expected[: len(stream.token_ids)])
        assert engine.generate(PROMPT, max_new_tokens=30, ignore_eos=True).token_ids == expected


def test_a_text_goes_on_to_the_last_row(models: Models) -> None:
    target = models(num_layers=2)
    with open_growing(target, max_context=64, ahead_steps=9) as engine:
        num_tokens = engine.plan.text_tokens - len(PROMPT)
        report = engine.generate(PROMPT, max_new_tokens=num_tokens, ignore_eos=True)
        assert report.token_ids == plain(target, num_tokens) and foreseen(report) > 0


@pytest.mark.matrix
@pytest.mark.parametrize("family", sorted(KINDS))
def test_where_frequencies_change_nothing_is_kept(models: Models, family: str) -> None:
    target, prompt = models(**KINDS[family]), [3 + 7 * position % 89 for position in range(SHORT)]
    expected = plain(target, NATIVE + 20, prompt)
    for kind in ("cpu", "recording"):
        with open_growing(target, None, kind) as engine:
            report = engine.generate(prompt, max_new_tokens=NATIVE + 20, ignore_eos=True)
            assert report.token_ids == expected and foreseen(report) > 0
