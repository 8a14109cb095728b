"""The best static tree for an acceptance, a number of nodes and a number of levels; expected tokens of any tree.

A node is worth f(v), the product of the acceptance of the ranks on its path, and E[tokens per pass] is the sum of f
over the tree, root included (Sequoia, arXiv 2402.12374, proposition 3.4). While acceptance does not increase with rank,
a parent and an earlier sibling are worth at least as much as a node, so the n most valuable nodes are a tree, and the
best one; no dynamic programme is needed, with bounded levels and branching neither. Measured vectors that
do increase are smoothed first.

With at most W nodes a level, keep on each level the W most valuable children of the nodes kept above; the n most valuable of
all that is kept are the best tree. Proof: on every level, the j-th best kept node is worth at least as much as the j-th
best node of any tree T within the bounds. This holds for the root. If it holds on a level, pair T's j-th best node there
with the j-th best kept one; every child that T can have is paired with the child of the same rank, worth at least as much, so
T's next level, at most W such children, is no better than the W best children of the kept nodes. Hence T's n nodes are paired
with n different kept nodes of no less value, and the n best kept ones are worth as much again. They are a tree: a kept node's
parent and earlier siblings are kept, and worth at least as much.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .acceptance import Acceptance
from .shape import TreeShape

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class _Level:
    """Candidate nodes of one level in breadth-first order: their f, and their parents' positions in the level above."""

    values: Floats
    parents: Ints


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Growth:
    """How the best trees grow: nodes, the most valuable first. Of those within any number of levels, the first n are the best
    tree of n nodes, or all are, where the bounds hold no more; that is so up to `num_nodes` nodes and `num_levels` levels.

    values: [M] float64, f by the smoothed acceptance. depths: [M] int64. opens: [M] bool, whether a node is the first child of
    its parent, which a draft computes from then on.
    """

    num_nodes: int
    num_levels: int
    values: Floats
    depths: Ints
    opens: Bools

    def within(self, num_levels: int) -> "Growth":
        """The growth within no more than `num_levels` levels."""
        nodes = np.flatnonzero(self.depths < num_levels)[: self.num_nodes]
        return Growth(
            num_nodes=self.num_nodes,
            num_levels=num_levels,
            values=self.values[nodes],
            depths=self.depths[nodes],
            opens=self.opens[nodes],
        )

    def holds(self, sizes: Ints) -> Bools:
        """Whether there are trees of so many nodes: [S]."""
        return np.asarray(sizes <= len(self.values))

    def expected_tokens(self, sizes: Ints) -> Floats:
        """E[tokens per pass] of the trees of so many nodes, or of the largest there is: [S] to [S]."""
        return np.asarray(np.cumsum(self.values)[np.minimum(sizes, len(self.values)) - 1])

    def expanded(self, sizes: Ints) -> Ints:
        """How many nodes of each level have children, which are the rows that a draft computes there, in trees of so
        many nodes, ascending: [S] to [S, num_levels]."""
        first = np.flatnonzero(self.opens)
        rows = np.searchsorted(sizes, first, side="right")  # the smallest of the trees that hold the node
        cells = rows * self.num_levels + self.depths[first] - 1
        counts = np.bincount(cells, minlength=(len(sizes) + 1) * self.num_levels).reshape(-1, self.num_levels)
        return counts[:-1].cumsum(axis=0)


def isotonic(vector: Sequence[float]) -> Floats:
    """The non-increasing vector nearest to `vector` in least squares (pool adjacent violators)."""
    blocks: list[tuple[float, int]] = []  # (sum, length), means strictly decreasing
    for value in vector:
        total, length = float(value), 1
        while blocks and blocks[-1][0] * length <= total * blocks[-1][1]:
            total, length = total + blocks[-1][0], length + blocks[-1][1]
            blocks.pop()
        blocks.append((total, length))
    return np.concatenate([np.full(length, total / length) for total, length in blocks])


def best_tree(
    acceptance: Acceptance,
    num_nodes: int,
    num_levels: int,
    *,
    max_branching: int | None = None,
    max_level_width: int | None = None,
) -> TreeShape:
    """The tree of `num_nodes` nodes within `num_levels` levels, root counted in both, with the most expected tokens.

    `max_branching` bounds the children of a node, `max_level_width` the nodes of a level. Of equally valuable nodes the
    shallower comes first, then the earlier in breadth-first order, so the result is unique. A tree has fewer nodes where
    the bounds and the ranks that the acceptance knows hold no more.
    """
    levels = _candidates(acceptance, num_nodes, num_levels, max_branching, max_level_width)
    # Positions in the candidate levels laid end to end: ascending, they are in breadth-first order.
    chosen = _largest(np.concatenate([level.values for level in levels]), num_nodes)
    starts = np.cumsum([0, 0, *(len(level.values) for level in levels)])  # of the level above each level
    parents = np.concatenate([level.parents + start for level, start in zip(levels, starts[:-2], strict=True)])
    return TreeShape((-1, *np.searchsorted(chosen, parents[chosen[1:]]).tolist()))


