"""The engine end to end: greedy text equals transformers' for every way of streaming and every tree; limits are exact."""

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import EOS, FAMILIES, VOCAB_SIZE, reference_model
from fakes import DEVICES, CountingDevice
from offload.assemble import open_engine
from offload.calibrate import QUICK, Subject, measure_hardware
from offload.config import EngineSettings
from offload.demo import DRAFT, TARGET
from offload.device import Device
from offload.engine.decode import DecodeLoop
from offload.engine.engine import Engine
from offload.engine.sessions import Sessions
from offload.errors import UsageError
from offload.model.drafter import ModelDrafter
from offload.planner.hardware import Role
from offload.planner.tree_flag import resolve_method
from offload.report.report import Report
from offload.source import check_source
from planning import L40
from tree.shape import TreeShape

Models = Callable[..., Path]
PROMPT = [5, 9, 33, 2, 71]
NUM_TOKENS = 14  # three passes of the deepest tree below when all is accepted, up to fourteen when nothing is
# (tree, resident layers of 3, slots): every tree, and every residency with two slot counts
RUNS = (("none", 0, 2), ("1x5:kary", 0, 3), ("6x1:kary", 1, 2), ("4x6:kary", 0, 2), ("4x6:kary", 2, 3), ("4x6:kary", 3, 2))
RUNS_WITHOUT_DRAFT = (("none", 0, 2), ("none", 1, 3), ("none", 3, 2))


def open_tiny(folder: Path, draft: Path | None, device: Device | None = None, **changes: object) -> Engine:
    settings: dict[str, Any] = {"tree": "4x6:kary" if draft else "none", **changes}
    settings = {"model": str(folder), "draft_models": (str(draft),) if draft else (), "device": "cpu", **settings}
    return open_engine(EngineSettings(**settings), device=device, hardware=L40)


