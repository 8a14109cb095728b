"""Tree passes against plain forwards of transformers: every node's logits, also after commits, with poisoned tails, also for
several texts in one pass."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import FAMILIES, VOCAB_SIZE, reference_model
from offload.errors import FitError, ModelError
from offload.model.attention import Block, pass_mask, tree_attention, window_mask
from offload.model.causal_lm import CausalLM
from offload.model.transformers_api import carry
from shapes import chain, from_widths
from small_models import PassingWeights, assert_close, open_model, text_part, tree_logits, tree_part
from tree.shape import TreeShape

Models = Callable[..., Path]
SHAPES = [TreeShape.chains(3, 2), from_widths([2, 3, 1]), chain(5), TreeShape.root_only()]


def random_tokens(generator: torch.Generator, number: int) -> list[int]:
    return torch.randint(VOCAB_SIZE, (number,), generator=generator).tolist()


@torch.no_grad()
def expected_logits(reference: torch.nn.Module, context: list[int], tokens: list[int], shape: TreeShape) -> torch.Tensor:
    """[N, V], node by node: of a forward over the context and the node's path."""
    paths = [context + [tokens[ancestor] for ancestor in shape.path(node)] for node in range(shape.num_nodes)]
    return torch.stack([reference(torch.tensor([path])).logits[0, -1] for path in paths])


def poison_tails(model: CausalLM) -> None:
    for segment in model.cache.segments:
        segment.poison_tail()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_node_sees_exactly_its_path_also_after_commits(models: Models, family: str) -> None:
    folder = models(family)
    reference = reference_model(folder)
    generator = torch.Generator().manual_seed(1)
    with open_model(folder) as model:
        segment = model.cache.segments[0]
        context = [3, 14, 15, 92, 65]
        prefix = context
        for shape in SHAPES:
            tokens = random_tokens(generator, shape.num_nodes)
            poison_tails(model)
            assert_close(tree_logits(model, prefix, tokens, shape), expected_logits(reference, context, tokens, shape))
            accepted = shape.path(shape.num_nodes - 1)
            segment.commit([*range(len(prefix)), *(len(prefix) + node for node in accepted)])
            context = context + [tokens[node] for node in accepted]
            prefix = []


@pytest.mark.parametrize("num_texts", [2, 5])
def test_texts_in_one_pass_have_the_logits_of_each_alone(models: Models, num_texts: int) -> None:
    """Prompts of several lengths, other trees in every pass, parts that only read, texts that sit a pass out."""
    folder = models()
    reference = reference_model(folder)
    generator = torch.Generator().manual_seed(2)
    with open_model(folder, num_segments=num_texts, segment_rows=90) as model:
        segments = model.cache.segments
        texts = [random_tokens(generator, 3 + 11 * number) for number in range(num_texts)]
        for turn in range(4):
            poison_tails(model)
            parts, expected, trees = [], [], []
            for number, segment in enumerate(segments):
                if turn and (turn + number) % 3 == 0 and number:
                    continue
                shape = SHAPES[(turn + number) % len(SHAPES)]
                tokens = random_tokens(generator, shape.num_nodes)
                prefix = texts[number][segment.length :]
                if turn == 0 and number == 1:  # reads a piece of its prompt
                    parts.append(text_part(segment, prefix[:5], num_logits=0))
                    expected.append(torch.empty(0, VOCAB_SIZE))
                    trees.append((number, range(5), []))
                    continue
                parts.append(tree_part(segment, prefix, tokens, shape))
                expected.append(expected_logits(reference, texts[number], tokens, shape))
                path = shape.path(shape.num_nodes - 1)
                rows = [*range(len(prefix)), *(len(prefix) + node for node in path)]
                trees.append((number, rows, [tokens[node] for node in path]))
            for output, logits in zip(model.forward(parts), expected, strict=True):
                assert output.features is None
                if len(logits):
                    assert_close(output.logits, logits)
                assert output.logits.shape == logits.shape
            for number, rows, accepted in trees:
                segments[number].commit(rows)
                texts[number] += accepted


def test_nan_in_one_text_does_not_reach_another(models: Models) -> None:
    with open_model(models(), num_segments=3, segment_rows=20) as model:
        first, middle, last = model.cache.segments
        alone = []
        for segment, token in ((first, 5), (last, 6)):
            model.forward((text_part(segment, [1, 2, token], 1),))
            segment.commit(range(3))
            alone.append(model.forward((tree_part(segment, [], [7], TreeShape.root_only()),))[0].logits)
            segment.truncate(3)
        middle.poison_tail()
        middle.appended(range(4))
        middle.commit(range(4))  # of rows that are NaN
        parts = [tree_part(segment, [], [7], TreeShape.root_only()) for segment in (first, middle, last)]
        outputs = [output.logits for output in model.forward(parts)]
        assert outputs[1].isnan().all()
        assert_close(outputs[0], alone[0])
        assert_close(outputs[2], alone[1])


