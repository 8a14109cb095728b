"""A tree that grows where it is worth most: its nodes, the children that they may yet have, and which come next.

Knows what nodes are worth, and neither logits nor laws: candidates come in as lists. A node that the model has run has open
slots, its next children in order. What a slot is worth is known before its child is in the tree.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(slots=True, eq=False)
class Node:
    """A token in a growing tree.

    value: the estimated probability that the text runs through it. rank: which of its parent's candidates it is; -1 of a find.
    run: its place in the model, -1 of the root; None if the model has not run it. row: where its children's probabilities are.
    top: the draft's largest probability after it. Of its candidates, the first `num_taken` are children: token_ids and
    probabilities [K], and `shares` [K], what each is worth of the node's own value, not increasing.
    """

    parent: "Node | None"
    token_id: int
    depth: int
    value: float
    rank: int = -1
    drawn: bool = False
    source: tuple[int, int, float] | None = None  # which source found it, in which bin, and what that is assumed to be worth
    run: int | None = None
    row: int = -1
    top: float = float("nan")
    submitted: bool = False
    ahead: bool = False
    children: list["Node"] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    num_taken: int = 0

    @property
    def slot_value(self) -> float:
        """What its next child is worth; 0 if it can have none."""
        return self.value * self.shares[self.num_taken] if self.num_taken < len(self.shares) else 0.0

    def path(self) -> list["Node"]:
        """From below the root to the node itself."""
        nodes, node = [], self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


class GrowingTree:
    """Nodes in the order in which they came, the root first; a parent comes before its children."""

    def __init__(self, root_token_id: int, *, sampled: bool) -> None:
        self.sampled = sampled
        self.nodes = [Node(None, root_token_id, 0, 1.0)]
        self.num_run = 0  # nodes that the model knows, the root aside
        self._heap: list[tuple[float, int, Node]] = []  # of nodes that are not run, and of run ones with open slots
        self._order = 0
        self._pool, self._num_pooled = np.empty(1024), 0  # values of all slots that there have been, and of finds
        self._pool_up(np.ones(1))

    @property
    def root(self) -> Node:
        return self.nodes[0]

    # -- what grows ---------------------------------------------------------------------------------------------------------

    def open(self, node: Node, token_ids: list[int], probabilities: list[float], shares: Floats, top: float) -> None:
        """The model has run `node`: these are its candidates [K], and what they are worth of its value."""
        node.token_ids, node.probabilities, node.shares, node.top = token_ids, probabilities, shares.tolist(), top
        self._pool_up(node.value * shares)
        self._push(node)

    def attach(self, node: Node) -> Node:
        """The next child of `node`, which becomes one of the tree's."""
        rank = node.num_taken
        child = Node(node, node.token_ids[rank], node.depth + 1, node.slot_value, rank, drawn=self.sampled)
        node.num_taken += 1
        self._add(child)
        return child

    def attach_found(self, node: Node, token_id: int, share: float, source: tuple[int, int, float]) -> Node:
        """A child of `node` that was found. The model has not run `node` yet."""
        child = Node(node, token_id, node.depth + 1, node.value * share, source=source)
        self._pool_up(np.array([child.value]))
        self._add(child)
        self._push(child)
        return child

    def due(self, threshold: float, most: int, most_nodes: int, max_depth: int) -> list[Node]:
        """At most `most` nodes to be run next, the most valuable first, among those worth at least `threshold`; slots that are
        worth as much become nodes first, up to `most_nodes` nodes in all. No node gets children below `max_depth`."""
        batch, rest = list[Node](), []
        while self._heap and -self._heap[0][0] >= threshold and len(batch) < most:
            entry = heappop(self._heap)
            node = entry[-1]
            if node.depth >= max_depth or (node.run is not None and len(self.nodes) >= most_nodes):
                rest.append(entry)
            elif node.run is None:
                batch.append(node)
            else:
                self._push(self.attach(node))
                self._push(node)
        for entry in rest:
            heappush(self._heap, entry)
        return batch

    def put_back(self, batch: Sequence[Node]) -> None:
        """These are not run after all, for now."""
        for node in batch:
            self._push(node)

    def fill(self, most_nodes: int, threshold: float, max_depth: int) -> None:
        """Take the best slots worth at least `threshold` as leaves, up to `most_nodes` nodes in all."""
        rest = []
        while self._heap and -self._heap[0][0] >= threshold and len(self.nodes) < most_nodes:
            entry = heappop(self._heap)
            node = entry[-1]
            if node.run is None or node.depth >= max_depth:
                rest.append(entry)
            else:
                rest.append(self._entry(self.attach(node)))
                self._push(node)
        for entry in rest:
            heappush(self._heap, entry)

    def nth_value(self, count: int) -> float:
        """The `count`-th largest value of all nodes and slots; 0 if there are fewer."""
        pooled = self._pool[: self._num_pooled]
        if count > len(pooled):
            return 0.0
        return float(np.partition(pooled, len(pooled) - count)[len(pooled) - count])

    # -- what is verified ---------------------------------------------------------------------------------------------------

    def submitted(self, num_nodes: int, max_depth: int) -> list[Node]:
        """The nodes to be verified, in breadth-first order, siblings as they are to be offered: drawn ones first
        (docs/losslessness.md, section 6), then by value. Where any may be drawn, those that came first; else the best."""
        nodes = [node for node in self.nodes if node.depth <= max_depth]
        if not self.sampled:
            nodes = sorted(nodes, key=lambda node: -node.value)
        for node in nodes[:num_nodes]:
            node.submitted = True
        return list(_breadth_first(self.root))

    # -- the next tree ------------------------------------------------------------------------------------------------------

    def below(self, root: Node) -> tuple["GrowingTree", list[int]]:
        """What hangs below a node that was run, as a tree of its own; and where the model has the nodes of it that were run,
        ascending, which are its nodes 0, 1, ... from here on. This tree is of no use afterwards."""
        members = {id(root)}
        nodes = [root]
        for node in self.nodes:
            if node.parent is not None and id(node.parent) in members:
                members.add(id(node))
                nodes.append(node)
        kept = sorted(node.run for node in nodes[1:] if node.run is not None)
        places = {run: place for place, run in enumerate(kept)}
        tree = GrowingTree(root.token_id, sampled=self.sampled)
        depth, scale = root.depth, 1 / root.value if root.value > 0 else 0.0
        root.parent, root.run = None, -1
        for node in nodes:
            node.depth -= depth
            node.value, node.ahead, node.submitted = min(1.0, node.value * scale), True, False
            if node is not root and node.run is not None:
                node.run = places[node.run]
        tree._take_over(nodes, len(kept))
        return tree, kept

    def copy(self) -> "GrowingTree":
        """The same tree, of nodes of its own."""
        tree = GrowingTree(self.root.token_id, sampled=self.sampled)
        copies: dict[int, Node] = {}
        for node in self.nodes:
            parent = copies[id(node.parent)] if node.parent is not None else None
            copies[id(node)] = clone = Node(
                parent, node.token_id, node.depth, node.value, node.rank, node.drawn, node.source, node.run, node.row, node.top
            )
            clone.ahead, clone.num_taken = node.ahead, node.num_taken
            clone.token_ids, clone.probabilities, clone.shares = node.token_ids, node.probabilities, node.shares
            if parent is not None:
                parent.children.append(clone)
        tree._take_over(list(copies.values()), self.num_run)
        return tree

    # -- inside -------------------------------------------------------------------------------------------------------------

    def _take_over(self, nodes: list[Node], num_run: int) -> None:
        self.nodes, self.num_run = nodes, num_run
        for node in nodes:
            self._pool_up(node.value * np.array(node.shares))
            if node.source is not None:
                self._pool_up(np.array([node.value]))
            self._push(node)

    def _add(self, child: Node) -> None:
        assert child.parent is not None
        child.parent.children.append(child)
        self.nodes.append(child)

    def _entry(self, node: Node) -> tuple[float, int, Node]:
        self._order += 1
        return -(node.value if node.run is None else node.slot_value), self._order, node

    def _push(self, node: Node) -> None:
        if node.run is None or node.num_taken < len(node.shares):
            heappush(self._heap, self._entry(node))

    def _pool_up(self, values: Floats) -> None:
        end = self._num_pooled + len(values)
        if end > len(self._pool):
            self._pool = np.concatenate([self._pool, np.empty(max(end, len(self._pool)))])
        self._pool[self._num_pooled : end] = values
        self._num_pooled = end


def _breadth_first(root: Node) -> Iterator[Node]:
    level = [root]
    while level:
        yield from level
        level = [child for node in level for child in _offered(node.children)]


def _offered(children: Sequence[Node]) -> list[Node]:
    """Those that are verified, in the order in which they are offered: drawn ones as they were drawn, then chosen ones."""
    shown = [child for child in children if child.submitted]
    if len(shown) > 1:
        shown.sort(key=lambda child: (not child.drawn, child.rank if child.drawn else -child.value))
    return shown
