"""A tree that grows where it is worth most: its nodes, the children that they may yet have, and which come next.

Knows what nodes are worth, and neither logits nor laws: candidates come in as lists. A node that the model has run has open
slots, its next children in order. What a slot is worth is known before its child is in the tree.
"""

from collections.abc import Sequence
from dataclasses import replace
from heapq import heappop, heappush

import numpy as np
import numpy.typing as npt

from .estimates import Estimates
from .nodes import Find, Node, breadth_first

Floats = npt.NDArray[np.float64]


class GrowingTree:
    """Nodes in the order in which they came, the root first; a parent comes before its children."""

    def __init__(self, root_token_id: int, estimates: Estimates, *, sampled: bool) -> None:
        self.sampled, self._estimates = sampled, estimates
        self.nodes = [Node(None, root_token_id, 0, 1.0)]
        self.num_run = 0  # nodes that the model knows, the root aside
        self._heap: list[tuple[float, int, Node]] = []  # of nodes that are not run, and of run ones with open slots
        self._order = 0
        self._pool, self._num_pooled = np.empty(1024), 0  # values of all slots that there have been
        self._pool_up(np.ones(1))

    @property
    def root(self) -> Node:
        return self.nodes[0]

    # -- what grows ---------------------------------------------------------------------------------------------------------

    def open(self, nodes: Sequence[Node], token_ids: list[list[int]], probabilities: list[list[float]], shares: Floats) -> None:
        """The model has run these nodes: their candidates [n][K], and what they are worth [n, K] of the rest of theirs."""
        self._pool_up((np.array([node.value for node in nodes])[:, None] * self._unseen(shares)).ravel())
        for node, ids, own, worth in zip(nodes, token_ids, probabilities, shares.tolist(), strict=True):
            node.token_ids, node.probabilities, node.shares = ids, own, worth
            self._push(node)

    def attach(self, node: Node) -> Node:
        """The next candidate of `node` becomes a child of it. Nothing has looked at a drawn one before; from here on its value
        is that of what it is."""
        rank = node.num_taken
        child = Node(node, node.token_ids[rank], node.depth + 1, node.urgency, rank, self.sampled, not self.sampled)
        node.num_taken += 1
        if self.sampled:
            probability = node.probabilities[rank]
            child.drawn_with = min(probability / node.mass, 1.0) if node.mass > 1e-6 else 0.0
            share = self._estimates.taken(rank, child.drawn_with)
            child.value = node.value * node.rest * share
            node.rest, node.mass = node.rest * (1.0 - share), node.mass - probability
        self._add(child)
        return child

    def attach_found(self, node: Node, token_id: int, share: float, find: Find) -> Node:
        """A child of `node` that was found, which is worth `share` of it, or the child that has the token already. Candidates
        that are no children yet give way: what is left of a race without a token is a race among the others."""
        child = next((child for child in node.children if child.token_id == token_id), None)
        if child is None:
            self._withdraw(node, token_id)
            child = Node(node, token_id, node.depth + 1, 0.0, comes_last=node.run is None or not self.sampled)
            self._add(child)
        child.find = child.find or find
        if node.value * share > child.value:
            self.put_right(child, node.value * share)
        return child

    def put_right(self, node: Node, value: float) -> None:
        """`node` is worth `value`, as is known by now, and what hangs below it the more, or the less."""
        factor, members = value / node.value if node.value > 0 else 0.0, [node]
        node.value = value
        for member in members:
            for child in member.children:
                child.value *= factor
                members.append(child)
        for member in members:
            self._push(member)

    def _withdraw(self, node: Node, token_id: int) -> None:
        """A token is no candidate any more, and those behind it move up. Of a race, one slot goes whether the token was among
        the first or not: or what is in the race would decide whether there is a last slot."""
        slots = node.token_ids[node.num_taken :]
        if not slots or (token_id not in slots and not self.sampled):
            return
        place = node.num_taken + slots.index(token_id) if token_id in slots else -1
        if not self.sampled:
            node.beside[token_id] = node.probabilities[place]
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

    def best_value(self, max_depth: int) -> float:
        """What the most valuable node or slot is worth that may have children above `max_depth`; 0 if there is none."""
        seen = list[Node]()
        while (node := self._pop(0.0)) is not None:
            seen.append(node)
            if node.depth < max_depth:
                break
        self.put_back(seen)
        return node.urgency if node is not None else 0.0

    def nth_value(self, count: int) -> float:
        """The `count`-th largest value of all nodes and slots; 0 if there are fewer."""
        found = [node.value for node in self.nodes if node.rank < 0 and node is not self.root]
        pooled = np.concatenate([self._pool[: self._num_pooled], found])
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
        return list(breadth_first(self.root))

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
        tree = GrowingTree(root.token_id, self._estimates, sampled=self.sampled)
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
        tree = GrowingTree(self.root.token_id, self._estimates, sampled=self.sampled)
        copies: dict[int, Node] = {}
        for node in self.nodes:
            parent = copies[id(node.parent)] if node.parent is not None else None
            own = {name: getattr(node, name).copy() for name in ("token_ids", "probabilities", "shares", "beside")}
            copies[id(node)] = clone = replace(node, parent=parent, children=[], **own)
            if parent is not None:
                parent.children.append(clone)
        tree._take_over(list(copies.values()), self.num_run)
        return tree

    # -- inside -------------------------------------------------------------------------------------------------------------

    def _take_over(self, nodes: list[Node], num_run: int) -> None:
        self.nodes, self.num_run = nodes, num_run
        for node in nodes:
            self._pool_up(node.value * self._unseen(np.array([node.shares]))[0])
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

    def _unseen(self, shares: Floats) -> Floats:
        """What slots [n, K] are worth before any of their children is known."""
        if self.sampled and shares.shape[1]:
            return shares * np.cumprod(np.hstack([np.ones((len(shares), 1)), 1.0 - shares[:, :-1]]), axis=1)
        return shares

    def _pool_up(self, values: Floats) -> None:
        end = self._num_pooled + len(values)
        if end > len(self._pool):
            self._pool = np.concatenate([self._pool, np.empty(max(end, len(self._pool)))])
        self._pool[self._num_pooled : end] = values
        self._num_pooled = end
