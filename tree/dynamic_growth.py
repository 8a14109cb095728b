"""How trees that follow the text grow on average, for an acceptance that is counted by context.

A node's children are worth its own value times the acceptance of the context in which it is, and contexts are taken to come and
go independently of each other, with the shares that they have. Then the expected number of nodes of each value on a level
follows from that of the level above: as values are products, by a convolution over their logarithms. Nodes above a threshold
are the tree (OPT-Tree, arXiv 2406.17276, and DySpec, arXiv 2410.11744, grow such trees); the threshold sets its size. A tree of
exactly n nodes in every round has a little less, as one threshold for all rounds is the best there is.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from .acceptance import Acceptance
from .optimizer import isotonic

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

STEP = 0.03  # of the grid of logarithms
LEAST_VALUE = 1e-6  # the grid ends there: less probable nodes are in no tree


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DynamicGrowth:
    """Of all nodes that are worth at least as much as each place of a grid [G] from the most valuable on: how many there are
    within so many levels, and what they are worth together; and how many of each level a draft runs. Answers as
    `tree.optimizer.Growth` does, of average trees: numbers of nodes are no whole ones.

    counts, tokens, runs: [most levels, G].
    """

    num_levels: int
    counts: Floats
    tokens: Floats
    runs: Floats

    def within(self, num_levels: int) -> "DynamicGrowth":
        """The growth within no more than `num_levels` levels."""
        return replace(self, num_levels=num_levels)

    def holds(self, sizes: Ints) -> Bools:
        """Whether there are trees of so many nodes: [S]."""
        return np.asarray(sizes <= self._row(self.counts)[-1] + 1e-6)

    def expected_tokens(self, sizes: Ints) -> Floats:
        """E[tokens per pass] of trees of so many nodes, or of the largest there are: [S] to [S]."""
        return np.asarray(np.interp(sizes, self._row(self.counts), self._row(self.tokens)))

    def expanded(self, sizes: Ints) -> Floats:
        """How many nodes of each level a draft runs, in trees of so many nodes: [S] to [S, num_levels]."""
        counts = self._row(self.counts)
        at = np.interp(sizes, counts, np.arange(len(counts)))
        places = np.minimum(at.astype(np.int64), len(counts) - 2)
        runs = self.runs[: self.num_levels - 1]
        between = runs[:, places] + (at - places) * (runs[:, places + 1] - runs[:, places])  # [levels, S]
        found = np.zeros((len(sizes), self.num_levels))
        found[:, : len(runs)] = between.T
        return found

    def _row(self, table: Floats) -> Floats:
        return np.asarray(table[min(self.num_levels, len(table)) - 1])


@lru_cache(maxsize=16)
def dynamic_growth(acceptance: Acceptance, num_levels: int, max_branching: int) -> DynamicGrowth:
    """Of trees within `num_levels` levels whose nodes have at most `max_branching` children. ValueError for an acceptance
    that is not counted by context."""
    if not acceptance.contexts:
        raise ValueError("this acceptance is not counted by context: there is nothing for trees to follow")
    values = np.exp(-STEP * np.arange(round(-np.log(LEAST_VALUE) / STEP)))  # [G]
    total = sum(context.share for context in acceptance.contexts)
    children, first = np.zeros_like(values), 0.0
    for context in acceptance.contexts:
        vector = isotonic(context.acceptance)[:max_branching]
        children += context.share / total * _on_grid(vector, len(values))
        first += context.share / total * float(vector[0])
    # Before a node is run, its context is not known. A level is run when the first child of its best node is worth it on
    # average, and all that is in the tree with it.
    first_child = _on_grid(np.array([first]), len(values))
    nodes, firsts = [_on_grid(np.ones(1), len(values))], list[Floats]()
    for _ in range(num_levels):
        firsts.append(np.convolve(nodes[-1], first_child)[: len(values)])
        nodes.append(np.convolve(nodes[-1], children)[: len(values)])
    found = np.cumsum(nodes[:-1], axis=0)  # [levels, G]
    return DynamicGrowth(
        num_levels=num_levels,
        counts=np.cumsum(found, axis=1),
        tokens=np.cumsum(found * values, axis=1),
        runs=np.cumsum(nodes[:-1], axis=1) * np.minimum(np.cumsum(firsts, axis=1), 1.0),
    )


def _on_grid(probabilities: Floats, length: int) -> Floats:
    """How many of them there are at each place of the grid. Between two places, each counts to both so that number and sum are
    right; what is less than the grid has is left out."""
    found = np.zeros(length + 1)
    some = probabilities[probabilities > LEAST_VALUE]
    places = np.minimum(np.floor(-np.log(some) / STEP).astype(np.int64), length - 1)
    above, below = np.exp(-STEP * places), np.exp(-STEP * (places + 1))
    shares = np.clip((some - below) / (above - below), 0.0, 1.0)
    np.add.at(found, places, shares)
    np.add.at(found, places + 1, 1 - shares)
    return found[:length]
