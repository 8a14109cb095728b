"""Texts that outgrow the length a model was trained on: token for token what transformers writes, whatever passes, trees and
earlier texts there were. A new reference model for every text, as transformers' own remembers the longest it has seen."""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version
from transformers import AutoConfig

from conftest import reference_model
from drafters import model_of, open_drafters, run_round, start_all
from fakes import RecordingDevice
from offload.assemble import open_engine
from offload.config import EngineSettings
from offload.device import Device
from offload.device.cpu import CpuDevice
from offload.engine.engine import Engine
from offload.errors import ModelError
from offload.model.architecture import architecture_of
from offload.model.rope import Kind, Rope, read_rope
from planning import L40
from shapes import from_widths
from small_models import open_model, text_part
from tree.logprobs import Scoring

Models = Callable[..., Path]
NATIVE = 24
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 4.0, 7.0, 10.0],
    "factor": 4.0,
    "original_max_position_embeddings": NATIVE,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
KINDS: dict[str, dict[str, Any]] = {
    "longrope": {"family": "llama", "rope_parameters": LONGROPE},
    "phi3": {"family": "phi3", "rope_parameters": LONGROPE, "original_max_position_embeddings": NATIVE},
    "dynamic": {"family": "llama", "rope_parameters": DYNAMIC, "max_position_embeddings": NATIVE},
}
SHORT, LONG = NATIVE - 10, NATIVE + 10  # tokens of a prompt that crosses while it is answered, and of one that begins beyond


def prompt_of(num_tokens: int) -> list[int]:
    return [3 + 7 * position % 89 for position in range(num_tokens)]


def greedy(folder: Path, prompt: list[int], num_new: int) -> list[int]:
    """Where Phi-3 drops its cache, releases before 5.20 go on from the last token alone. Without a cache they are right, too:
    then all is computed anew at every token."""
    model = reference_model(folder)
    use_cache = model.config.model_type != "phi3" or Version(version("transformers")) >= Version("5.20")
    options: dict[str, Any] = {"do_sample": False, "use_cache": use_cache, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        output = model.generate(torch.tensor([prompt]), max_new_tokens=num_new, **options)
    return output[0, len(prompt) :].tolist()


def open_pair(folder: Path, tree: str, device: Device | None = None) -> Engine:
    drafts = () if tree == "none" else (str(folder),)
    sizes: dict[str, Any] = {"device": "cpu", "tree": tree, "resident_layers": 1, "slots": 2}
    settings = EngineSettings(model=str(folder), draft_models=drafts, **sizes)
    return open_engine(settings, hardware=L40, device=device)


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, models: Models) -> Path:
    return models(**KINDS[request.param])


@pytest.mark.matrix
@pytest.mark.parametrize("tree", ["none", "4x4:kary"])
@pytest.mark.parametrize("num_prompt", [SHORT, NATIVE, LONG])
def test_a_text_beyond_the_native_length_is_that_of_transformers(folder: Path, tree: str, num_prompt: int) -> None:
    prompt = prompt_of(num_prompt)
    with open_pair(folder, tree) as engine:
        assert list(engine.generate(prompt, max_new_tokens=24, ignore_eos=True).token_ids) == greedy(folder, prompt, 24)


@pytest.mark.matrix
def test_what_earlier_texts_left_in_the_cache_is_taken_over_only_where_it_would_be_computed_again(folder: Path) -> None:
    """A conversation: prompts that begin with the text before them, on either side of the native length and across it."""
    with open_pair(folder, "4x4:kary") as engine:
        text: list[int] = prompt_of(6)
        for more in (6, 4, 9, 5):
            answer = list(engine.generate(text, max_new_tokens=7, ignore_eos=True).token_ids)
            assert answer == greedy(folder, text, 7), f"after {len(text)} tokens"
            text = [*text, *answer, *prompt_of(more)]
        for num_tokens in (NATIVE - 2, NATIVE + 8, 10):  # beginnings of it, of which copies may be kept
            assert list(engine.generate(text[:num_tokens], max_new_tokens=7, ignore_eos=True).token_ids) == greedy(
                folder, text[:num_tokens], 7
            )


def test_a_prompt_read_in_pieces_has_the_frequencies_of_its_whole_length(folder: Path) -> None:
    prompt = prompt_of(LONG)
    with open_pair(folder, "none") as engine:
        loop = engine.loop
        loop._plan = type(loop.plan)(
            **{**{name: getattr(loop.plan, name) for name in loop.plan.__dataclass_fields__}, "pass_rows": 8}
        )
        assert list(engine.generate(prompt, max_new_tokens=6, ignore_eos=True).token_ids) == greedy(folder, prompt, 6)


def test_passes_of_a_fixed_shape_are_recorded_and_right(folder: Path) -> None:
    device = RecordingDevice()
    prompt = prompt_of(SHORT)
    with open_pair(folder, "4x4:kary", device) as engine:
        result = engine.generate(prompt, max_new_tokens=24, ignore_eos=True)
        assert list(result.token_ids) == greedy(folder, prompt, 24)
        # The draft is the target: recorded passes that were off would be rejected.
        assert max(one.emitted_tokens for one in result.stats.passes) == 5
    assert device.num_recordings > 0


