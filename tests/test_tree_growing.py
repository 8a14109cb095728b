"""Trees that grow where the draft believes that the text will go."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import numpy as np
import pytest
import torch

from shapes import chain
from table_models import TableModel
from tree.acceptance import Acceptance
from tree.aim import Aim
from tree.context import TreeContext
from tree.draft import DraftTree
from tree.estimates import Estimates
from tree.growing import GrowingTree
from tree.optimizer import best_tree
from tree.sampling import SamplingParams, to_probabilities
from tree.sources import Found
from tree.verify import Verdict, verify

GREEDY, UNIT, COLD = SamplingParams(), SamplingParams(1.0), SamplingParams(0.5, None, 0.8)
ACCEPTANCE = Acceptance(((0.6, 0.15, 0.1, 0.05),))


def tables(vocab_size: int, seed: int = 1, noise: float = 0.7) -> tuple[torch.Tensor, torch.Tensor]:
    """A draft, and a target that is near it: [V, V, V] each."""
    generator = torch.Generator().manual_seed(seed)
    draft = 2 * torch.randn((vocab_size,) * 3, generator=generator)
    return draft, draft + noise * torch.randn((vocab_size,) * 3, generator=generator)


def target_rows(target: torch.Tensor, tree: DraftTree, before: int) -> torch.Tensor:
    tokens = tree.token_ids.tolist()
    parents = [before, *(tokens[parent] for parent in tree.shape.parents[1:])]
    return torch.stack([target[last, token] for last, token in zip(parents, tokens, strict=True)])


def run_rounds(
    context: TreeContext,
    target: torch.Tensor,
    text: Sequence[int],
    params: SamplingParams,
    rounds: int,
    *,
    most: int = 24,
    levels: int = 8,
    steps: int = 0,
) -> list[tuple[DraftTree, Verdict]]:
    generator, text, judged = torch.Generator().manual_seed(3), list(text), []
    for _ in range(rounds):
        tree = context.grow(most, levels, params, generator, sampled=not params.greedy)
        for _ in range(steps):
            context.grow_ahead()
        verdict = verify(tree, target_rows(target, tree, text[-2]), params, generator, method="traversal")
        context.follow(verdict.path, verdict.token_ids, None)
        text += verdict.token_ids
        judged.append((tree, verdict))
    return judged


def dynamic(most: int = 24) -> Aim:
    return Aim(shape=best_tree(ACCEPTANCE, most, 8), dynamic=True, acceptance=ACCEPTANCE)


@pytest.mark.parametrize("params", [GREEDY, UNIT, COLD], ids=str)
@pytest.mark.parametrize("vocab_size", [2, 3, 40])
def test_dynamic_trees_keep_to_what_was_asked_for(vocab_size: int, params: SamplingParams) -> None:
    draft, target = tables(vocab_size)
    model = TableModel(draft, (0, 1))
    judged = run_rounds(TreeContext(model, 1, lambda: dynamic(20)), target, (0, 1), params, 12, most=17, levels=5)
    assert vocab_size < 40 or len({tree.shape for tree, _ in judged}) > 1
    for tree, _ in judged:
        assert 1 < tree.shape.num_nodes <= 17 and tree.shape.num_levels <= 5
        assert any(tree.drawn) != params.greedy
        for node in range(tree.shape.num_nodes):
            children = tree.token_ids[list(tree.shape.children(node))].tolist()
            assert len(set(children)) == len(children)


def test_greedy_text_of_dynamic_trees_is_the_argmax_chain() -> None:
    draft, target = tables(40)
    judged = run_rounds(TreeContext(TableModel(draft, (0, 1)), 1, dynamic), target, (0, 1), GREEDY, 12)
    text = [0, 1]
    for token_id in [token_id for _, verdict in judged for token_id in verdict.token_ids]:
        text.append(int(target[text[-2], text[-1]].argmax()))
        assert token_id == text[-1]


def test_a_seed_repeats_the_trees() -> None:
    draft, target = tables(40)
    first, second = (run_rounds(TreeContext(TableModel(draft, (0, 1)), 1, dynamic), target, (0, 1), UNIT, 6) for _ in range(2))
    for (tree, verdict), (other, same) in zip(first, second, strict=True):
        assert tree.shape == other.shape and torch.equal(tree.token_ids, other.token_ids) and verdict == same


def test_a_sure_draft_grows_a_chain_and_an_unsure_one_a_bush() -> None:
    sure = torch.full((30, 30, 30), -20.0)
    for token_id in range(30):
        sure[:, token_id, (token_id + 1) % 30] = 0.0
    unsure = torch.zeros(30, 30, 30)
    shapes = []
    for table in (sure, unsure):
        context = TreeContext(TableModel(table, (0, 1)), 1, dynamic)
        run_rounds(context, table, (0, 1), GREEDY, 20, most=8)
        shapes.append(context.grow(8, 8, GREEDY, torch.Generator(), sampled=False).shape)
    assert shapes[0] == chain(8)
    assert shapes[1].num_levels < 5


@pytest.mark.parametrize("params", [UNIT, COLD], ids=str)
def test_a_step_that_only_many_nodes_pay_for_is_taken(params: SamplingParams) -> None:
    """The best of them alone would not: drawn trees look at what is nearly as good first."""
    draft, target = tables(40)
    levels = []
    for least_gain in (0.0, 0.3):
        context = TreeContext(TableModel(draft, (0, 1)), 1, lambda gain=least_gain: replace(dynamic(), least_gain=gain))
        judged = run_rounds(context, target, (0, 1), params, 60)
        levels.append(fmean(tree.shape.num_levels for tree, _ in judged))
    assert 4 < levels[1] < levels[0]


def test_what_may_have_no_children_is_not_the_best_to_run() -> None:
    estimates = Estimates(ACCEPTANCE)
    tree = GrowingTree(0, estimates, sampled=True)
    tree.root.run = -1
    tree.open([tree.root], [[1, 2]], [[0.6, 0.3]], np.array([[0.9, 0.5]]))
    child = tree.attach(tree.root)
    tree.put_back([child, tree.root])
    slot = tree.root.urgency
    assert slot < child.urgency == tree.best_value(2) and tree.best_value(1) == slot and tree.best_value(0) == 0
    assert tree.due(0.0, 2, 2, 2) == [child]


class Repeating:
    """Finds what came behind the same token the last time, and what came behind that."""

    priors = (0.5,)

    def __init__(self, text: Sequence[int]) -> None:
        self.text = list(text)

    def find(self, path: Sequence[int], most: int) -> list[Found]:
        text = [*self.text, *path]
        place = next((place for place in range(len(text) - 2, -1, -1) if text[place] == text[-1]), len(text))
        return [Found(number - 1, token_id, 0) for number, token_id in enumerate(text[place + 1 :][: min(most, 6)])]

    def follow(self, token_ids: Sequence[int]) -> None:
        self.text += token_ids


@pytest.mark.matrix
@pytest.mark.parametrize("finds", [False, True])
@pytest.mark.parametrize("steps", [0, 5])
@pytest.mark.parametrize("params", [UNIT, COLD], ids=str)
def test_rows_are_those_that_children_were_drawn_from(params: SamplingParams, steps: int, finds: bool) -> None:
    """Also after nodes were kept, and rows with them. What was found and stands last was struck off."""
    draft, target = tables(12, noise=2.0)
    context = TreeContext(TableModel(draft, (0, 1)), 1, dynamic, [Repeating((0, 1))] if finds else [])
    judged = run_rounds(context, target, (0, 1), params, 50, levels=30, steps=steps)
    assert any(tree.foreseen for tree, _ in judged) == (steps > 0) and any(tree.found for tree, _ in judged) == finds
    text = [0, 1]
    for tree, verdict in judged:
        tokens = tree.token_ids.tolist()
        for node in range(tree.shape.num_nodes):
            children = tree.shape.children(node)
            if not any(tree.drawn[child] for child in children):
                continue
            before = tokens[tree.shape.parents[node]] if node else text[-2]
            row = to_probabilities(draft[before, tokens[node]], params)
            assert tree.probabilities is not None
            differs = torch.nonzero(tree.probabilities[tree.row_of(node)] != row).flatten().tolist()
            assert set(differs) <= {tokens[child] for child in children if not tree.drawn[child]}
        text += verdict.token_ids


def counting(every: int = 10**9, vocab_size: int = 31) -> torch.Tensor:
    """[V, V, V]: the next token is likely one more, else two more; so it is for certain behind each multiple of `every`."""
    table = torch.full((vocab_size,) * 3, -20.0)
    for token_id in range(vocab_size):
        one, two = (token_id + 1) % vocab_size, (token_id + 2) % vocab_size
        table[:, token_id, one], table[:, token_id, two] = (0.0, -1.5) if token_id % every else (-9.0, 9.0)
    return table


def test_what_was_grown_ahead_takes_steps_off_the_next_round() -> None:
    """A draft that is nearly always right, and a text that it always leads on: the next root is below the last chain."""
    passes, foreseen = {}, {}
    for steps in (0, 6):
        model = TableModel(counting(), (0, 1))
        judged = run_rounds(TreeContext(model, 1, dynamic), counting(), (0, 1), GREEDY, 20, most=6, levels=40, steps=steps)
        passes[steps], foreseen[steps] = model.num_passes - 20 * steps, sum(tree.foreseen for tree, _ in judged)
    assert foreseen[0] == 0 and foreseen[6] > 20 * 3
    assert passes[6] < passes[0] / 2


@pytest.mark.parametrize("lets_go", [False, True])
@pytest.mark.parametrize("params", [GREEDY, UNIT], ids=str)
def test_a_round_that_was_taken_back_has_left_nothing(params: SamplingParams, lets_go: bool) -> None:
    """Also one that began with kept nodes. Where the model had to let go of those, the tree begins with the root again."""
    draft, target = tables(12, noise=2.0)
    model = TableModel(draft, (0, 1))
    context, generator, text = TreeContext(model, 1, dynamic), torch.Generator().manual_seed(5), [0, 1]
    num_kept = 0
    for _ in range(20):
        state, trees = generator.get_state(), []
        for _ in range(2):
            generator.set_state(state)
            trees.append(context.grow(24, 30, params, generator, sampled=not params.greedy))
            for _ in range(5):
                context.grow_ahead()
            if lets_go and len(trees) == 1:
                model.parents, model.token_ids, model.begun = [], [], False
        num_kept += trees[0].foreseen > 0
        assert lets_go or (trees[0].shape == trees[1].shape and torch.equal(trees[0].token_ids, trees[1].token_ids))
        verdict = verify(trees[1], target_rows(target, trees[1], text[-2]), params, generator, method="traversal")
        context.follow(verdict.path, verdict.token_ids, None)
        text += verdict.token_ids
    assert num_kept > 2 or not params.greedy


def test_growing_ahead_that_fails_costs_what_it_would_have_brought() -> None:
    draft, target = tables(12)

    class Failing(TableModel):
        def expand(self, parents: Sequence[int], token_ids: torch.Tensor) -> torch.Tensor:
            if self.is_ahead:
                raise MemoryError
            return super().expand(parents, token_ids)

        is_ahead = False

    model = Failing(draft, (0, 1))
    context, generator, text = TreeContext(model, 1, dynamic), torch.Generator().manual_seed(5), [0, 1]
    for number in range(12):
        tree = context.grow(24, 8, UNIT, generator, sampled=True)
        context.grow_ahead()
        model.is_ahead = number % 3 == 0
        if model.is_ahead:
            with pytest.raises(MemoryError):
                context.grow_ahead()
        model.is_ahead = False
        verdict = verify(tree, target_rows(target, tree, text[-2]), UNIT, generator, method="traversal")
        context.follow(verdict.path, verdict.token_ids, None)
        text += verdict.token_ids


@pytest.mark.parametrize("with_model", [False, True])
def test_finds_become_nodes_with_a_model_and_without(with_model: bool) -> None:
    """The target repeats itself, and the draft, if there is one, knows nothing."""
    target = torch.full((9, 9, 9), -20.0)
    for token_id in range(9):
        target[:, token_id, (token_id + 1) % 9] = 0.0
    model = TableModel(torch.zeros(9, 9, 9), (0, 1)) if with_model else None
    context = TreeContext(model, 1, dynamic, [Repeating((0, 1))])
    judged = run_rounds(context, target, (0, 1), GREEDY, 20)
    assert sum(len(verdict.path) for _, verdict in judged[10:]) >= 10 * 6
    for tree, _ in judged:
        assert len(tree.found) == tree.shape.num_nodes - 1 or with_model
        for node in range(tree.shape.num_nodes):
            children = tree.token_ids[list(tree.shape.children(node))].tolist()
            assert len(set(children)) == len(children)


def test_a_chain_of_finds_is_run_in_one_step() -> None:
    target = torch.full((9, 9, 9), -20.0)
    for token_id in range(9):
        target[:, token_id, (token_id + 1) % 9] = 0.0
    model = TableModel(target, (0, 1))
    context = TreeContext(model, 1, dynamic, [Repeating((0, 1))])
    run_rounds(context, target, (0, 1), GREEDY, 20)
    before = model.num_passes
    tree = context.grow(24, 8, GREEDY, torch.Generator(), sampled=False)
    assert tree.shape.num_levels >= 7 and model.num_passes - before <= 4


class Wrong(Repeating):
    """Finds what never follows, and says that it always does."""

    priors = (0.95,)

    def find(self, path: Sequence[int], most: int) -> list[Found]:
        last = [*self.text, *path][-1]
        return [Found(place - 1, (last + 5 + place) % 9, 0) for place in range(min(most, 20))]


class HalfRight(Repeating):
    """Finds what follows, or what does not, by turns."""

    priors = (0.9,)

    def find(self, path: Sequence[int], most: int) -> list[Found]:
        text = [*self.text, *path]
        step = 1 if len(text) // 3 % 2 else 4
        return [Found(place - 1, (text[-1] + step + place) % 9, 0) for place in range(min(most, 20))]


@pytest.mark.matrix
@pytest.mark.parametrize("source", [Wrong, HalfRight, Repeating])
def test_a_draft_is_no_worse_for_what_is_found_besides(source: type[Repeating]) -> None:
    """It puts what comes first, but is not sure. Finds of which it knows better give way to its own; and finds that it has on
    top, too, are no reason to think less of it."""
    tokens = torch.arange(9)
    draft = 0.5 * torch.randn((9, 9, 9), generator=torch.Generator().manual_seed(1))
    target = torch.full((9, 9, 9), -20.0)
    draft[:, tokens, (tokens + 1) % 9] += 1.2
    target[:, tokens, (tokens + 1) % 9] = 0.0
    brought, sure = [], []
    for sources in ((), (source((0, 1)),)):
        estimates = Estimates(ACCEPTANCE)
        context = TreeContext(TableModel(draft, (0, 1)), 1, lambda: dynamic(16), sources, estimates)
        judged = run_rounds(context, target, (0, 1), GREEDY, 60, most=16, levels=24)
        brought.append(sum(len(verdict.token_ids) for _, verdict in judged[20:]))
        sure.append(estimates.chosen(np.array([[0.3, 0.09, 0.09]]))[0][0, 0])
    assert brought[1] >= 0.95 * brought[0]
    assert sure[1] >= sure[0] - 0.05