def test_features_are_those_of_the_layers_asked_for(models: Models) -> None:
    folder = models()
    shape, tokens = from_widths([2, 2]), [1, 2, 3, 4, 5, 6, 7]
    reference, taken = reference_model(folder), dict[int, torch.Tensor]()
    for number, layer in enumerate(reference.get_submodule("model.layers").children()):
        layer.register_forward_hook(lambda _m, _a, output, number=number: taken.__setitem__(number, output[0]))
    with open_model(folder, num_segments=2) as model, torch.no_grad():
        first, second = model.cache.segments
        for feature_layers in ((1,), (2, 0)):
            parts = (text_part(first, [9, 8, 7], 2), tree_part(second, [4], tokens, shape))
            outputs = model.forward(parts, feature_layers=feature_layers)
            taken.clear()
            reference(torch.tensor([[9, 8, 7]]))
            assert outputs[0].features is not None and outputs[1].features is not None
            assert_close(outputs[0].features, torch.cat([taken[layer][1:] for layer in feature_layers], dim=1))
            for node in range(shape.num_nodes):
                reference(torch.tensor([[4, *(tokens[ancestor] for ancestor in shape.path(node))]]))
                expected = torch.cat([taken[layer][-1] for layer in feature_layers])
                assert_close(outputs[1].features[node], expected)
            alone = model.forward((tree_part(first, [], [3], TreeShape.root_only()),), feature_layers=feature_layers)
            assert alone[0].features is not None and alone[0].features.shape == (1, 32 * len(feature_layers))
            first.truncate(0)
            second.truncate(0)
        assert not any(layer._forward_hooks for layer in model._layers[:-1])


def test_before_each_layer_something_else_may_be_done(models: Models) -> None:
    with open_model(models()) as model:
        weights, ended = model._weights, list[tuple[int, int]]()
        assert isinstance(weights, PassingWeights)
        part = tree_part(model.cache.segments[0], [9, 8], [1], TreeShape.root_only())
        model.forward((part,), before_layer=lambda layer: ended.append((layer, weights.num_ended)))
        assert ended == [(0, 0), (1, 1), (2, 2)]  # the layer before is not in use any more
        tree_logits(model, [], [1], TreeShape.root_only())
        assert len(ended) == 3


def test_committed_cache_rows_equal_a_fresh_prefill(models: Models) -> None:
    shape = TreeShape.chains(2, 3)
    tokens = [1, 2, 3, 4, 5, 6, 7]
    with open_model(models()) as model:
        segment = model.cache.segments[0]
        tree_logits(model, [9, 8], tokens, shape)
        path = shape.path(6)
        segment.commit([0, 1, *(2 + node for node in path)])
        rows = segment.save_rows(segment.length).view(torch.float32)
        segment.truncate(0)
        tree_logits(model, [9, 8], [tokens[node] for node in path], chain(len(path)))
        segment.commit(range(2 + len(path)))
        assert torch.allclose(rows, segment.save_rows(segment.length).view(torch.float32), atol=1e-6)


def test_a_pass_that_fails_leaves_segments_and_weights_as_they_were(models: Models) -> None:
    with open_model(models(), num_segments=2) as model:
        first, second = model.cache.segments
        tree_logits(model, [9, 8], [1], TreeShape.root_only())
        first.commit([0, 1, 2])
        hook = model._layers[1].register_forward_hook(lambda *_: 1 / 0)
        parts = [tree_part(first, [], [5], TreeShape.root_only()), tree_part(second, [4], [5], TreeShape.root_only())]
        with pytest.raises(ZeroDivisionError):
            model.forward(parts, feature_layers=(0, 2))
        hook.remove()
        assert [(segment.length, segment.pending) for segment in (first, second)] == [(3, 0), (0, 0)]
        assert [len(layer._forward_hooks) for layer in model._layers] == [0, 0, 1]  # of the end of a pass
        again = tree_logits(model, [], [5], TreeShape.root_only())
        first.truncate(0)
        assert torch.allclose(again, tree_logits(model, [9, 8, 1], [5], TreeShape.root_only()), atol=1e-5)


