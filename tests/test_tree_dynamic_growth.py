"""Predictions of trees that follow the text, beside trees that were grown."""

from collections.abc import Sequence
from heapq import heappop, heappush

import numpy as np
import pytest

from tree.acceptance import Acceptance, Context
from tree.dynamic_growth import dynamic_growth
from tree.optimizer import best_tree, expected_tokens, growth

SURE, EASY, HARD = (0.97, 0.01, 0.005), (0.7, 0.12, 0.05, 0.02), (0.35, 0.15, 0.1, 0.06, 0.04)
CONTEXTS = (Context(0.5, 0.25, HARD), Context(0.9, 0.35, EASY), Context(1.0, 0.4, SURE))


def mixed(contexts: Sequence[Context]) -> tuple[float, ...]:
    ranks = max(len(context.acceptance) for context in contexts)
    return tuple(
        sum(context.share * (*context.acceptance, *(0.0,) * ranks)[rank] for context in contexts) for rank in range(ranks)
    )


ACCEPTANCE = Acceptance((mixed(CONTEXTS),), contexts=CONTEXTS)


def grown_tokens(num_nodes: int, generator: np.random.Generator) -> float:
    """The sum of values of one tree of `num_nodes` nodes, each node in a context of its own, best first."""
    shares, tokens, order = [context.share for context in CONTEXTS], 0.0, 0
    heap: list[tuple[float, int, float, tuple[float, ...], int]] = [(-1.0, 0, 1.0, (1.0,), 0)]
    for _ in range(num_nodes):
        value, _, above, ranks, rank = heappop(heap)
        tokens -= value
        if rank + 1 < len(ranks):
            heappush(heap, (-above * ranks[rank + 1], order + 1, above, ranks, rank + 1))
        below = CONTEXTS[generator.choice(len(CONTEXTS), p=shares)].acceptance
        heappush(heap, (value * below[0], order + 2, -value, below, 0))
        order += 2
    return tokens


@pytest.mark.parametrize("num_nodes", [8, 64])
def test_the_mean_of_trees_that_were_grown_is_what_was_predicted(num_nodes: int) -> None:
    """Within 2.5 %, which is what one size for all costs, and four standard errors (1 in 16,000)."""
    generator = np.random.default_rng(7)
    found = [grown_tokens(num_nodes, generator) for _ in range(300)]
    expected = float(dynamic_growth(ACCEPTANCE, 64, 1000).expected_tokens(np.array([num_nodes]))[0])
    error = 4 * float(np.std(found)) / len(found) ** 0.5
    assert np.mean(found) - error <= expected <= 1.025 * np.mean(found) + error


def test_trees_that_follow_the_text_have_more_than_the_best_that_do_not() -> None:
    for num_nodes in (16, 64, 256):
        static = expected_tokens(best_tree(ACCEPTANCE, num_nodes, 40), ACCEPTANCE)
        assert dynamic_growth(ACCEPTANCE, 64, 1000).expected_tokens(np.array([num_nodes]))[0] > 1.05 * static


def test_one_context_is_the_static_tree() -> None:
    one = Acceptance((EASY,), contexts=(Context(1.0, 1.0, EASY),))
    sizes = np.array([2, 16, 64, 256])
    for num_levels in (4, 12):
        static, found = growth(one, 256, num_levels), dynamic_growth(one, 64, 1000).within(num_levels)
        assert found.expected_tokens(sizes) == pytest.approx(static.expected_tokens(sizes), rel=0.01)
        rows = found.expanded(sizes)
        assert rows.shape == (4, num_levels) and np.all(rows[:, -1] == 0) and np.all(rows.sum(axis=1) <= sizes)


def test_what_is_asked_for_beyond_the_levels_and_ranks_there_are_is_not_held() -> None:
    found = dynamic_growth(ACCEPTANCE, 64, 2).within(3)
    assert found.holds(np.array([7, 8])).tolist() == [True, False]
    with pytest.raises(ValueError, match="not counted by context"):
        dynamic_growth(Acceptance((EASY,)), 64, 1000)
