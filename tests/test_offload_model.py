"""Tree passes against plain forwards of transformers: every node's logits, also after commits, with a poisoned tail."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import FAMILIES, VOCAB_SIZE, reference_model
from offload.assemble import open_engine
from offload.config import EngineSettings
from offload.device.cpu import CpuDevice
from offload.engine.decode import DecodeLoop
from offload.errors import FitError, ModelError
from offload.model.attention import pass_mask, tree_attention
from offload.model.causal_lm import CausalLM
from offload.model.kv_cache import KVCache
from planning import L40
from tree.shape import TreeShape

Models = Callable[..., Path]


@contextmanager
def open_target(folder: Path, **settings_: object) -> Iterator[CausalLM]:
    settings_ = {"resident_layers": 1, "slots": 2, **settings_}
    with open_engine(EngineSettings(model=str(folder), device="cpu", tree="none", **settings_), hardware=L40) as engine:  # type: ignore[arg-type]
        yield loop_target(engine.loop)


def loop_target(loop: DecodeLoop) -> CausalLM:
    return loop._target


def tree_logits(model: CausalLM, prefix: list[int], tokens: list[int], shape: TreeShape) -> torch.Tensor:
    cached = model.cache.length
    mask = pass_mask(cached, len(prefix), torch.from_numpy(shape.ancestor_mask.copy()))
    depths = [cached + len(prefix) + depth for depth in shape.depths]
    positions = torch.tensor([*range(cached, cached + len(prefix)), *depths])
    return model.forward(torch.tensor(prefix + tokens), positions, mask, shape.num_nodes)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_node_sees_exactly_its_path_also_after_commits(models: Models, family: str) -> None:
    folder = models(family)
    reference = reference_model(folder)
    generator = torch.Generator().manual_seed(1)
    shapes = [TreeShape.chains(3, 2), TreeShape.from_widths([2, 3, 1]), TreeShape.chain(5), TreeShape.root_only()]
    with open_target(folder) as model, torch.no_grad():
        context = [3, 14, 15, 92, 65]
        prefix = context
        for shape in shapes:
            tokens = torch.randint(VOCAB_SIZE, (shape.num_nodes,), generator=generator).tolist()
            model.cache.poison_tail()
            logits = tree_logits(model, prefix, tokens, shape)
            for node in range(shape.num_nodes):
                path = context + [tokens[ancestor] for ancestor in shape.path(node)]
                expected = reference(torch.tensor([path])).logits[0, -1]
                assert (logits[node] - expected).abs().max() < 1e-5 * expected.abs().max().clamp(min=1)
            accepted = shape.path(shape.num_nodes - 1)
            model.cache.commit([*range(len(prefix)), *(len(prefix) + node for node in accepted)])
            context = context + [tokens[node] for node in accepted]
            prefix = []


def test_committed_cache_rows_equal_a_fresh_prefill(models: Models) -> None:
    shape = TreeShape.chains(2, 3)
    tokens = [1, 2, 3, 4, 5, 6, 7]
    with open_target(models()) as model:
        tree_logits(model, [9, 8], tokens, shape)
        path = shape.path(6)
        model.cache.commit([0, 1, *(2 + node for node in path)])
        length = model.cache.length
        rows = model.cache._kv[..., :length, :].clone()
        model.cache.truncate(0)
        tree_logits(model, [9, 8], [tokens[node] for node in path], TreeShape.chain(len(path)))
        assert torch.allclose(rows, model.cache._kv[..., :length, :], atol=1e-6)


def test_a_pass_that_fails_leaves_the_cache_as_it_was(models: Models) -> None:
    with open_target(models()) as model:
        tree_logits(model, [9, 8], [1], TreeShape.root_only())
        model.cache.commit([0, 1, 2])
        broken = list(model._model.get_submodule("model.layers").children())[1]
        hook = broken.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tree_logits(model, [], [5], TreeShape.root_only())
        hook.remove()
        assert (model.cache.length, model.cache.pending) == (3, 0)
        again = tree_logits(model, [], [5], TreeShape.root_only())
        model.cache.truncate(0)
        fresh = tree_logits(model, [9, 8, 1], [5], TreeShape.root_only())
        assert torch.allclose(again, fresh, atol=1e-5)


def test_the_head_finds_the_last_slot_given_back_and_may_fail(models: Models) -> None:
    """Nothing streams into the last layer's slot before its use has ended, which is before the head begins, not after."""
    with open_target(models(), resident_layers=0) as model:
        expected = tree_logits(model, [9, 8], [1], TreeShape.root_only())
        model.cache.truncate(0)
        ended: list[int] = []

        def fails(*_: object) -> None:
            ended.append(len(model._weights.log.uses))
            raise torch.OutOfMemoryError

        hook = model._model.get_submodule("lm_head").register_forward_pre_hook(fails)
        with pytest.raises(torch.OutOfMemoryError):
            tree_logits(model, [9, 8], [1], TreeShape.root_only())
        hook.remove()
        assert ended == [len(model._parameters)] and (model.cache.length, model.cache.pending) == (0, 0)
        assert torch.equal(tree_logits(model, [9, 8], [1], TreeShape.root_only()), expected)


def test_cache_refuses_rows_beyond_its_capacity_with_the_counts(models: Models) -> None:
    with open_target(models(), max_context=6) as model:
        tree_logits(model, [1, 2, 3], [4], TreeShape.root_only())
        with pytest.raises(FitError, match="4 cached rows \\+ 3 new rows > 6"):
            tree_logits(model, [5, 6], [7], TreeShape.root_only())


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_commit_keeps_the_chosen_rows_in_order_and_nothing_else(data: st.DataObject) -> None:
    device = CpuDevice()
    cache = KVCache(device, num_layers=2, num_kv_heads=1, head_dim=1, capacity=12, dtype=torch.float32)
    kept: list[float] = []
    value = 0.0
    for _ in range(3):
        count = data.draw(st.integers(0, 12 - cache.rows))
        fresh = [value + step for step in range(count)]
        value += count
        rows = torch.tensor(fresh).view(1, 1, count, 1)
        for layer in range(2):
            keys, values = cache.update(rows, -rows, layer)
            assert keys.flatten().tolist() == kept + fresh and values.flatten().tolist() == [-x for x in kept + fresh]
        cache.appended(count)
        chosen = sorted(data.draw(st.sets(st.integers(0, count - 1)))) if count else []
        cache.commit(chosen)
        kept += [fresh[row] for row in chosen]
        cache.poison_tail()
    assert cache.length == len(kept)
    device.close()


def test_pass_mask_by_hand() -> None:
    mask = pass_mask(2, 2, torch.tensor([[1, 0], [1, 1]], dtype=torch.bool))[0, 0].int().tolist()
    assert mask == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]
    level = pass_mask(3, 0, torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1]], dtype=torch.bool))[0, 0].int().tolist()
    assert level == [[1, 1, 0, 1, 0], [1, 0, 1, 0, 1]]


def test_attention_refuses_what_it_would_leave_out() -> None:
    rows = torch.zeros(1, 1, 1, 8)
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    tree_attention(torch.nn.Identity(), rows, rows, rows, mask, softcap=None, sliding_window=4)
    with pytest.raises(ModelError, match="softcap"):
        tree_attention(torch.nn.Identity(), rows, rows, rows, mask, softcap=30.0)
