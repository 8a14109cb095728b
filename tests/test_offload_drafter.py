"""A draft model as the loop uses it: trees of the planned shape or its beginning, for several texts, also after rounds that
were taken back."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import VOCAB_SIZE, reference_model
from drafters import PROMPT, expand_level, model_of, open_drafters, start_all
from fakes import CountingDevice, RecordingDevice
from offload.device import Device
from offload.device.cpu import CpuDevice
from offload.errors import FitError
from offload.model.buckets import widest_pass
from shapes import from_widths
from small_models import assert_close
from test_offload_model import expected_logits
from tree.aim import Aim
from tree.context import TreeContext
from tree.draft import Drafter, DraftTree
from tree.sampling import SamplingParams
from tree.shape import TreeShape

Models = Callable[..., Path]
DEVICES = {"eager": CpuDevice, "recorded": RecordingDevice}
SHAPE = from_widths((4, 2, 2))


@pytest.fixture(params=DEVICES)
def make(request: pytest.FixtureRequest) -> Callable[[], Device]:
    return DEVICES[request.param]


def grow(context: TreeContext, seed: int = 0, max_nodes: int = 1000, max_levels: int = 1000) -> DraftTree:
    generator = torch.Generator().manual_seed(seed)
    return context.grow(max_nodes, max_levels, SamplingParams(0.8), generator, sampled=True)


def follow(context: TreeContext, tree: DraftTree, node: int, token_id: int) -> None:
    path = tree.shape.path(node)
    context.follow(path, (*(int(tree.token_ids[one]) for one in path[1:]), token_id), None)


def assert_equal(one: DraftTree, other: DraftTree) -> None:
    assert one.shape == other.shape and one.drawn == other.drawn
    assert one.token_ids.tolist() == other.token_ids.tolist()
    if one.probabilities is not None or other.probabilities is not None:
        assert one.probabilities is not None and other.probabilities is not None
        assert_close(one.probabilities, other.probabilities, 1e-4)


def test_a_round_that_is_taken_back_leaves_no_trace(models: Models, make: Callable[[], Device]) -> None:
    """Twice, after another tree, and where nothing is left to read but the root."""
    with open_drafters((make, make), models(), shape=SHAPE) as drafters:
        drafters[0].prepare(Aim(shape=SHAPE))
        (context, plain), token_id = start_all(drafters), 7
        for node in (6, 0, 22, 1):
            grow(context, seed=5)
            grow(context, seed=6, max_levels=2)
            tree = grow(context)
            assert_equal(tree, grow(plain))
            for one in (context, plain):
                follow(one, tree, node, token_id)
            token_id += 1
        grow(context)
        drafters[0].aim(Aim(shape=SHAPE), 3)  # less memory: smaller pieces
        assert_equal(grow(context), grow(plain))


@pytest.mark.parametrize(("max_nodes", "max_levels"), [(1000, 1), (1, 1000), (9, 1000), (1000, 2), (4, 2), (14, 3)])
def test_a_tree_that_is_cut_is_the_beginning_of_the_planned_one(
    models: Models, make: Callable[[], Device], max_nodes: int, max_levels: int
) -> None:
    with open_drafters((make,), models(), shape=SHAPE) as drafters:
        (context,) = start_all(drafters)
        tree = grow(context, max_nodes=max_nodes, max_levels=max_levels)
        size = min(max_nodes, SHAPE.truncated(max_levels).num_nodes)
        assert tree.shape.parents == SHAPE.parents[:size]
        assert tree.token_ids[0] == PROMPT[-1]
        follow(context, tree, size - 1, 3)
        assert grow(context).shape == SHAPE


def test_texts_in_other_places_do_not_show(models: Models, make: Callable[[], Device]) -> None:
    prompts = [PROMPT, [8] * 30, [1, 2]]
    with open_drafters((make, make), models(), shape=SHAPE, num_texts=3) as drafters:
        for drafter in drafters:
            drafter.prepare(Aim(shape=SHAPE))
        together, alone = drafters
        contexts = [together.start(place, prompt, len(prompt)) for place, prompt in enumerate(prompts)]
        for turn in range(3):
            trees = [grow(context, turn) for context in contexts]
            for place, (context, tree) in enumerate(zip(contexts, trees, strict=True)):
                follow(context, tree, 3 * place + turn, place)
        for place, prompt in enumerate(prompts):
            alone.cache.segments[0].truncate(0)  # a text that follows another in its place
            context = alone.start(0, prompt, len(prompt))
            for turn in range(3):
                follow(context, grow(context, turn), 3 * place + turn, place)
            assert model_of(context)._token_ids == model_of(contexts[place])._token_ids
            assert_equal(grow(context), grow(contexts[place]))


@pytest.mark.parametrize("chunk_tokens", [1, 4, 64])
def test_a_prompt_is_read_in_pieces(models: Models, chunk_tokens: int) -> None:
    folder, prompt = models(), [3 + 7 * position % 89 for position in range(23)]
    with open_drafters((CpuDevice,), folder, shape=SHAPE, chunk_tokens=chunk_tokens) as drafters:
        (context,) = start_all(drafters, prompt)
        expected = expected_logits(reference_model(folder), prompt[:-1], prompt[-1:], TreeShape.root_only())
        assert_close(model_of(context).begin(), expected)
        assert model_of(context).segment.length == len(prompt)


@pytest.mark.parametrize("more", [-9, 0, 7])
def test_a_vocabulary_that_is_padded_otherwise_is_cut_or_never_proposed(
    models: Models, make: Callable[[], Device], more: int
) -> None:
    folder, prompt = models(), [5, 9, VOCAB_SIZE + more - 1]
    with open_drafters((make,), folder, shape=SHAPE, vocab_size=VOCAB_SIZE + more) as drafters:
        (context,) = start_all(drafters, prompt)
        logits = model_of(context).begin()
        assert logits.shape == (1, VOCAB_SIZE + more)
        read = [min(token_id, VOCAB_SIZE - 1) for token_id in prompt]
        expected = expected_logits(reference_model(folder), read[:-1], read[-1:], TreeShape.root_only())
        assert_close(logits[:, :VOCAB_SIZE], expected[:, : VOCAB_SIZE + more])
        assert logits[:, VOCAB_SIZE:].isneginf().all()
        level = expand_level(model_of(context), SHAPE, (1, 2), torch.tensor([VOCAB_SIZE + more - 1, 3]))
        assert level.shape == (2, VOCAB_SIZE + more)


def test_it_is_a_drafter_that_wants_nothing_of_the_target_but_tokens(models: Models) -> None:
    with open_drafters((CpuDevice,), models(), shape=SHAPE) as drafters:
        drafter: Drafter = drafters[0]
        context = drafter.start(0, PROMPT, len(PROMPT))
        context.grow_ahead()
        assert drafter.feature_layers == ()


@pytest.mark.parametrize("windows", [{}, {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}])
def test_recordings_keep_what_is_planned_for_them(models: Models, windows: dict[str, object]) -> None:
    """One mask for each kind of layer, numbers and logits of the widest pass, whatever was recorded."""
    device, rows = CountingDevice(), 600
    with open_drafters((lambda: device,), models("qwen2", **windows), rows, SHAPE) as (drafter,):
        held_bytes, num_masks = device.held_bytes, 2 if windows else 1
        drafter.prepare(Aim(shape=SHAPE))
        assert device.num_recordings > 0 and device.held_bytes == held_bytes
        drafter.record_nothing()
        kept_bytes = widest_pass(SHAPE.num_nodes) * (4 * 8 + num_masks * rows + VOCAB_SIZE * 4)
        assert held_bytes - device.held_bytes == kept_bytes


def test_a_parent_and_its_child_may_come_in_one_pass(models: Models, make: Callable[[], Device]) -> None:
    tokens = torch.tensor([3, 50, 3, 9, 17, 80])
    with open_drafters((make, make), models(), shape=SHAPE) as drafters:
        together, apart = (model_of(context) for context in start_all(drafters))
        for model in (together, apart):
            model.begin()
            model.expand([-1, -1], tokens[:2])
        logits = together.expand([0, 2, 1, 3], tokens[2:])
        for row, parent in enumerate([0, 2, 1, 3]):
            assert_close(logits[row : row + 1], apart.expand([parent], tokens[2 + row : 3 + row]))
        assert together.num_nodes == apart.num_nodes == 6


PARENTS = [-1, -1, 1, 0, 2, 2, 4, 5, 6]  # 1 and 2 are accepted; below them hang 4, 5, 6, 7, 8


def test_nodes_that_are_kept_are_as_good_as_run_anew(models: Models, make: Callable[[], Device]) -> None:
    tokens, more = torch.tensor([7, 3, 50, 3, 9, 17, 80, 80, 2]), torch.tensor([40, 41, 42])
    with open_drafters((make, make), models(), shape=SHAPE) as drafters:
        keeping, anew = (model_of(context) for context in start_all(drafters))
        keeping.begin()
        keeping.expand(PARENTS, tokens)
        keeping.follow(tokens[1:3].tolist(), [1, 2], [4, 5, 6, 8])
        assert (keeping.num_nodes, keeping.segment.length) == (4, len(PROMPT) + 2)
        anew.follow(tokens[1:3].tolist(), [])
        anew.begin()
        anew.expand([-1, -1, 0, 2], tokens[[4, 5, 6, 8]])
        for parents in ([3, 1, -1], [4]):
            assert_close(*(model.expand(parents, more[: len(parents)]) for model in (keeping, anew)))
        for model in (keeping, anew):
            model.follow([9, 80, 2, 40], [0, 2, 3, 4], [7])
        for parents in ([0, -1], [1]):
            assert_close(*(model.expand(parents, more[: len(parents)]) for model in (keeping, anew)))
        assert keeping.room == anew.room == keeping.segment.capacity - 1 - keeping.segment.rows


def test_a_pass_that_fails_leaves_the_nodes_as_they_were(models: Models, make: Callable[[], Device]) -> None:
    tokens = torch.tensor([7, 3, 50])
    with open_drafters((make, make), models(), shape=SHAPE) as drafters:
        failing, plain = (model_of(context) for context in start_all(drafters))
        for model in (failing, plain):
            model.begin()
            model.expand([-1], tokens[:1])
        with pytest.raises(FitError, match="cached rows"):
            failing.expand([0] * 200, tokens[:1].expand(200))
        assert failing.num_nodes == 1
        assert_close(*(model.expand([0, -1], tokens[1:]) for model in (failing, plain)))
        for model in (failing, plain):
            model.follow((), (), range(2))  # as a round is taken back to what it began with
        assert_close(*(model.expand([1], tokens[:1]) for model in (failing, plain)))
        failing.segment.truncate(3)  # as a session may
        assert (failing.num_nodes, plain.num_nodes) == (0, 3)
        assert_close(failing.begin(), plain.begin())