def test_the_head_finds_the_last_layer_given_back_and_may_fail(models: Models) -> None:
    """Nothing streams into the last layer's slot before its use has ended, which is before the head begins, not after."""
    with open_model(models()) as model:
        segment, weights = model.cache.segments[0], model._weights
        assert isinstance(weights, PassingWeights)
        expected = tree_logits(model, [9, 8], [1], TreeShape.root_only())
        segment.truncate(0)
        weights.num_ended, ended = 0, list[int]()

        def fails(*_: object) -> None:
            ended.append(weights.num_ended)
            raise torch.OutOfMemoryError

        hook = model._model.get_submodule("lm_head").register_forward_pre_hook(fails)
        with pytest.raises(torch.OutOfMemoryError):
            tree_logits(model, [9, 8], [1], TreeShape.root_only())
        hook.remove()
        assert ended == [len(model._layers)] and (segment.length, segment.pending) == (0, 0)
        assert torch.equal(tree_logits(model, [9, 8], [1], TreeShape.root_only()), expected)


def test_a_pass_that_finds_no_room_in_one_segment_begins_in_none(models: Models) -> None:
    with open_model(models(), num_segments=2, segment_rows=6) as model:
        first, second = model.cache.segments
        tree_logits(model, [1, 2, 3], [4], TreeShape.root_only())
        parts = [tree_part(second, [5, 6], [7], TreeShape.root_only()), tree_part(first, [], [5, 6, 7], chain(3))]
        with pytest.raises(FitError, match="4 cached rows \\+ 3 new rows > 6"):
            model.forward(parts)
        assert (second.rows, first.rows) == (0, 4)


def test_a_level_below_pending_nodes_sees_those_of_its_path(models: Models) -> None:
    """Level by level, as a draft grows: what lies on other branches is masked, and positions are those of levels."""
    folder = models()
    shape, tokens = from_widths([3, 2]), [5, 6, 7, 8, 1, 2, 3, 4, 9, 10]
    with open_model(folder) as model:
        segment, mask = model.cache.segments[0], torch.from_numpy(shape.ancestor_mask.copy())
        model.forward((text_part(segment, [11, 12, 13, tokens[0]], 0),))
        segment.commit(range(4))
        expected = expected_logits(reference_model(folder), [11, 12, 13], tokens, shape)
        for level in shape.levels[1:]:
            part = tree_part(segment, [], [tokens[node] for node in level], shape)
            depths = [shape.depths[node] - 1 for node in level]
            seen = mask[level.start : level.stop, 1 : level.stop]
            part = type(part)(
                segment=segment, prefix=(), node_ids=part.node_ids, depths=depths, tree_mask=seen, num_logits=len(level)
            )
            assert_close(model.forward((part,))[0].logits, expected[level.start : level.stop])


def test_pass_mask_by_hand() -> None:
    mask = pass_mask(2, 2, torch.tensor([[1, 0], [1, 1]], dtype=torch.bool))[0, 0].int().tolist()
    assert mask == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]
    level = pass_mask(3, 0, torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1]], dtype=torch.bool))[0, 0].int().tolist()
    assert level == [[1, 1, 0, 1, 0], [1, 0, 1, 0, 1]]


def test_window_mask_by_hand() -> None:
    """Two tokens, one's own included. Three siblings stand at one position, whatever their columns."""
    mask = torch.ones(1, 1, 3, 5, dtype=torch.bool)
    mask[..., 2:] = torch.eye(3, dtype=torch.bool)
    near = window_mask(mask, torch.tensor([2, 2, 2]), torch.tensor([0, 1, 2, 2, 2]), window=2)
    assert near[0, 0].int().tolist() == [[0, 1, 1, 0, 0], [0, 1, 0, 1, 0], [0, 1, 0, 0, 1]]


def test_attention_refuses_what_it_would_leave_out() -> None:
    rows, module = torch.zeros(1, 1, 1, 8), torch.nn.Identity()
    mask = carry({4: (Block(slice(1), slice(1), torch.ones(1, 1, 1, 1, dtype=torch.bool)),)}, torch.device("cpu"))
    tree_attention(module, rows, rows, rows, mask, softcap=None, sliding_window=4)
    with pytest.raises(ModelError, match="softcap"):
        tree_attention(module, rows, rows, rows, mask, softcap=30.0, sliding_window=4)
    with pytest.raises(ModelError, match="window of 3"):
        tree_attention(module, rows, rows, rows, mask, sliding_window=3)
    for lost in (None, torch.ones(1, 1, 1, 1, dtype=torch.bool), mask[:, :, :1]):
        with pytest.raises(ModelError, match="not given the mask"):
            tree_attention(module, rows, rows, rows, lost, sliding_window=4)
