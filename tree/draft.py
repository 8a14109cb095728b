"""Fills a shape with tokens, level by level, through a model known only by protocol.

Knows nothing of caches, masks or devices: the model keeps those. A level's children are drawn in one batch, only nodes
that have children are run, and token ids stay tensors, so growing a tree never waits for the device.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .blocks import row_blocks
from .sampling import SamplingParams, law, sample_without_replacement, top_k_tokens
from .shape import TreeShape
from .transfer import index_tensor


class TreeModel(Protocol):
    """What a draft model must do. Logits are of any float dtype, on the device of the generator given to `grow`."""

    def begin(self, shape: TreeShape) -> Tensor:
        """Start a tree: logits [1, V] at the root, the law of the token after the last committed one."""
        ...

    def expand(self, nodes: tuple[int, ...], token_ids: Tensor) -> Tensor:
        """Run `nodes` of one level, ancestors already run, on `token_ids` int64 [n]: logits [n, V]."""
        ...


@dataclass(frozen=True, slots=True, eq=False)  # tensors have no truth value to compare by
class DraftTree:
    """A grown tree. token_ids: int64 [N] in node order, the root's first; siblings are distinct.

    laws: [N, V], row v the law from which the children of v were drawn without replacement, then by the fallback of
    `sampling.sample_without_replacement`; rows of nodes without children are zero. None if children were not drawn but
    chosen as a function of what precedes them.
    """

    shape: TreeShape
    token_ids: Tensor
    laws: Tensor | None


def grow(
    model: TreeModel,
    root_token_id: int,
    shape: TreeShape,
    params: SamplingParams,
    generator: torch.Generator,
    *,
    sampled: bool,
) -> DraftTree:
    """Fill `shape` below `root_token_id`; the model is not called for the root alone.

    sampled: children are drawn without replacement from law(draft logits, params). Otherwise child k is the k-th most
    probable token of the draft. ValueError if a node has more children than the vocabulary has tokens.
    """
    token_ids = torch.full((shape.num_nodes,), root_token_id, dtype=torch.int64, device=generator.device)
    laws: Tensor | None = None
    for level, nodes in enumerate(shape.expanded[:-1]):
        rows = index_tensor(nodes, token_ids.device)
        logits = model.expand(nodes, token_ids.index_select(0, rows)) if level else model.begin(shape)
        branching = max(shape.num_children[node] for node in nodes)
        children = token_ids.new_empty(len(nodes), branching)
        for block in row_blocks(*logits.shape):
            part = slice(block.start, block.stop)
            if sampled:
                block_laws = law(logits[part], params)
                if laws is None:
                    laws = block_laws.new_zeros(shape.num_nodes, block_laws.shape[-1])
                laws.index_copy_(0, rows[part], block_laws)
                children[part] = sample_without_replacement(block_laws, branching, generator, ranking=logits[part])
            else:
                children[part] = top_k_tokens(logits[part], branching)
        below = shape.levels[level + 1]
        token_ids[below.start : below.stop] = children.flatten().index_select(0, _kept_children(shape, nodes, children))
    return DraftTree(shape, token_ids, laws)


def _kept_children(shape: TreeShape, nodes: tuple[int, ...], children: Tensor) -> Tensor:
    """Where the first num_children of each node's row lie in the flattened `children` [len(nodes), branching]."""
    branching = children.shape[1]
    kept = [row * branching + rank for row, node in enumerate(nodes) for rank in range(shape.num_children[node])]
    return index_tensor(kept, children.device)
