"""Trees that grow where the draft believes that the text will go."""

from collections.abc import Sequence

import pytest
import torch

from shapes import chain
from table_models import TableModel
from tree.acceptance import Acceptance
from tree.aim import Aim
from tree.context import TreeContext
from tree.draft import DraftTree
from tree.optimizer import best_tree
from tree.sampling import SamplingParams
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
) -> list[tuple[DraftTree, Verdict]]:
    generator, text, judged = torch.Generator().manual_seed(3), list(text), []
    for _ in range(rounds):
        tree = context.grow(most, levels, params, generator, sampled=not params.greedy)
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
