from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch

from shapes import chain, from_widths
from tree.draft import DraftTree, grow
from tree.sampling import SamplingParams, to_probabilities, top_k_tokens
from tree.shape import TreeShape

VOCABULARY = 12
UNEVEN = TreeShape((-1, 0, 0, 0, 1, 1, 3, 4))
RUN = {0: -1, 1: 0, 3: 1, 4: 2}  # its nodes with children, as the model knows them


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(3)


class TableModel:
    """A TreeModel whose logits are a table of (parent's token, token); remembers how it was called."""

    def __init__(self, root_token_id: int, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(11)
        self.table = torch.randn(VOCABULARY, VOCABULARY, VOCABULARY, generator=generator).to(dtype)
        self.root_token_id = root_token_id
        self.calls: list[tuple[int, ...]] = []
        self.parents: list[int] = []  # of the nodes that were run, in the order of that
        self.tokens: list[int] = []
        self.room = 1000

    def begin(self) -> torch.Tensor:
        self.calls.append(())
        self.parents, self.tokens = [], []
        return self.logits(-1)[None]

    def expand(self, parents: Sequence[int], token_ids: torch.Tensor) -> torch.Tensor:
        assert token_ids.shape == (len(parents),) and token_ids.dtype == torch.int64
        self.calls.append(tuple(parents))
        new = range(len(self.parents), len(self.parents) + len(parents))
        self.parents += parents
        self.tokens += token_ids.tolist()
        return torch.stack([self.logits(node) for node in new])

    def follow(self, token_ids: Sequence[int], accepted: Sequence[int], kept: Sequence[int] = ()) -> None:
        self.root_token_id = token_ids[-1]

    def logits(self, node: int) -> torch.Tensor:
        if node < 0:
            return self.table[0, self.root_token_id]
        parent = self.parents[node]
        return self.table[self.tokens[parent] if parent >= 0 else self.root_token_id, self.tokens[node]]


@pytest.mark.parametrize("sampled", [False, True])
def test_only_nodes_with_children_are_run_one_call_per_level(sampled: bool, rng: torch.Generator) -> None:
    model = TableModel(5)
    tree = grow(model, 5, UNEVEN, SamplingParams(1.0), rng, sampled=sampled)
    assert tree.shape is UNEVEN
    assert model.calls == [(), (-1, -1), (0,)]
    assert model.tokens == [int(tree.token_ids[node]) for node in (1, 3, 4)]


@pytest.mark.parametrize("sampled", [False, True])
def test_siblings_are_distinct_tokens_of_the_vocabulary(sampled: bool, rng: torch.Generator) -> None:
    shape = from_widths((VOCABULARY, 3, 2))
    tokens = grow(TableModel(0), 0, shape, SamplingParams(1.0, top_p=0.5), rng, sampled=sampled).token_ids
    assert tokens.shape == (shape.num_nodes,) and tokens.dtype == torch.int64
    assert (tokens >= 0).all() and (tokens < VOCABULARY).all()
    for node in range(shape.num_nodes):
        children = tokens[list(shape.children(node))].tolist()
        assert len(set(children)) == len(children)


def test_deterministic_children_are_the_most_probable_in_order(rng: torch.Generator) -> None:
    model = TableModel(2)
    tree = grow(model, 2, UNEVEN, SamplingParams(1.0), rng, sampled=False)
    assert tree.probabilities is None
    for node in (0, 1, 3, 4):
        best = top_k_tokens(model.logits(RUN[node])[None], UNEVEN.num_children[node])[0]
        assert tree.token_ids[list(UNEVEN.children(node))].tolist() == best.tolist()


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(0.7), SamplingParams(1.0, 4, 0.8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_laws_are_those_of_the_nodes_with_children(params: SamplingParams, dtype: torch.dtype, rng: torch.Generator) -> None:
    model = TableModel(2, dtype)
    tree = grow(model, 2, UNEVEN, params, rng, sampled=True)
    assert tree.probabilities is not None and tree.probabilities.shape == (UNEVEN.num_nodes, VOCABULARY)
    assert tree.probabilities.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for node in range(UNEVEN.num_nodes):
        if UNEVEN.num_children[node]:
            assert torch.allclose(tree.probabilities[node], to_probabilities(model.logits(RUN[node]), params))
        else:
            assert not tree.probabilities[node].any()


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_tree_says_how_sure_its_draft_was(sampled: bool, dtype: torch.dtype, rng: torch.Generator) -> None:
    """Of what it was drawn from; where all is chosen, of the draft's own probabilities."""
    model, params = TableModel(2, dtype), SamplingParams(0.5)
    tree = grow(model, 2, UNEVEN, params, rng, sampled=sampled)
    assert tree.tops is not None and tree.tops.shape == (UNEVEN.num_nodes,)
    for node in range(UNEVEN.num_nodes):
        if UNEVEN.num_children[node]:
            expected = to_probabilities(model.logits(RUN[node]), params if sampled else SamplingParams(1.0)).max()
            assert float(tree.tops[node]) == pytest.approx(float(expected), rel=1e-5)


def test_children_have_the_law_of_their_parent(rng: torch.Generator) -> None:
    """First children of 600 nodes with one law against their expected counts, 6 sigma each. False alarm: 3e-8."""
    shape, logits = TreeShape.chains(600, 2), torch.full((700,), -torch.inf)
    logits[:4] = torch.tensor([0.0, 1.0, 2.0, 0.5])

    class Constant:
        room = 1000

        def begin(self) -> torch.Tensor:
            return torch.zeros(1, 700)

        def expand(self, parents: Sequence[int], token_ids: torch.Tensor) -> torch.Tensor:
            return logits.expand(len(parents), -1)

        def follow(self, token_ids: Sequence[int], accepted: Sequence[int], kept: Sequence[int] = ()) -> None:
            raise AssertionError

    tree = grow(Constant(), 0, shape, SamplingParams(1.0), rng, sampled=True)
    leaves = tree.token_ids[shape.levels[2].start :]
    expected = logits[:4].softmax(-1)
    for token, probability in enumerate(expected.tolist()):
        sigma = (probability * (1 - probability) / 600) ** 0.5
        assert (leaves == token).double().mean() == pytest.approx(probability, abs=6 * sigma)


def test_the_root_alone_needs_no_model(rng: torch.Generator) -> None:
    model = TableModel(7)
    tree = grow(model, 7, TreeShape.root_only(), SamplingParams(1.0), rng, sampled=True)
    assert model.calls == [] and tree.probabilities is None and tree.token_ids.tolist() == [7]


def test_every_round_draws_afresh_and_a_seed_repeats_all_of_them() -> None:
    def rounds(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        trees = (grow(TableModel(0), 0, UNEVEN, SamplingParams(1.0), generator, sampled=True) for _ in range(6))
        return [tree.token_ids.tolist() for tree in trees]

    assert rounds(1) == rounds(1) != rounds(2)
    assert all(before != after for before, after in pairwise(rounds(1)))


@pytest.mark.parametrize("sampled", [False, True])
def test_all_or_none_of_a_static_tree_is_drawn(sampled: bool, rng: torch.Generator) -> None:
    tree = grow(TableModel(0), 0, UNEVEN, SamplingParams(1.0), rng, sampled=sampled)
    assert tree.drawn == (False, *[sampled] * 7)


def test_trees_that_contradict_themselves_are_refused() -> None:
    pair, token_ids, rows = chain(2), torch.tensor([3, 4]), torch.full((2, 5), 0.2)
    for found, message in (
        ((pair, token_ids, None, (False, True)), "node 1 is drawn, but there are no probabilities"),
        ((pair, token_ids, rows, (False, False)), "but no node is drawn"),
        ((pair, token_ids, rows, (True, True)), "the root .* cannot be drawn"),
        ((pair, token_ids, None, (False,)), r"\(2,\) token ids and 1 marks .* a tree of 2 nodes"),
        ((pair, token_ids[:1], None, (False, False)), r"\(1,\) token ids and 2 marks .* a tree of 2 nodes"),
        ((pair, token_ids, rows[:1], (False, True)), r"probabilities of shape \(1, 5\) for a tree of 2 nodes"),
    ):
        with pytest.raises(ValueError, match=message):
            DraftTree(*found)
    with pytest.raises(ValueError, match=r"largest probabilities of shape \(1,\) for a tree of 2 nodes"):
        DraftTree(pair, token_ids, None, (False, False), tops=torch.ones(1))
    assert DraftTree.root_only(token_ids[:1]).drawn == (False,)


@pytest.mark.parametrize("sampled", [False, True])
def test_more_children_than_tokens_are_refused(sampled: bool, rng: torch.Generator) -> None:
    with pytest.raises(ValueError, match=r"13 distinct children .* vocabulary of 12"):
        grow(TableModel(0), 0, from_widths((13,)), SamplingParams(1.0), rng, sampled=sampled)
