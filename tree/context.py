"""One text's trees: grown through a draft model and from what sources find, and followed when their verdict is known.

Knows tokens and rounds, not caches: those are the model's. Trees are of the planned shape, or dynamic.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .aim import Aim
from .draft import DraftTree, TextModel, grow
from .dynamic import Asked, DynamicTree, Proposers, PutAside, count_verdict
from .estimates import Estimates
from .growing import GrowingTree
from .nodes import Node
from .sampling import SamplingParams
from .shape import TreeShape
from .sources import TokenSource


@dataclass(frozen=True, slots=True)
class Left:
    """What a text's trees go on from in another place: what children are worth, and what was grown ahead."""

    estimates: Estimates
    ahead: PutAside | None


class TreeContext:
    """Implements `tree.draft.DraftContext`: the trees of one text, whose last committed token is `root`.

    model: None if only `sources` propose; all of one text. aim: what trees are to be like; it may change between rounds.
    estimates: what children are worth, which verdicts teach; None for some of its own.
    before: what the same text has left in another place.
    """

    def __init__(
        self,
        model: TextModel | None,
        root: int,
        aim: Callable[[], Aim],
        sources: Sequence[TokenSource] = (),
        estimates: Estimates | None = None,
        before: Left | None = None,
    ) -> None:
        self.model, self._root, self._aim = model, root, aim
        estimates = before.estimates if before is not None else estimates or Estimates(aim().acceptance)
        self._proposers = Proposers(model, tuple(sources), estimates)
        self._runs: dict[int, int] = {}  # of the nodes of the last planned tree that were run: their places in the model
        self._start: DynamicTree | None = None  # what the last verdict left of what was grown ahead
        self._aside = before.ahead if before is not None else None  # the same, where that was in another place
        # The tree of this round if it is dynamic, what it was asked for, and its nodes as they were submitted.
        self._tree: DynamicTree | None = None
        self._asked: Asked | None = None
        self._nodes: tuple[Node, ...] = ()

    def grow(
        self, max_nodes: int, max_levels: int, params: SamplingParams, generator: torch.Generator, *, sampled: bool
    ) -> DraftTree:
        """The planned tree, or as much of its beginning as is asked for; or a dynamic one."""
        aim, sampled = self._aim(), sampled and self.model is not None
        if not aim.dynamic and self.model is not None:
            self._tree = self._start = None
            shape = aim.shape.truncated(max_levels)
            if shape.num_nodes > max_nodes:
                shape = TreeShape(shape.parents[:max_nodes])
            run = [node for nodes in shape.expanded[1:-1] for node in nodes]
            self._runs = {node: place for place, node in enumerate(run)}
            return grow(self.model, self._root, shape, params, generator, sampled=sampled)
        asked = Asked(min(max_nodes, aim.shape.num_nodes), max_levels - 1, params, generator)
        self._tree, self._asked = self._started(asked, sampled), asked
        if asked.most > 1 and asked.max_depth > 0:
            self._tree.grow(asked, aim)
        tree, self._nodes = self._tree.submit(asked)
        return tree

    def grow_ahead(self) -> int:
        """One step, if the tree is dynamic: how many nodes were run."""
        return self._tree.grow_ahead(self._asked) if self._tree is not None and self._asked is not None else 0

    def follow(self, path: tuple[int, ...], token_ids: tuple[int, ...], features: Tensor | None) -> None:
        """Accepted leaves were not run: the model reads their tokens with the next tree. If the next root was grown ahead, what
        hangs below it is the start of that tree: the verifier has not looked at it (docs/losslessness.md, section 9)."""
        accepted, kept, self._start = [self._runs[node] for node in path[1:] if node in self._runs], list[int](), None
        if self._tree is not None and self._asked is not None:
            nodes = [self._nodes[place] for place in path]
            count_verdict(self._proposers.estimates, self._tree, self._asked, nodes, token_ids)
            accepted = [node.run for node in nodes[1:] if node.run is not None]
            for node in nodes[-1].children:
                if node.token_id == token_ids[-1] and node.run is not None and not node.submitted:
                    accepted.append(node.run)
                    self._start, kept = self._tree.below(node)
                    break
        if self.model is not None:
            self.model.follow(token_ids, accepted, kept)
        for source in self._proposers.sources:
            source.follow(token_ids)
        self._root, self._runs, self._tree, self._nodes = token_ids[-1], {}, None, ()

    def leave(self) -> Left:
        return Left(self._proposers.estimates, self._start.put_aside() if self._start is not None else self._aside)

    def _started(self, asked: Asked, sampled: bool) -> DynamicTree:
        """Where a round begins: with what was grown ahead, if the model still knows it, also where the last round was taken
        back; or with the root alone."""
        if self._aside is not None and self.model is not None and self.model.room >= self._aside.tree.num_run:
            self._start = self._aside.resume(self._proposers, asked.generator.device)
        self._aside = None
        before, start, model = self._tree, self._start, self.model
        if start is not None and model is not None and start.tree.sampled == sampled:
            if start.num_run > 0 and before is not None and model.num_nodes == before.num_run:
                model.follow((), (), range(start.num_run))
            if start.num_run == 0:
                model.begin()  # the root alone is known: nothing would tell that the model has let go of it
            if model.num_nodes == start.num_run:
                return start.copy()
        self._start = None
        return DynamicTree(self._proposers, GrowingTree(self._root, self._proposers.estimates, sampled=sampled))
