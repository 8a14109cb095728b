"""A tree that grows where it is worth most: its nodes, the children that they may yet have, and which come next.

Knows what nodes are worth, and neither logits nor laws: candidates come in as lists. A node that the model has run has open
slots, its next children in order. What a slot is worth is known before its child is in the tree.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Find:
    """A source, by its place, that proposed a token; in which bin, and how good the source says that such finds are."""

    source: int
    bin: int
    prior: float


@dataclass(slots=True, eq=False)
class Node:
    """A token in a growing tree.

    value: the estimated probability that the text runs through it. rank: which of its parent's candidates it is, and `find` who
    proposed it besides, or alone: then rank is -1. comes_last: whether no sibling is drawn from a row that has its token.
    run: its place in the model, -1 of the root; None if the model has not run it. row: where its children's probabilities are.
    top: the draft's largest probability after it; `left` that of what its found children leave of the row, renormalised.
    ahead: whether it was there before its round began.

    Of its candidates, `num_taken` have become children; the others are its slots, to be taken in order. token_ids and
    probabilities [K], and shares [K], what each is worth of the node's own value, not increasing.
    """

    parent: "Node | None"
    token_id: int
    depth: int
    value: float
    rank: int = -1
    drawn: bool = False
    comes_last: bool = False
    find: Find | None = None
    run: int | None = None
    row: int = -1
    top: float = float("nan")
    left: float = 0.0
    submitted: bool = False
    ahead: bool = False
    children: list["Node"] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    num_taken: int = 0

    @property
    def is_open(self) -> bool:
        """Whether it may have one child more."""
        return self.num_taken < len(self.shares)

    @property
    def urgency(self) -> float:
        """What it is worth to run it; of one that was run, what its next child is worth."""
        if self.run is None:
            return self.value
        return self.value * self.shares[self.num_taken] if self.is_open else 0.0

    def path(self) -> list[int]:
        """Tokens from below the root to its own."""
        token_ids, node = list[int](), self
        while node.parent is not None:
            token_ids.append(node.token_id)
            node = node.parent
        return token_ids[::-1]


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

    def open(self, node: Node, token_ids: list[int], probabilities: list[float], shares: list[float]) -> None:
        """The model has run `node`: these are its candidates [K], and what they are worth of its value."""
        node.token_ids, node.probabilities, node.shares = token_ids, probabilities, shares
        self._pool_up(node.value * np.array(shares))
        self._push(node)

    def attach(self, node: Node) -> Node:
        """The next candidate of `node` becomes a child of it."""
        rank = node.num_taken
        child = Node(node, node.token_ids[rank], node.depth + 1, node.urgency, rank, self.sampled, not self.sampled)
        node.num_taken += 1
        self._add(child)
        return child

    def attach_found(self, node: Node, token_id: int, share: float, find: Find) -> Node:
        """A child of `node` that was found, which is worth `share` of it, or the child that has the token already. Candidates
        that are no children yet give way: what is left of a race without a token is a race among the others."""
        child = next((child for child in node.children if child.token_id == token_id), None)
        if child is None and token_id in node.token_ids[node.num_taken :]:
            self._withdraw(node, node.token_ids.index(token_id))
        if child is None:
            child = Node(node, token_id, node.depth + 1, 0.0, comes_last=node.run is None or not self.sampled)
            self._add(child)
        child.find = child.find or find
        self.raise_to(child, node.value * share)
        return child

    def raise_to(self, node: Node, value: float) -> None:
        """`node` is worth no less than `value`, and what hangs below it the more."""
        if value <= node.value:
            return
        factor, raised = value / node.value if node.value > 0 else 0.0, [node]
        node.value = value
        for member in raised:
            for child in member.children:
                child.value *= factor
                raised.append(child)
        self._pool_up(np.array([value]))
        for member in raised:
            self._push(member)

    def _withdraw(self, node: Node, place: int) -> None:
        """A candidate is none any more. Those behind it move up, to what its place is worth; what a chosen one is worth by
        itself, the others are."""
        del node.token_ids[place], node.probabilities[place], node.shares[-1 if self.sampled else place]
        self._push(node)

    def due(self, threshold: float, most: int, most_nodes: int, max_depth: int) -> list[Node]:
        """At most `most` nodes to be run next, the most valuable first, among those worth at least `threshold`; slots that are
        worth as much become nodes first, up to `most_nodes` nodes in all. No node gets children below `max_depth`."""
        batch, rest = list[Node](), list[Node]()
        while len(batch) < most and (node := self._pop(threshold)) is not None:
            if node.depth >= max_depth or (node.run is not None and len(self.nodes) >= most_nodes):
                rest.append(node)
            elif node.run is None:
                batch.append(node)
            else:
                self._push(self.attach(node))
                self._push(node)
        self.put_back(rest)
        return batch

    def put_back(self, nodes: Sequence[Node]) -> None:
        """These are not run after all, for now."""
        for node in nodes:
            self._push(node)

    def fill(self, most_nodes: int, threshold: float, max_depth: int) -> None:
        """Take the best slots worth at least `threshold` as leaves, up to `most_nodes` nodes in all."""
        rest = list[Node]()
        while len(self.nodes) < most_nodes and (node := self._pop(threshold)) is not None:
            if node.run is None or node.depth >= max_depth:
                rest.append(node)
            else:
                rest.append(self.attach(node))
                self._push(node)
        self.put_back(rest)

    def nth_value(self, count: int) -> float:
        """The `count`-th largest value of all nodes and slots; 0 if there are fewer."""
        pooled = self._pool[: self._num_pooled]
        if count > len(pooled):
            return 0.0
        return float(np.partition(pooled, len(pooled) - count)[len(pooled) - count])

    # -- what is verified ---------------------------------------------------------------------------------------------------

    def submitted(self, num_nodes: int, max_depth: int) -> list[Node]:
        """The nodes to be verified, in breadth-first order, siblings as they are to be offered.
        Where any may be drawn, those that came first; else the best."""
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
        root.parent, root.run, root.rank, root.drawn, root.find = None, -1, -1, False, None
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
            lists = node.token_ids.copy(), node.probabilities.copy(), node.shares.copy()
            copies[id(node)] = clone = replace(
                node, parent=parent, children=[], token_ids=lists[0], probabilities=lists[1], shares=lists[2]
            )
            if parent is not None:
                parent.children.append(clone)
        tree._take_over(list(copies.values()), self.num_run)
        return tree

    # -- inside -------------------------------------------------------------------------------------------------------------

    def _take_over(self, nodes: list[Node], num_run: int) -> None:
        self.nodes, self.num_run = nodes, num_run
        for node in nodes:
            self._pool_up(node.value * np.array(node.shares))
            if node.rank < 0 and node is not self.root:
                self._pool_up(np.array([node.value]))
            self._push(node)

    def _add(self, child: Node) -> None:
        assert child.parent is not None
        child.parent.children.append(child)
        self.nodes.append(child)

    def _push(self, node: Node) -> None:
        if node.run is None or node.is_open:
            self._order += 1
            heappush(self._heap, (-node.urgency, self._order, node))

    def _pop(self, threshold: float) -> Node | None:
        """The most urgent node, if that is worth `threshold`. Entries that are out of date have others in their place."""
        while self._heap and -self._heap[0][0] >= threshold:
            urgency, _, node = heappop(self._heap)
            if urgency == -node.urgency and (node.run is None or node.is_open):
                return node
        return None

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
    """Those that are verified, in the order in which they are offered: as they came, but for chosen ones whose tokens siblings
    were not drawn from. Those come last, by value: there they are worth the most (docs/losslessness.md, section 6)."""
    shown = [child for child in children if child.submitted]
    if len(shown) > 1:
        shown.sort(key=lambda child: -child.value if child.comes_last else -2.0)
    return shown