@given(
    kind=st.sampled_from(["fixed", "longrope", "dynamic"]),
    native=st.integers(1, 12),
    before=st.integers(1, 20),
    now=st.integers(1, 20),
)
def test_texts_whose_prompts_are_of_one_group_share_all_rows(kind: Kind, native: int, before: int, now: int) -> None:
    rope = Rope(kind=kind, native_tokens=native, max_positions=100)
    same = [rope.group(max(before, row + 1)) == rope.group(max(now, row + 1)) for row in range(40)]
    if rope.group(before) == rope.group(now):
        assert all(same)
    else:
        assert not same[0]


@given(native=st.integers(1, 12), num_tokens=st.integers(1, 20))
def test_a_pass_ends_where_all_rows_are_computed_anew(native: int, num_tokens: int) -> None:
    rope = Rope(kind="longrope", native_tokens=native, max_positions=100, starts_over=True)
    room = rope.room(num_tokens)
    assert room >= 1
    # The last token that a pass of `room` adds is a leaf: no row has its length, but those of the ones before it.
    lengths = range(num_tokens, num_tokens + min(room, 40))
    assert len({rope.group(length) for length in lengths}) == 1
    assert room > 40 or rope.group(num_tokens + room) != rope.group(num_tokens)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        (None, 100),
        ({"rope_type": "default"}, 100),
        ({"rope_type": "linear", "factor": 4.0}, 400),
        ({"type": "dynamic", "factor": 2.0}, 200),
        ({"rope_type": "yarn", "factor": 4.0}, 400),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 25}, 100),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 25}, 100),
        ({"type": "su", "original_max_position_embeddings": 25}, 100),
    ],
    ids=str,
)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_what_stretches_positions_may_be_used_as_far_as_it_goes(parameters: object, expected: int, key: str) -> None:
    assert read_rope({"max_position_embeddings": 100, key: parameters}).max_positions == expected


def test_a_layout_of_its_own_is_refused_before_it_writes_other_tokens() -> None:
    """Cohere turns neighbouring pairs; its longrope would be another function than ours."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1, "vocab_size": 97}
    for parameters, refused in ((None, False), (LONGROPE, True), (DYNAMIC, True)):
        changes = {"rope_parameters": parameters} if parameters else {}
        config = AutoConfig.for_model("cohere", **sizes, intermediate_size=48, pad_token_id=None, **changes)
        if refused:
            with pytest.raises(ModelError, match="laid out in a way of its own"):
                architecture_of(config, "test")
        else:
            architecture_of(config, "test")


@pytest.mark.matrix
def test_texts_that_take_turns_across_the_native_length_are_each_that_of_transformers(folder: Path) -> None:
    """Each is put aside after every pass and taken up again, with the frequencies of its own prompt."""
    prompts = [prompt_of(SHORT), prompt_of(SHORT - 4), prompt_of(LONG)]
    with open_pair(folder, "4x4:kary") as engine:
        streams = [engine.stream(prompt, max_new_tokens=20, ignore_eos=True) for prompt in prompts]
        while [stream for stream in streams if next(stream, None) is not None]:
            pass
        assert [stream.token_ids for stream in streams] == [greedy(folder, prompt, 20) for prompt in prompts]


def test_texts_of_several_lengths_share_passes_with_the_frequencies_of_each(folder: Path) -> None:
    prompts = [prompt_of(SHORT), prompt_of(SHORT - 4), prompt_of(LONG)]
    with open_model(folder, num_segments=len(prompts), segment_rows=80) as model:
        texts = dict(zip(model.cache.segments, map(list, prompts), strict=True))
        for segment, text in texts.items():
            segment.begin_text(len(text), len(text))
        for _ in range(20):
            parts = [text_part(segment, text[segment.length :], 1) for segment, text in texts.items()]
            for part, output in zip(parts, model.forward(parts), strict=True):
                text = texts[part.segment]
                part.segment.commit(range(part.num_rows))
                text.append(int(output.logits[0].argmax()))
                part.segment.grown(len(text))
        found = [text[len(prompt) :] for text, prompt in zip(texts.values(), prompts, strict=True)]
        assert found == [greedy(folder, prompt, 20) for prompt in prompts]


def test_a_draft_of_several_texts_is_recorded_with_the_frequencies_of_each(folder: Path) -> None:
    """Recorded once, replayed for each in turn, against passes that are computed as they come."""
    generator, shape = torch.Generator().manual_seed(1), from_widths((3, 2, 1))
    with open_drafters((CpuDevice, RecordingDevice), folder, rows=120, num_texts=2) as drafters:
        texts = [start_all(drafters, prompt_of(num_tokens), place) for place, num_tokens in enumerate((SHORT, LONG))]
        for _ in range(4):
            for contexts in texts:
                run_round(contexts, shape, generator)
        assert all(len(model_of(contexts[0])._token_ids) > NATIVE for contexts in texts)


def test_a_prompt_that_is_read_again_is_scored_once(folder: Path) -> None:
    prompt = prompt_of(SHORT)
    with open_pair(folder, "4x4:kary") as engine:
        request = engine.admission.request(prompt, max_new_tokens=24, ignore_eos=True, scoring=Scoring(num_top=0, prompt=True))
        steps = list(engine.run(request))
    assert [len(step.prompt_scores) for step in steps] == [len(prompt) - 1, *[0] * (len(steps) - 1)]
