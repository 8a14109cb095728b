"""A tree that grows by what a draft model and sources propose, step by step, before its pass and while that runs.

One step is one pass of the model over the best nodes that it has not run, of any levels, and one transfer to the host.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .aim import LEAST_STEP_ROWS, MOST_STEP_ROWS, STEPS_OF_A_TREE, Aim
from .candidates import Candidates, candidates_of
from .draft import DraftTree, TextModel
from .estimates import MAX_CHILDREN, Estimates, Floats
from .growing import GrowingTree
from .nodes import Find, Node
from .sampling import SamplingParams
from .shape import TreeShape
from .sources import TokenSource
from .transfer import index_tensor

LOOK_UPS, FINDS = 8, 16  # how many nodes of a step sources are asked about, and for how many tokens each
NO_LIMIT = 1 << 30
# A drawn node stays in its tree. So a step takes drawn nodes and slots only if they are worth nearly as much as the best one:
# those behind them may be worth less than what the best will have below it.
NEARLY_BEST = 0.7


@dataclass(frozen=True, slots=True)
class Proposers:
    """Who proposes the nodes of one text's trees, and what is known of how good they are. No model: sources alone."""

    model: TextModel | None
    sources: tuple[TokenSource, ...]
    estimates: Estimates


@dataclass(frozen=True, slots=True)
class Asked:
    """What a tree is grown for: at most `most` nodes, none below `max_depth`; drawn under `params` by `generator`."""

    most: int
    max_depth: int
    params: SamplingParams
    generator: torch.Generator


