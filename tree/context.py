"""One text's trees: grown through a draft model and what sources find, and followed when their verdict is known.

Knows tokens and laws, not caches: those are the model's. A tree is of the planned shape, or dynamic: where the draft believes
that the text will go, there it grows.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .aim import Aim
from .candidates import candidates_of
from .draft import DraftTree, TextModel, grow
from .estimates import MAX_CHILDREN, Estimates
from .growing import GrowingTree, Node
from .sampling import SamplingParams
from .shape import TreeShape
from .sources import TokenSource
from .transfer import index_tensor

MAX_STEP_ROWS = 256  # of one pass of the draft: wider ones are not recorded


@dataclass(frozen=True, slots=True)
class _Round:
    """What `grow` was asked for, and what came of it: `nodes` in the order of the tree that was submitted."""

    max_depth: int
    params: SamplingParams
    generator: torch.Generator
    nodes: tuple[Node, ...] = ()


class TreeContext:
    """Implements `tree.draft.DraftContext`: the trees of one text, whose last committed token is `root`.

    model: None if only `sources` propose; all of one text. aim: what trees are to be like; it may change between rounds.
    estimates: what children are worth, which verdicts teach; None for some of its own.
    """

    def __init__(
        self,
        model: TextModel | None,
        root: int,
        aim: Callable[[], Aim],
        sources: Sequence[TokenSource] = (),
        estimates: Estimates | None = None,
    ) -> None:
        self.model, self._root, self._aim, self._sources = model, root, aim, tuple(sources)
        self._estimates = estimates if estimates is not None else Estimates(aim().acceptance)
        self._runs: dict[int, int] = {}  # of the nodes of the last planned tree that were run: their places in the model
        self._tree = GrowingTree(root, sampled=False)
        self._round: _Round | None = None
        self._rows: list[Tensor] = []  # [n, V] of every step of the tree: what its children were drawn from
        self._threshold: float | None = None  # what the last tree's nodes were worth at least

    def grow(
        self, max_nodes: int, max_levels: int, params: SamplingParams, generator: torch.Generator, *, sampled: bool
    ) -> DraftTree:
        """The planned tree, or as much of its beginning as is asked for; or one that is dynamic."""
        aim = self._aim()
        self._round = None
        if not aim.dynamic and self.model is not None:
            return self._grow_planned(self.model, aim.shape, max_nodes, max_levels, params, generator, sampled)
        most = min(max_nodes, aim.shape.num_nodes)
        asked = _Round(max_levels - 1, params, generator)
        self._tree, self._rows = GrowingTree(self._root, sampled=sampled), []
        if most > 1 and max_levels > 1:
            self._grow_to(most, asked, aim)
        nodes = self._tree.submitted(most, max_levels - 1)
        self._round = _Round(max_levels - 1, params, generator, tuple(nodes))
        return self._as_draft(nodes, generator.device)

    def grow_ahead(self) -> int:
        return 0

    def follow(self, path: tuple[int, ...], token_ids: tuple[int, ...], features: Tensor | None) -> None:
        """Accepted leaves were not run: the model reads their tokens with the next tree."""
        if self._round is None:
            accepted = [self._runs[node] for node in path[1:] if node in self._runs]
        else:
            nodes = [self._round.nodes[place] for place in path]
            self._learn(nodes, token_ids)
            accepted = [node.run for node in nodes[1:] if node.run is not None]
        if self.model is not None:
            self.model.follow(token_ids, accepted)
        for source in self._sources:
            source.follow(token_ids)
        self._root, self._runs, self._round = token_ids[-1], {}, None

    # -- planned trees ----------------------------------------------------------------------------------------------------

    def _grow_planned(
        self,
        model: TextModel,
        shape: TreeShape,
        max_nodes: int,
        max_levels: int,
        params: SamplingParams,
        generator: torch.Generator,
        sampled: bool,
    ) -> DraftTree:
        shape = shape.truncated(max_levels)
        if shape.num_nodes > max_nodes:
            shape = TreeShape(shape.parents[:max_nodes])
        run = [node for nodes in shape.expanded[1:-1] for node in nodes]
        self._runs = {node: place for place, node in enumerate(run)}
        return grow(model, self._root, shape, params, generator, sampled=sampled)

    # -- dynamic trees ----------------------------------------------------------------------------------------------------

    def _grow_to(self, most: int, asked: _Round, aim: Aim) -> None:
        """Run what is worth it, step by step, and fill up with leaves."""
        tree, model = self._tree, self.model
        assert model is not None
        if tree.root.run is None:
            self._open([tree.root], model.begin(), asked)
            tree.root.run = -1
        expected = self._threshold if self._threshold is not None else 1.0 / most
        while len(tree.nodes) < most or not tree.sampled:
            threshold = max(tree.nth_value(most), expected, aim.least_value)
            rows = min(model.room, MAX_STEP_ROWS)
            batch = tree.due(threshold, rows, most if tree.sampled else 4 * most, asked.max_depth)
            first = self._estimates.first
            gain = sum(max(node.value * first - threshold, 0.0) for node in batch)
            if batch and gain > aim.least_gain:
                self._run(batch, asked)
                continue
            tree.put_back(batch)
            if expected <= tree.nth_value(most) or expected <= aim.least_value or rows == 0:
                break
            expected /= 2.0
        final = max(tree.nth_value(most), aim.least_value)
        tree.fill(most if tree.sampled else 1 << 30, aim.least_value if tree.sampled else final, asked.max_depth)
        self._remember_threshold(tree.nth_value(most))

    def _remember_threshold(self, threshold: float) -> None:
        """Shallow nodes are not to be taken for what deeper ones will be worth more than: a mean over rounds, of logarithms."""
        threshold = max(threshold, 1e-9)
        before = threshold if self._threshold is None else self._threshold
        self._threshold = math.exp(0.7 * math.log(before) + 0.3 * math.log(threshold))

    def _run(self, batch: list[Node], asked: _Round) -> None:
        """One pass of the model over `batch`, parents before children; their candidates come to the host."""
        assert self.model is not None
        parents, tree = list[int](), self._tree
        for node in batch:
            assert node.parent is not None and node.parent.run is not None
            parents.append(node.parent.run)
            node.run = tree.num_run
            tree.num_run += 1
        tokens = index_tensor([node.token_id for node in batch], asked.generator.device)
        self._open(batch, self.model.expand(parents, tokens), asked)

    def _open(self, batch: list[Node], logits: Tensor, asked: _Round) -> None:
        tree = self._tree
        taken = [[child.token_id for child in node.children] for node in batch]
        found = candidates_of(logits, asked.params, asked.generator, MAX_CHILDREN, taken, sampled=tree.sampled)
        if tree.sampled:
            shares = self._estimates.drawn(np.array(found.tops), MAX_CHILDREN)
        else:
            shares = self._estimates.chosen(np.array(found.probabilities))
        first_row = sum(map(len, self._rows))
        for place, node in enumerate(batch):
            node.row = first_row + place
            token_ids = found.token_ids[place]
            tree.open(node, token_ids, found.probabilities[place], shares[place, : len(token_ids)], found.tops[place])
        if found.rows is not None:
            self._rows.append(found.rows)

    def _as_draft(self, nodes: list[Node], device: torch.device) -> DraftTree:
        places = {id(node): place for place, node in enumerate(nodes)}
        parents = [places[id(node.parent)] if node.parent is not None else -1 for node in nodes]
        drawn = tuple(node.drawn for node in nodes)
        return DraftTree(
            TreeShape(tuple(parents)),
            index_tensor([node.token_id for node in nodes], device),
            (self._rows[0] if len(self._rows) == 1 else torch.cat(self._rows)) if any(drawn) else None,
            drawn,
            rows=tuple(node.row for node in nodes),
            found=frozenset(place for place, node in enumerate(nodes) if node.source is not None),
            foreseen=sum(node.ahead for node in nodes[1:]),
            tops=torch.tensor([node.top for node in nodes], dtype=torch.float32),
        )

    def _learn(self, nodes: list[Node], token_ids: tuple[int, ...]) -> None:
        """Count what came of the candidates of every accepted node."""
        for node, token_id in zip(nodes, token_ids, strict=True):
            if not node.token_ids:
                continue
            if not self._tree.sampled:
                hit = node.token_ids.index(token_id) if token_id in node.token_ids else None
                self._estimates.count_chosen(node.probabilities, hit)
                continue
            ranks = [child.rank for child in node.children if child.submitted and child.drawn]
            entered = next((child.rank for child in node.children if child in nodes), None)
            if entered is not None and entered >= 0:
                self._estimates.count_drawn(node.top, entered + 1, True)
            elif ranks:
                self._estimates.count_drawn(node.top, len(ranks), False)
        self._estimates.end_verdict()
