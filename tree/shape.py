"""The static tree: parents in breadth-first order, so that a level is a slice and a parent precedes its children.

Knows nothing of tokens, probabilities or tensors. Node 0 is the root, the last committed token; levels count the root.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # numpy costs 0.1 s at start-up and only the mask needs it
    import numpy as np
    import numpy.typing as npt

SCHEMA_VERSION = 1


@dataclass(frozen=True)  # not slotted: cached_property keeps derived tables in the instance's __dict__
class TreeShape:
    """A rooted, ordered tree. Equality, hash and JSON depend on `parents` alone.

    parents[0] is -1 and parents[v] < v; parents never decrease, which makes the order breadth-first: the nodes of a
    level are contiguous, and so are the children of a node, in draw order. ValueError names the first node that breaks
    this.
    """

    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_parents(self.parents)

    # -- constructors ------------------------------------------------------------------------------------------------

    @classmethod
    def root_only(cls) -> "TreeShape":
        """Plain decoding: no speculation, one token per pass."""
        return cls((-1,))

    @classmethod
    def chains(cls, width: int, draft_levels: int) -> "TreeShape":
        """`width` independent chains of `draft_levels` tokens below one root (SpecInfer's width x depth trees)."""
        width = _at_least("width", width, 1)
        num_draft_nodes = width * _at_least("draft_levels", draft_levels, 1)
        return cls((-1, *(max(0, node - width) for node in range(1, num_draft_nodes + 1))))

    # -- derived tables ----------------------------------------------------------------------------------------------

    @property
    def num_nodes(self) -> int:
        return len(self.parents)

    @property
    def num_levels(self) -> int:
        """Levels including the root: the most tokens that a pass over this tree can emit."""
        return self.depths[-1] + 1

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Edges between the root and each node; never decreasing."""
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return tuple(depths)

    @cached_property
    def levels(self) -> tuple[range, ...]:
        """Nodes of each level, root level first."""
        starts = [node for node in range(self.num_nodes) if node == 0 or self.depths[node] != self.depths[node - 1]]
        return tuple(range(*bounds) for bounds in zip(starts, [*starts[1:], self.num_nodes], strict=True))

    @cached_property
    def num_children(self) -> tuple[int, ...]:
        """Children of each node."""
        counts = [0] * self.num_nodes
        for parent in self.parents[1:]:
            counts[parent] += 1
        return tuple(counts)

    @cached_property
    def _child_starts(self) -> tuple[int, ...]:  # [num_nodes + 1]: the children of v are start[v] .. start[v + 1] - 1
        return tuple(accumulate(self.num_children, initial=1))

    def children(self, node: int) -> range:
        """Children of `node` in draw order."""
        return range(self._child_starts[node], self._child_starts[node + 1])

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """Which child of its parent each node is, from 0; -1 for the root, which is nobody's child."""
        return (-1, *(node - self._child_starts[parent] for node, parent in enumerate(self.parents[1:], start=1)))

    @cached_property
    def expanded(self) -> tuple[tuple[int, ...], ...]:
        """Per level, the nodes that have children; the last level has none."""
        return tuple(tuple(node for node in level if self.num_children[node]) for level in self.levels)

    @cached_property
    def max_branching(self) -> int:
        """Most children of any node; 0 for the root alone."""
        return max(self.num_children)

    @cached_property
    def post_order(self) -> tuple[int, ...]:
        """Every node after its children, children in draw order; the root is last."""
        # Reversed, this is a pre-order that takes the last child first, which one stack produces.
        order, stack = [], [0]
        while stack:
            node = stack.pop()
            order.append(node)
            stack.extend(self.children(node))
        return tuple(reversed(order))

    @cached_property
    def ancestor_mask(self) -> "npt.NDArray[np.bool_]":
        """Row v marks the root, v and every node between them: what v attends to. [N, N] bool, read-only."""
        import numpy as np

        mask = np.eye(self.num_nodes, dtype=np.bool_)
        for level in self.levels[1:]:
            mask[level.start : level.stop] |= mask[list(self.parents[level.start : level.stop])]
        mask.setflags(write=False)
        return mask

    def path(self, node: int) -> tuple[int, ...]:
        """Nodes from the root to `node`, both included."""
        if not 0 <= node < self.num_nodes:
            raise ValueError(f"node {node} is not in a tree of {self.num_nodes} nodes")
        nodes = [node]
        while nodes[-1]:
            nodes.append(self.parents[nodes[-1]])
        return tuple(reversed(nodes))

    def truncated(self, num_levels: int) -> "TreeShape":
        """The first `num_levels` levels: a prefix in breadth-first order, so node numbers stay; self if nothing is cut."""
        if _at_least("num_levels", num_levels, 1) >= self.num_levels:
            return self
        return TreeShape(self.parents[: self.levels[num_levels].start])

    # -- JSON --------------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, object]:
        """A document for `json.dumps`. Only schema_version and parents are read back; the rest is for people."""
        return {
            "schema_version": SCHEMA_VERSION,
            "num_nodes": self.num_nodes,
            "num_levels": self.num_levels,
            "nodes_per_level": [len(level) for level in self.levels],
            "parents": list(self.parents),
        }

    @classmethod
    def from_json(cls, document: object) -> "TreeShape":
        """From a parsed document or from its text. ValueError names the field or the node at fault."""
        if isinstance(document, str):
            document = _parse_json(document)
        if not isinstance(document, Mapping):
            raise ValueError(f"a tree file holds a JSON object, not {type(document).__name__}")
        if document.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"tree schema_version is {document.get('schema_version')!r}, expected {SCHEMA_VERSION}")
        parents = document.get("parents")
        if not isinstance(parents, list):
            raise ValueError(f'tree field "parents" must be a list, not {type(parents).__name__}')
        return cls(tuple(parents))


def _at_least(name: str, value: int, least: int) -> int:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")
    return value


def _parse_json(text: str) -> object:
    try:
        document: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"a tree file must be JSON: {error}") from error
    return document


def _check_parents(parents: tuple[int, ...]) -> None:
    if not parents:
        raise ValueError("a tree needs at least its root: parents is empty")
    for node, parent in enumerate(parents):
        if type(parent) is not int:  # JSON's true is an int to isinstance
            raise ValueError(f"node {node} has parent {parent!r}, which is not an integer")
        if not -1 <= parent < len(parents):
            raise ValueError(f"node {node} has parent {parent}, outside the {len(parents)} nodes of the tree")
    if parents[0] != -1:
        raise ValueError(f"node 0 must be the root (parent -1), but its parent is {parents[0]}")
    for node in range(1, len(parents)):
        _check_order(parents, node)


def _check_order(parents: tuple[int, ...], node: int) -> None:
    parent = parents[node]
    if parent == -1:
        raise ValueError(f"two roots: node 0 and node {node}")
    if parent >= node:
        cycle = _cycle_through(parents, node)
        if cycle:
            raise ValueError(f"node {node} is on a cycle: {' -> '.join(map(str, cycle))}")
        raise ValueError(f"node {node} comes before its parent {parent}")
    if parent < parents[node - 1]:
        raise ValueError(
            f"node {node} (parent {parent}) follows node {node - 1} (parent {parents[node - 1]}): "
            "parents must not decrease in breadth-first order"
        )


def _cycle_through(parents: tuple[int, ...], node: int) -> list[int]:
    """The nodes from `node` back to itself along parents; empty if that walk ends at the root or in another cycle."""
    walk = [node]
    while len(walk) <= len(parents) and parents[walk[-1]] != -1:
        walk.append(parents[walk[-1]])
        if walk[-1] == node:
            return walk
    return []