class DynamicTree:
    """Nodes, who proposes more of them, and `rows` [n, V] of every step: what their children were drawn from."""

    def __init__(self, proposers: Proposers, tree: GrowingTree, rows: Sequence[Tensor] = ()) -> None:
        self._proposers, self.tree, self._rows = proposers, tree, list(rows)
        self.worth: float | None = None  # what the last node was worth when it was grown

    @property
    def num_run(self) -> int:
        """Nodes that the model is to know."""
        return self.tree.num_run

    # -- before the pass --------------------------------------------------------------------------------------------------

    def grow(self, asked: Asked, aim: Aim) -> None:
        """Run what is worth it, step by step, and fill up with leaves. Nodes that are worth less than the last one of earlier
        trees was are not taken before it shows that there are no better ones."""
        tree, model, estimates = self.tree, self._proposers.model, self._proposers.estimates
        expected, best = estimates.worth(asked.most, sampled=tree.sampled), estimates.best
        self._look_up(tree.root, asked.most, max(aim.least_value, expected / 4))
        if tree.root.run is None and model is not None:
            self._open([tree.root], model.begin(), asked)
        near = NEARLY_BEST if tree.sampled else 0.0
        while model is not None:
            bar, before = max(tree.nth_value(asked.most), expected, aim.least_value), len(tree.nodes)
            batch = self._due(asked, max(bar, near * tree.best_value(asked.max_depth)))
            is_full = tree.sampled and len(tree.nodes) >= asked.most
            gain = sum([max(node.value * best - bar, 0.0) for node in batch])
            if batch and gain > aim.least_gain and not is_full:
                self._run(batch, asked)
                near = NEARLY_BEST if tree.sampled else 0.0
                continue
            tree.put_back(batch)
            if is_full or not model.room:
                break
            if (
                near
            ):  # what is nearly as good as the best is not enough for a step: unless it has just changed, take what else is
                near = near if len(tree.nodes) > before else 0.0
                continue
            if expected <= max(tree.nth_value(asked.most), aim.least_value):
                break
            expected /= 2
        worth = tree.nth_value(asked.most)
        if tree.sampled:
            tree.fill(asked.most, aim.least_value, asked.max_depth)
        else:
            tree.fill(NO_LIMIT, max(worth, aim.least_value), asked.max_depth)
        self.worth = worth

    def submit(self, asked: Asked) -> tuple[DraftTree, tuple[Node, ...]]:
        """The tree to be verified, and its nodes in the order that it has them."""
        nodes = self.tree.submitted(asked.most, asked.max_depth)
        places = {id(node): place for place, node in enumerate(nodes)}
        drawn = tuple(node.drawn for node in nodes)
        tree = DraftTree(
            TreeShape(tuple(places[id(node.parent)] if node.parent is not None else -1 for node in nodes)),
            index_tensor([node.token_id for node in nodes], asked.generator.device),
            (self._rows[0] if len(self._rows) == 1 else torch.cat(self._rows)) if any(drawn) else None,
            drawn,
            rows=tuple(node.row for node in nodes),
            found=frozenset(place for place, node in enumerate(nodes) if place and node.rank < 0),
            foreseen=sum([node.ahead for node in nodes[1:]]),
            tops=torch.tensor([node.top for node in nodes], dtype=torch.float32),
        )
        return tree, tuple(nodes)

    # -- while it runs ----------------------------------------------------------------------------------------------------

    def grow_ahead(self, asked: Asked) -> int:
        """One step over the best nodes and slots, submitted or not; how many nodes were run."""
        if self._proposers.model is None or self.tree.root.run is None:
            return 0
        rows = min(self._proposers.model.room, MOST_STEP_ROWS, max(LEAST_STEP_ROWS, asked.most // STEPS_OF_A_TREE))
        batch = self.tree.due(0.0, rows, NO_LIMIT, asked.max_depth)
        if batch:
            self._run(batch, asked)
        return len(batch)

    def below(self, root: Node) -> tuple["DynamicTree", list[int]]:
        """What hangs below a node that was run, and the model's nodes that are kept for it. This tree is of no use then."""
        tree, kept = self.tree.below(root)
        rows = list[Tensor]()
        if self._rows and tree.sampled:
            opened = [node for node in tree.nodes if node.run is not None]
            rows.append(
                torch.cat(self._rows).index_select(0, index_tensor([node.row for node in opened], self._rows[0].device))
            )
            for row, node in enumerate(opened):
                node.row = row
        return DynamicTree(self._proposers, tree, rows), kept

    def copy(self) -> "DynamicTree":
        """The same, with nodes of its own."""
        return DynamicTree(self._proposers, self.tree.copy(), self._rows)

    def put_aside(self) -> "PutAside":
        """The same without its place, to be resumed in another."""
        return PutAside(self.tree, tuple(rows.cpu() for rows in self._rows))

    # -- one step ---------------------------------------------------------------------------------------------------------

    def _due(self, asked: Asked, bar: float) -> list[Node]:
        """What to run next. Finds below the best of them are among them: a chain of them is run at once."""
        tree, model = self.tree, self._proposers.model
        assert model is not None
        most = min(model.room, MOST_STEP_ROWS)
        limit = asked.most if tree.sampled else 4 * asked.most
        batch = tree.due(bar, most, limit, asked.max_depth)
        if self._proposers.sources:
            for node in batch[:LOOK_UPS]:
                if node.find is None:
                    self._look_up(node, FINDS, bar)
            known = {id(node) for node in batch}
            batch += [node for node in tree.due(bar, most - len(batch), limit, asked.max_depth) if id(node) not in known]
        return batch

    def _look_up(self, node: Node, most: int, bar: float) -> None:
        """Nodes below `node` for what sources find there, if they are worth `bar`."""
        path, estimates = node.path(), self._proposers.estimates
        for place, source in enumerate(self._proposers.sources):
            nodes: list[Node | None] = []
            for found in source.find(path, most):
                parent = nodes[found.parent] if found.parent >= 0 else node
                find = Find(place, found.bin, source.priors[found.bin])
                share = estimates.found(find.source, find.bin, find.prior)
                is_worth_it = parent is not None and parent.value * share >= bar
                nodes.append(self.tree.attach_found(parent, found.token_id, share, find) if is_worth_it and parent else None)

    def _run(self, batch: list[Node], asked: Asked) -> None:
        """One pass of the model over `batch`, parents before children."""
        tree, model = self.tree, self._proposers.model
        assert model is not None
        try:
            parents = list[int]()
            for place, node in enumerate(batch):
                assert node.parent is not None and node.parent.run is not None
                parents.append(node.parent.run)
                node.run = tree.num_run + place
            tokens = index_tensor([node.token_id for node in batch], asked.generator.device)
            self._open(batch, model.expand(parents, tokens), asked)
        except BaseException:
            for node in batch:
                node.run = None
            raise
        tree.num_run += len(batch)

    def _open(self, batch: list[Node], logits: Tensor, asked: Asked) -> None:
        """Give the nodes of `batch` their candidates."""
        tree = self.tree
        taken = [[child.token_id for child in node.children] for node in batch]
        found = candidates_of(logits, asked.params, asked.generator, MAX_CHILDREN, taken, sampled=tree.sampled)
        shares = self._shares(batch, found)
        for node, token_ids, mass in zip(batch, taken, found.taken, strict=True):
            node.beside = dict(zip(token_ids, mass, strict=True))
        first_row = sum(map(len, self._rows))
        for place, node in enumerate(batch):
            node.run = -1 if node is tree.root else node.run
            node.row, node.top = first_row + place, found.tops[place]
        tree.open(batch, found.token_ids, found.probabilities, shares)
        if found.rows is not None:
            self._rows.append(found.rows)

    def _shares(self, batch: list[Node], found: Candidates) -> Floats:
        """What candidates are worth of their nodes [n, K], beside finds, which are now worth what both say."""
        estimates, sampled = self._proposers.estimates, self.tree.sampled
        for node, mass, left in zip(batch, found.taken, found.left, strict=True):
            node.mass = 1.0 - sum(mass)
            node.left = min(left / max(node.mass, 1e-6), 1.0) if mass else left
        if sampled:
            shares, beside = estimates.drawn(np.array([node.left for node in batch]), len(found.token_ids[0])), found.taken
        else:
            shares, beside = estimates.chosen(np.array(found.probabilities), found.taken if any(found.taken) else ())
        for node, own in zip(batch, beside, strict=False):
            if own and node.value > 0:
                for child, share in zip(node.children, own, strict=True):
                    child.drafted = share
                    assert child.find is not None
                    of_kind = estimates.found(child.find.source, child.find.bin, child.find.prior)
                    self.tree.put_right(child, node.value * estimates.mixed(of_kind, share))
                rest = max(0.02, 1.0 - sum([child.value for child in node.children]) / node.value)
                node.rest = rest if sampled else min(1.0, rest / max(1.0 - sum(own), 0.02))
        return shares


@dataclass(frozen=True, slots=True)
class PutAside:
    """A tree that is in no place, and its rows in host memory."""

    tree: GrowingTree
    rows: tuple[Tensor, ...]

    def resume(self, proposers: Proposers, device: torch.device) -> DynamicTree:
        """Where a model knows the text alone: it runs what the one before knew. Nothing is drawn."""
        tree, model = self.tree.copy(), proposers.model
        runs = {node.run: node for node in tree.nodes if node.run is not None}
        parents, token_ids = list[int](), list[int]()
        for place in range(tree.num_run):
            parent = runs[place].parent
            assert parent is not None and parent.run is not None
            parents.append(parent.run)
            token_ids.append(runs[place].token_id)
        if parents and model is not None:
            model.begin()
            model.expand(parents, index_tensor(token_ids, device))
        return DynamicTree(proposers, tree, [rows.to(device) for rows in self.rows])


def count_verdict(
    estimates: Estimates, grown: DynamicTree, asked: Asked, nodes: Sequence[Node], token_ids: Sequence[int]
) -> None:
    """Count what came of the children and candidates of every accepted node; `token_ids` are the tokens behind them."""
    sampled = grown.tree.sampled
    if grown.worth is not None:
        estimates.count_worth(asked.most, grown.worth, sampled=sampled)
    for place, (node, token_id) in enumerate(zip(nodes, token_ids, strict=True)):
        entered = nodes[place + 1] if place + 1 < len(nodes) else None
        for child in node.children:
            if child.find is not None:
                find, hit = child.find, child.token_id == token_id
                if child.drafted >= 0:
                    estimates.count_mixed(estimates.found(find.source, find.bin, find.prior), child.drafted, hit)
                estimates.count_found(find.source, find.bin, find.prior, hit)
        if not sampled and node.token_ids:
            known = {**dict(zip(node.token_ids, node.probabilities, strict=True)), **node.beside}
            ranked = sorted(known, key=known.__getitem__, reverse=True)
            estimates.count_chosen([known[it] for it in ranked], ranked.index(token_id) if token_id in known else None)
        elif sampled and (entered is None or entered.drawn):
            offered = [child for child in node.children if child.submitted and child.drawn]
            tried = offered[: offered.index(entered) + 1] if entered is not None else offered
            if tried:
                estimates.count_drawn(node.left, [child.drawn_with for child in tried], entered is not None)
    estimates.end_verdict()