def node_values(shape: TreeShape, acceptance: Acceptance) -> tuple[float, ...]:
    """f at [node], the probability that its path is accepted, by `acceptance` as given, not smoothed; ranks beyond its
    vectors count 0."""
    parents, ranks = np.array(shape.parents), np.array(shape.ranks)
    values = np.ones(shape.num_nodes)
    for level, nodes in enumerate(shape.levels[1:]):
        known = acceptance.vector(level)[: shape.max_branching]
        vector = np.zeros(shape.max_branching)
        vector[: len(known)] = known
        span = slice(nodes.start, nodes.stop)
        values[span] = values[parents[span]] * vector[ranks[span]]
    return tuple(values.tolist())


def expected_tokens(shape: TreeShape, acceptance: Acceptance) -> float:
    """E[tokens per pass] of `shape`, values as in `node_values`."""
    return float(sum(node_values(shape, acceptance)))


def best_part(shape: TreeShape, acceptance: Acceptance, num_nodes: int) -> TreeShape:
    """The `num_nodes` nodes of `shape` that are most often accepted, values as in `node_values`; of equals the first in
    breadth-first order. A tree again, as no node is accepted more often than its parent; `shape` itself if it is no larger."""
    if num_nodes < 1:
        raise ValueError(f"a tree has at least its root, not {num_nodes} nodes")
    values = node_values(shape, acceptance)
    kept = sorted(sorted(range(shape.num_nodes), key=lambda node: -values[node])[:num_nodes])
    places = {node: place for place, node in enumerate(kept)}
    return TreeShape((-1, *(places[shape.parents[node]] for node in kept[1:])))


def growth(
    acceptance: Acceptance,
    num_nodes: int,
    num_levels: int,
    *,
    max_branching: int | None = None,
    max_level_width: int | None = None,
) -> Growth:
    """The best trees of all sizes up to `num_nodes` and all numbers of levels up to `num_levels` at once, bounds and ties as in
    `best_tree`: each is the one before with one node more, the most valuable of the rest."""
    levels = _candidates(acceptance, num_nodes, num_levels, max_branching, max_level_width)
    values = np.concatenate([level.values for level in levels])
    depths = np.repeat(np.arange(len(levels)), [len(level.values) for level in levels])
    # The first of its siblings in breadth-first order is the most valuable.
    opens = np.concatenate([[False], *(np.diff(level.parents, prepend=-1) > 0 for level in levels[1:])])
    order = np.argsort(-values, kind="stable")
    return Growth(num_nodes=num_nodes, num_levels=num_levels, values=values[order], depths=depths[order], opens=opens[order])


def _candidates(
    acceptance: Acceptance, num_nodes: int, num_levels: int, max_branching: int | None, max_level_width: int | None
) -> list[_Level]:
    """Per level, the nodes that may be among the `num_nodes` best of this level and those above it."""
    bounds = {"nodes": num_nodes, "levels": num_levels, "children": max_branching, "nodes a level": max_level_width}
    for name, bound in bounds.items():
        if bound is not None and bound < 1:
            raise ValueError(f"a tree cannot be bounded by {bound} {name}")
    width = min(num_nodes, max_level_width or num_nodes)
    levels = [_Level(np.ones(1), np.zeros(1, dtype=np.int64))]
    pool = levels[0].values
    smooth = [isotonic(vector)[:max_branching] for vector in acceptance.levels]
    for level in range(num_levels - 1):
        vector = smooth[min(level, len(smooth) - 1)]
        values = np.multiply.outer(levels[-1].values, vector).ravel()
        # The n-th best so far only rises with depth: a node that does not beat it never will, nor will its descendants.
        eligible = np.flatnonzero(values > (pool.min() if len(pool) == num_nodes else -1.0))
        kept = eligible[_largest(values[eligible], width)]
        pool = np.concatenate([pool, values[kept]])
        pool = pool[_largest(pool, num_nodes)]
        kept = kept[values[kept] >= pool.min()]
        if not len(kept):
            break
        levels.append(_Level(values[kept], kept // len(vector)))
    return levels


def _largest(values: Floats, count: int) -> Ints:
    """Positions, ascending, of the `count` largest values (all if there are fewer); of equals, the first."""
    if len(values) <= count:
        return np.arange(len(values))
    threshold = np.partition(values, len(values) - count)[len(values) - count]
    above = values > threshold
    above[np.flatnonzero(values == threshold)[: count - int(above.sum())]] = True
    return np.flatnonzero(above)
