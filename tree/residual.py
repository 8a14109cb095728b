"""The arithmetic of accepting drafted children without loss: acceptance weights, and what remains of the target's law.

Nothing here is random. One step serves two verifiers: recursive rejection (SpecInfer; Sequoia, arXiv 2402.12374,
algorithm 2) starts every node at weight 1; traversal verification (arXiv 2505.12398, in a parallel form) starts a node
at the weight that its parent's step gave it. Proofs: docs/losslessness.md.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import row_blocks
from .draft import DraftTree
from .sampling import SamplingParams, law
from .shape import TreeShape
from .transfer import index_tensor


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """What a verifier needs to decide, given a tree and the target's logits.

    accept: float64 [N]. Traversal: the weight with which a node accepts when its turn comes in post-order. Rejection:
        the probability that a node is accepted, given that its parent is and that its earlier siblings are not. Root: 1.
    residuals: [E, V]: for every node with children, the law of the token that follows if the path ends there.
    rows: row of each node in `residuals`; -1 for nodes without children, where that law is the target's own.
    """

    accept: Tensor
    residuals: Tensor
    rows: tuple[int, ...]


def weigh(tree: DraftTree, logits: Tensor, params: SamplingParams, *, traversal: bool) -> Weights:
    """Weights of every node from target logits [N, V], one batch per block of a level. Inputs are not modified."""
    shape, vocab_size = tree.shape, logits.shape[-1]
    accept = torch.ones(shape.num_nodes, dtype=torch.float64, device=logits.device)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    num_expanded = sum(map(len, shape.expanded))
    residuals = torch.empty(num_expanded, vocab_size, dtype=dtype, device=logits.device)
    rows, num_filled = [-1] * shape.num_nodes, 0
    for nodes in _blocks(shape, vocab_size):
        node_ids = index_tensor(nodes, logits.device)
        laws = law(logits.index_select(0, node_ids), params)
        weights = accept.index_select(0, node_ids) if traversal else torch.ones_like(accept[: len(nodes)])
        _resolve_children(tree, nodes, laws, weights, accept)
        residuals[num_filled : num_filled + len(nodes)] = laws
        if traversal:
            accept.index_copy_(0, node_ids, weights)
        for node in nodes:
            rows[node] = num_filled
            num_filled += 1
    return Weights(accept, residuals, tuple(rows))


def _blocks(shape: TreeShape, vocab_size: int) -> Iterator[tuple[int, ...]]:
    """The nodes that have children, parents first. In a block they are of one level, and widest first: those that have a child
    of a given rank are then a prefix, and a prefix is a view."""
    for level in shape.expanded[:-1]:
        nodes = tuple(sorted(level, key=lambda node: -shape.num_children[node]))
        for block in row_blocks(len(nodes), vocab_size):
            yield nodes[block.start : block.stop]


def _resolve_children(tree: DraftTree, nodes: tuple[int, ...], laws: Tensor, weights: Tensor, accept: Tensor) -> None:
    """Offer the children of `nodes` (widest first) in order; writes the children's entries of `accept` [N].

    In place: `laws` [n, V], the target's laws, become the residual laws after the last child; `weights` [n], float64,
    what the nodes are left with. The step for child c with proposal law Q, weight w and law P:
        accept[c] = min(1, w P(c) / Q(c));  R = max(w P - Q, 0), S = sum R;  w <- S / (S + 1 - w);  P <- R / S
    """
    shape = tree.shape
    remaining = None  # [n, V] what is left to be drawn from
    if tree.probabilities is not None and any(tree.drawn[child] for node in nodes for child in shape.children(node)):
        remaining = tree.probabilities.index_select(0, index_tensor(nodes, laws.device)).to(laws.dtype)
    for rank in range(shape.num_children[nodes[0]]):
        width = sum(shape.num_children[node] > rank for node in nodes)
        children = [shape.children(node)[rank] for node in nodes[:width]]
        child_ids = index_tensor(children, laws.device)
        tokens = tree.token_ids.index_select(0, child_ids)[:, None]  # [width, 1]
        proposal = None
        if remaining is not None:
            proposal = _take_proposal(remaining[:width], tokens, [tree.drawn[child] for child in children])
        accept.index_copy_(0, child_ids, _offer(laws[:width], weights[:width], proposal, tokens))


def _take_proposal(remaining: Tensor, tokens: Tensor, drawn: Sequence[bool]) -> tuple[Tensor, Tensor] | None:
    """The law Q [n, V] that `tokens` [n, 1] were proposed by, and Q(token) [n, 1]; strikes them off `remaining` [n, V]. None
    if no token was drawn.

    `remaining` holds draft laws without the tokens of earlier siblings. Q is one-hot where the token was certain: it was
    chosen, or its row had no mass left. That is written as a row of zeros with Q(token) = 1, since `_offer` strikes the token
    anyway.
    """
    if not any(drawn):
        remaining.scatter_(-1, tokens, 0.0)
        return None
    mass = remaining.sum(-1, keepdim=True, dtype=torch.float64)  # [n, 1]
    certain = mass == 0
    if not all(drawn):
        certain |= ~index_tensor(drawn, remaining.device).bool()[:, None]
    proposal = remaining / mass.masked_fill(certain, 1.0).to(remaining.dtype)
    if not all(drawn):
        proposal.masked_fill_(certain, 0.0)
    proposed = proposal.gather(-1, tokens).masked_fill_(certain, 1.0)
    remaining.scatter_(-1, tokens, 0.0)
    return proposal, proposed


def _offer(laws: Tensor, weights: Tensor, proposal: tuple[Tensor, Tensor] | None, tokens: Tensor) -> Tensor:
    """Offer one child per row: its acceptance [n] float64. `laws` [n, V] and `weights` [n] move on in place."""
    laws *= weights[:, None].to(laws.dtype)
    accept = laws.gather(-1, tokens).double()
    if proposal is not None:
        accept /= proposal[1]
        laws -= proposal[0]
        laws.clamp_(min=0.0)
    # Rejected means w P(c) < Q(c), so the residual is 0 at c; where acceptance is certain, what follows is never used.
    laws.scatter_(-1, tokens, 0.0)
    mass = laws.sum(-1, dtype=torch.float64)
    # Nothing left at full weight: in exact arithmetic acceptance is 1, and rounding must not leave a gap without a law.
    certain = (mass == 0) & (weights == 1)
    # In this order: a mass below 2**-53 must survive next to a weight of 1.
    weights.copy_((mass / (mass + (1.0 - weights))).masked_fill_(certain, 1.0))
    laws /= mass.masked_fill(mass == 0, 1.0)[:, None].to(laws.dtype)
    return accept.squeeze(-1).clamp_(max=1.0).masked_fill_(certain, 1.0)