def greedy(folder: Path, prompt: list[int], num_tokens: int) -> list[int]:
    output = reference_model(folder).generate(torch.tensor([prompt]), max_new_tokens=num_tokens, do_sample=False)
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("family", "draft"),
    [
        pytest.param(family, draft, marks=() if family == "llama" or draft == "none" else pytest.mark.slow)
        for family in FAMILIES
        for draft in ("random", "perfect", "none")
    ],
)
def test_greedy_text_is_that_of_transformers(models: Models, family: str, draft: str) -> None:
    folder = models(family)
    drafts = {"random": models(family, num_layers=1, seed=1), "perfect": folder, "none": None}
    expected = greedy(folder, PROMPT, NUM_TOKENS)
    for tree, resident, slots in RUNS if draft != "none" else RUNS_WITHOUT_DRAFT:
        with open_tiny(folder, drafts[draft], tree=tree, resident_layers=resident, slots=slots) as engine:
            report = engine.generate(PROMPT, max_new_tokens=NUM_TOKENS)
            tokens_when_all_right = engine.plan.tree.num_levels
        assert list(report.token_ids) == expected, (tree, resident, slots)
        assert sum(one.emitted_tokens for one in report.stats.passes) >= len(report.token_ids)
        if draft == "perfect":
            assert len(report.stats.passes) == -(-len(expected) // tokens_when_all_right)


@pytest.mark.slow
def test_greedy_text_of_optimal_trees_is_that_of_plain_decoding() -> None:
    """The trained pair, in float32: a tree takes several tokens a pass, and not one that plain decoding does not."""
    prompt = "The state of our finances is"
    request: dict[str, Any] = {"max_new_tokens": 32, "ignore_eos": True}
    with open_tiny(TARGET, None, dtype="float32") as engine:
        expected = engine.generate(prompt, **request).token_ids
    for num_nodes, num_levels in ((16, 6), (64, 10), (256, 14), (768, 18)):
        with open_tiny(TARGET, DRAFT, dtype="float32", tree=f"{num_nodes}x{num_levels}", resident_layers=2) as engine:
            assert engine.plan.tree.num_nodes == num_nodes
            report = engine.generate(prompt, **request)
        assert report.token_ids == expected, num_nodes
        assert len(report.stats.passes) < 16


@pytest.mark.matrix
@pytest.mark.parametrize("num_layers", [1, 2, 5])
def test_any_number_of_layers_streams(models: Models, num_layers: int) -> None:
    folder = models(num_layers=num_layers)
    expected = greedy(folder, PROMPT, 12)
    for resident in sorted({0, num_layers // 2, num_layers}):
        for slots in (1, 2, 3) if resident < num_layers else (2,):
            with open_tiny(folder, folder, tree="2x3:kary", resident_layers=resident, slots=slots) as engine:
                assert list(engine.generate(PROMPT, max_new_tokens=12).token_ids) == expected


def logits_of_a_run(engine: Engine) -> list[torch.Tensor]:
    rows, forward = list[torch.Tensor](), engine.loop._target.forward

    def kept(*arguments: Any, **others: Any) -> Any:
        outputs = forward(*arguments, **others)
        rows.extend(output.logits for output in outputs)
        return outputs

    engine.loop._target.forward = kept  # type: ignore[method-assign]
    engine.generate(PROMPT, max_new_tokens=20, ignore_eos=True)
    assert len(rows) > 2
    return rows


@pytest.mark.parametrize("kind", [kind if kind == "late" else pytest.param(kind, marks=pytest.mark.slow) for kind in DEVICES])
def test_streamed_logits_are_bit_equal_to_resident_ones(models: Models, kind: str) -> None:
    folder = models(num_layers=5)
    logits = {}
    for resident, slots in [(5, 2), *((resident, slots) for resident in range(5) for slots in (2, 3))]:
        with open_tiny(folder, folder, DEVICES[kind](), tree="3x2:kary", resident_layers=resident, slots=slots) as engine:
            logits[resident, slots] = torch.cat(logits_of_a_run(engine))
    for key, rows_of_run in logits.items():
        assert torch.equal(rows_of_run, logits[5, 2]), key


def test_layers_on_disk_give_the_same_tokens(models: Models) -> None:
    folder = models(num_layers=5)
    expected = greedy(folder, PROMPT, 20)
    with open_tiny(folder, folder) as engine:
        layer_bytes = engine.plan.device_ledger["5 resident layers"] // 5
    for host_layers in (2, 3, 4):
        with open_tiny(folder, folder, resident_layers=0, slots=2, host_memory_bytes=host_layers * layer_bytes) as engine:
            report = engine.generate(PROMPT, max_new_tokens=20)
            document: Any = report.to_json()
            assert document["streaming"]["disk_layers"] == 5 - (host_layers - 2)
            assert document["memory"]["host_weights_bytes"] <= host_layers * layer_bytes
            assert list(report.token_ids) == expected


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_weights_are_converted_only_to_the_dtype_asked_for(models: Models, tmp_path: Path, dtype: str) -> None:
    """A bfloat16 checkpoint with tied embeddings, as the demo pair is, computed in another dtype."""
    wide = AutoModelForCausalLM.from_pretrained(models(tie_word_embeddings=True), dtype=torch.bfloat16)
    wide.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=getattr(torch, dtype)).eval()
    expected = model.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False)[0, len(PROMPT) :].tolist()
    with open_tiny(tmp_path, None, tree="none", dtype=dtype, resident_layers=1) as engine:
        assert list(engine.generate(PROMPT, max_new_tokens=12).token_ids) == expected
        assert engine.loop._target._model.lm_head.weight is engine.loop._target._model.model.embed_tokens.weight


def test_a_draft_with_a_padded_vocabulary_is_cut_or_filled(models: Models) -> None:
    """Families pad one vocabulary differently; without tokenizers to compare, equal sizes are asked for elsewhere."""
    folder = models()
    expected = greedy(folder, PROMPT, 12)
    for vocab_size in (90, 104):
        draft = models(num_layers=1, seed=1, vocab_size=vocab_size)
        with open_tiny(folder, folder) as engine, open_tiny(draft, None, tree="none", max_context=150) as other:
            loop, plan = engine.loop, engine.plan
            parts = other.loop._target, loop._device, VOCAB_SIZE, plan.aim, plan.pass_rows
            drafter = ModelDrafter(*parts, max_nodes=plan.room_nodes)
            sessions = Sessions([loop._target.cache, drafter.cache], max_bytes=0)
            for verifier in ("traversal", "rejection", "sample"):
                others = loop._device, loop._target, loop._stream, drafter, sessions, plan
                engine.loop = DecodeLoop(*others, method=resolve_method(verifier))
                engine.forget()
                assert list(engine.generate(PROMPT, max_new_tokens=12).token_ids) == expected
                tokens = engine.generate(PROMPT, max_new_tokens=12, temperature=1.0, ignore_eos=True).token_ids
                assert len(tokens) == 12


def test_long_prompts_are_chunked_without_changing_the_text(models: Models) -> None:
    folder = models()
    prompt = [(7 * i + 3) % EOS for i in range(90)]
    expected = greedy(folder, prompt, 10)
    for pass_rows in (26, 40, 200):
        with open_tiny(folder, folder) as engine:
            plan = engine.loop._plan
            engine.loop._plan = type(plan)(**{**{f: getattr(plan, f) for f in plan.__slots__}, "pass_rows": pass_rows})
            assert list(engine.generate(prompt, max_new_tokens=10).token_ids) == expected


def test_an_engine_serves_calls_one_after_another_each_from_its_own_prompt(models: Models) -> None:
    folder = models()
    with open_tiny(folder, models(num_layers=1, seed=1)) as engine:
        first = engine.generate(PROMPT, max_new_tokens=15).token_ids
        abandoned = engine.stream([1, 2, 3], max_new_tokens=30)
        next(abandoned)
        other = engine.generate([4, 4], max_new_tokens=15).token_ids
        assert engine.generate(PROMPT, max_new_tokens=15).token_ids == first
        assert list(other) == greedy(folder, [4, 4], 15)
        assert [*abandoned] and abandoned.token_ids == greedy(folder, [1, 2, 3], 30)
        assert engine.generate(PROMPT, max_new_tokens=15).token_ids == first


def test_an_exception_in_a_layer_reaches_the_caller_and_the_engine_goes_on(models: Models) -> None:
    folder = models()
    with open_tiny(folder, folder, resident_layers=1, slots=2) as engine:
        expected = engine.generate(PROMPT, max_new_tokens=9).token_ids
        layers = list(engine.loop._target._model.get_submodule("model.layers").children())
        for layer in layers:
            hook = layer.register_forward_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                engine.generate(PROMPT, max_new_tokens=9)
            hook.remove()
            assert engine.generate(PROMPT, max_new_tokens=9).token_ids == expected


# -- ends ---------------------------------------------------------------------------------------------------------------


def run_tiny(models: Models, **request: Any) -> Report:
    folder = models()
    with open_tiny(folder, folder) as engine:
        return engine.generate(PROMPT, **request)


def test_every_length_is_met_exactly(models: Models) -> None:
    whole = run_tiny(models, max_new_tokens=20, ignore_eos=True).token_ids
    folder = models()
    with open_tiny(folder, folder) as engine:
        for count in range(1, 21):
            report = engine.generate(PROMPT, max_new_tokens=count, ignore_eos=True)
            assert report.token_ids == whole[:count] and report.finish_reason == "length"


def test_any_eos_id_ends_the_text_in_the_middle_of_an_accepted_path(models: Models) -> None:
    folder = models()
    with open_tiny(folder, folder) as engine:
        whole = engine.generate(PROMPT, max_new_tokens=14, ignore_eos=True).token_ids
        for position, token_id in enumerate(whole):
            engine.eos_token_ids = frozenset({token_id, VOCAB_SIZE + 1})
            report = engine.generate(PROMPT, max_new_tokens=14)
            assert report.finish_reason == "eos"
            assert report.token_ids == whole[: whole.index(token_id) + 1] and len(report.token_ids) <= position + 1


def test_context_is_used_to_its_last_row(models: Models) -> None:
    folder = models()
    shape = TreeShape.chains(4, 6)
    with open_tiny(folder, folder, max_context=64) as engine:
        room = 64 - (shape.num_nodes - 1) - len(PROMPT)
        report = engine.generate(PROMPT, max_new_tokens=room, ignore_eos=True)
        assert len(report.token_ids) == room


@pytest.mark.matrix
@pytest.mark.parametrize("verifier", ["sample", "traversal", "rejection"])
def test_same_seed_gives_the_same_tokens_and_another_seed_others(models: Models, verifier: str) -> None:
    folder = models()
    draft = models(num_layers=1, seed=1)
    request: dict[str, Any] = {"max_new_tokens": 20, "temperature": 1.0, "ignore_eos": True}
    with open_tiny(folder, draft, verifier=verifier, resident_layers=0) as engine:
        first = engine.generate(PROMPT, seed=1, **request).token_ids
        other = engine.generate(PROMPT, seed=2, **request).token_ids
        assert engine.generate(PROMPT, seed=1, **request).token_ids == first != other
    with open_tiny(folder, draft, verifier=verifier, resident_layers=2, slots=3) as engine:
        assert engine.generate(PROMPT, seed=1, **request).token_ids == first


def test_the_prompt_and_the_first_tree_share_one_pass(models: Models) -> None:
    folder = models()
    with open_tiny(folder, folder, resident_layers=0) as engine:
        report = engine.generate(PROMPT, max_new_tokens=7, ignore_eos=True)
        assert len(report.stats.passes) == 1
        assert report.stats.passes[0].num_rows == len(PROMPT) - 1 + engine.plan.tree.num_nodes
        assert report.stats.passes[0].bytes_streamed == engine.plan.bytes_per_pass


@pytest.mark.parametrize("tree", ["4x3:kary", "none", "12:dynamic"])
def test_what_is_closed_holds_no_memory_and_needs_no_garbage_collector(models: Models, tree: str) -> None:
    """The collector knows nothing of GiB on a device: the next engine of a benchmark found the last one's still there. A
    text that was broken off or gave its place up, and whoever keeps engine and answers, make no difference."""
    folder, device = models(), CountingDevice()
    with no_garbage_collector():
        engine = open_tiny(folder, folder if tree != "none" else None, device, tree=tree, resident_layers=1, slots=2)
        answer = engine.stream(PROMPT, max_new_tokens=40, ignore_eos=True)
        other = engine.stream(PROMPT, max_new_tokens=40, temperature=1.0, seed=1, ignore_eos=True)
        next(other), next(answer), next(answer)
        assert device.held_bytes >= sum(engine.plan.host_ledger.values())
        engine.close()
        assert device.held_bytes == 0, (answer, other)


@pytest.mark.matrix
@pytest.mark.parametrize("role", ["target", "draft"])
def test_what_measuring_takes_is_gone_before_the_run(models: Models, role: Role) -> None:
    device, model = CountingDevice(), check_source(str(models()), "--model", "float32", "cpu").model
    with no_garbage_collector():
        measure_hardware(device, [Subject(role=role, model=model)], replace(QUICK, rows=(1, 4), contexts=(8,), repeats=1))
        device.close()  # its thread knows the last copy
        assert device.held_bytes == 0


def test_a_cpu_has_no_more_device_memory_than_the_host_has(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the flag says, or layers would be planned for memory that is not there."""
    folder = models(num_layers=8)
    with open_tiny(folder, None, gpu_memory_bytes=2**40) as engine:
        ledger = engine.plan.device_ledger
        host_bytes = sum(ledger.values()) - ledger["activations"] - ledger["8 resident layers"] // 8
    monkeypatch.setattr("offload.assemble.HOST_RESERVE_BYTES", 0)
    monkeypatch.setattr("offload.assemble.available_bytes", lambda: host_bytes)
    with open_tiny(folder, None, gpu_memory_bytes=2**40) as engine:
        assert engine.plan.placement.disk and sum(engine.plan.device_ledger.values()) <= host_bytes


def test_device_memory_in_the_closing_line_is_a_plain_number(models: Models) -> None:
    with open_tiny(models(), None) as engine:
        report = engine.generate([5, 9, 33], max_new_tokens=2)
    sizes = {50_000: "0.0000", 300_000: "0.0003", 19_000_000: "0.0177", 2**29: "0.50", 23_730_000_000: "22.1", 2**40: "1024.0"}
    for num_bytes, expected in sizes.items():
        line = replace(report, memory=replace(report.memory, device_peak_bytes=num_bytes)).line()
        assert f"| device {expected} GiB" in line


@contextmanager
def no_garbage_collector() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_values_of_numpy_and_torch_are_numbers_and_one_stop_string_is_one(models: Models) -> None:
    with open_tiny(models(), None) as engine:
        result = engine.generate(torch.tensor([5, 9, 33]), max_new_tokens=4, seed=1)  # type: ignore[arg-type]
        assert json.loads(json.dumps(result.to_json()))["prompt_token_ids"] == [5, 9, 33]
        assert engine.generate([5, 9, 33], max_new_tokens=4).token_ids == result.token_ids
    with open_tiny(TARGET, DRAFT, tree="4x2:kary") as engine:
        text = engine.generate("The people", max_new_tokens=8).text
        assert text is not None
        assert engine.generate("The people", max_new_tokens=8, stop=text[3:6]).text == text[: text.find(text[3:6])]


@pytest.mark.parametrize(
    ("prompt", "values", "said"),
    [
        ([1.5], {}, "not a whole number: 1.5"),
        (["5"], {}, "not a whole number: '5'"),
        (torch.tensor([1.5]), {}, "not a whole number"),
        (None, {}, "text or token ids, not NoneType"),
        (b"text", {}, "text or token ids, not bytes"),
        ({"role": "user"}, {}, "text or token ids, not dict"),
        ([{"role": "user", "content": "hi"}], {}, "not a list of messages"),
        ([5], {"max_new_tokens": 2.5}, "not a whole number: 2.5"),
        ([5], {"seed": 0.5}, "not a whole number: 0.5"),
        ([5], {"temperature": "warm"}, "not a number: 'warm'"),
        ([5], {"temperature": None}, "not a number: None"),
        ([5], {"top_p": [1]}, r"not a number: \[1\]"),
        ([5], {"top_k": "all" * 50}, "not a whole number: 'allall.*\\.\\.\\."),
        ([5], {"top_k": -2}, "top_k"),
        ([5], {"stop": 5}, "not a text: 5"),
        ([5], {"stop": ["a", 5]}, "not a text: 5"),
    ],
    ids=str,
)
def test_values_of_another_kind_are_refused_before_anything_runs(
    models: Models, prompt: Any, values: dict[str, Any], said: str
) -> None:
    with open_tiny(models(), None) as engine, pytest.raises(UsageError, match=said):
        engine.generate(prompt, **values)


def test_values_by_which_others_say_off_ask_for_nothing(models: Models) -> None:
    sampled: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.0, "seed": 3}
    with open_tiny(models(), None) as engine:
        expected = engine.generate(PROMPT, **sampled).token_ids
        assert expected != engine.generate(PROMPT, **sampled, top_k=1).token_ids
        for values in ({"top_k": 0}, {"top_k": -1}, {"stop": ""}, {"stop": [""]}, {"stop": None}):
            assert engine.generate(PROMPT, **sampled, **values).token_ids == expected, values


def test_a_closed_engine_says_so(models: Models) -> None:
    with open_tiny(models(), None) as engine:
        pass
    with pytest.raises(UsageError, match="closed"):
        engine.generate([5], max_new_tokens=2)
