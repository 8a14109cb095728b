"""One text's trees: grown through a draft model, and followed when their verdict is known.

Knows tokens and laws, not caches: those are the model's.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .aim import Aim
from .draft import DraftTree, TextModel, grow
from .sampling import SamplingParams
from .shape import TreeShape


class TreeContext:
    """Implements `tree.draft.DraftContext`: the trees of one text, whose last committed token is `root`. `aim` says what they
    are to be like, and may change between rounds."""

    def __init__(self, model: TextModel, root: int, aim: Callable[[], Aim]) -> None:
        self.model, self._root, self._aim = model, root, aim
        self._runs: dict[int, int] = {}  # of the nodes of the last tree that were run: their places in the model

    def grow(
        self, max_nodes: int, max_levels: int, params: SamplingParams, generator: torch.Generator, *, sampled: bool
    ) -> DraftTree:
        """The planned tree, or as much of its beginning as is asked for."""
        shape = self._aim().shape.truncated(max_levels)
        if shape.num_nodes > max_nodes:
            shape = TreeShape(shape.parents[:max_nodes])
        run = [node for nodes in shape.expanded[1:-1] for node in nodes]
        self._runs = {node: place for place, node in enumerate(run)}
        return grow(self.model, self._root, shape, params, generator, sampled=sampled)

    def grow_ahead(self) -> None:
        pass

    def follow(self, path: tuple[int, ...], token_ids: tuple[int, ...], features: Tensor | None) -> None:
        """Accepted leaves were not run: the model reads their tokens with the next tree."""
        accepted = [self._runs[node] for node in path[1:] if node in self._runs]
        self.model.follow(token_ids, accepted)
        self._root, self._runs = token_ids[-1], {}
