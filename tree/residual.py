"""The arithmetic of accepting drafted children without loss: chances of acceptance, and what is left of the target's
probabilities once children are rejected.

Nothing here is random. One step serves two verifiers. Recursive rejection (SpecInfer; Sequoia, arXiv 2402.12374, algorithm 2)
starts every node with all of its probabilities wanted. Traversal verification (arXiv 2505.12398, in a parallel form) starts a
node with the share that its parent's step gave it. Proofs: docs/losslessness.md.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import row_blocks
from .draft import DraftTree
from .sampling import SamplingParams, to_probabilities
from .shape import TreeShape
from .transfer import index_tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chances:
    """What a verifier needs to decide, given a tree and the target's logits.

    accept: float64 [N]. Traversal: the probability that a node ends the path when its turn comes in post-order. Rejection: the
        probability that a node is accepted, given that its parent is and that its earlier siblings are not. Root: 1.
    residuals: [E, V]: for every node with children, probabilities of the token that follows if the path ends there.
    rows: row of each node in `residuals`; -1 for nodes without children, where those are the target's own.
    """

    accept: Tensor
    residuals: Tensor
    rows: tuple[int, ...]


def chances_of(tree: DraftTree, logits: Tensor, params: SamplingParams, *, traversal: bool) -> Chances:
    """Chances of every node from target logits [N, V], one batch per block of a level. Inputs are not modified."""
    shape, vocab_size = tree.shape, logits.shape[-1]
    accept = torch.ones(shape.num_nodes, dtype=torch.float64, device=logits.device)  # [N]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    num_expanded = sum(map(len, shape.expanded))
    residuals = torch.empty(num_expanded, vocab_size, dtype=dtype, device=logits.device)  # [E, V]
    rows, num_filled = [-1] * shape.num_nodes, 0
    for nodes in _blocks(shape, vocab_size):
        node_ids = index_tensor(nodes, logits.device)  # [n]
        residual = to_probabilities(logits.index_select(0, node_ids), params)  # [n, V]
        wanted = accept.index_select(0, node_ids) if traversal else torch.ones_like(accept[: len(nodes)])  # [n]
        _resolve_children(tree, nodes, residual, wanted, accept)
        residuals[num_filled : num_filled + len(nodes)] = residual
        if traversal:
            accept.index_copy_(0, node_ids, wanted)
        for node in nodes:
            rows[node] = num_filled
            num_filled += 1
    return Chances(accept=accept, residuals=residuals, rows=tuple(rows))


def _blocks(shape: TreeShape, vocab_size: int) -> Iterator[tuple[int, ...]]:
    """The nodes that have children, parents first. The nodes of a block are of one level, and widest first: those that have a
    child of a given rank are then a prefix, and a prefix is a view."""
    for level in shape.expanded[:-1]:
        nodes = tuple(sorted(level, key=lambda node: -shape.num_children[node]))
        for block in row_blocks(len(nodes), vocab_size):
            yield nodes[block.start : block.stop]


def _resolve_children(tree: DraftTree, nodes: tuple[int, ...], residual: Tensor, wanted: Tensor, accept: Tensor) -> None:
    """Offer the children of `nodes` (widest first) in order; writes the children's entries of `accept` [N].

    In place: `residual` [n, V] holds the target's probabilities, and what is left of them after the last child; `wanted` [n],
    float64, which share of them is still to be given out. The step for child c, proposed with probabilities Q, where P is
    the residual and w the share:
        accept[c] = min(1, w P(c) / Q(c));  R = max(w P - Q, 0), S = sum R;  w <- S / (S + 1 - w);  P <- R / S
    """
    shape = tree.shape
    left = None  # [n, V] what is left to be drawn from
    if tree.probabilities is not None and any(tree.drawn[child] for node in nodes for child in shape.children(node)):
        rows = [max(tree.row_of(node), 0) for node in nodes]
        left = tree.probabilities.index_select(0, index_tensor(rows, residual.device)).to(residual.dtype)
    for rank in range(shape.num_children[nodes[0]]):
        width = sum(shape.num_children[node] > rank for node in nodes)
        children = [shape.children(node)[rank] for node in nodes[:width]]
        child_ids = index_tensor(children, residual.device)  # [width]
        tokens = tree.token_ids.index_select(0, child_ids)[:, None]  # [width, 1]
        proposal = None
        if left is not None:
            proposal = _take_proposal(left[:width], tokens, [tree.drawn[child] for child in children])
        accept.index_copy_(0, child_ids, _offer(residual[:width], wanted[:width], proposal, tokens))


def _take_proposal(left: Tensor, tokens: Tensor, drawn: Sequence[bool]) -> tuple[Tensor, Tensor] | None:
    """The probabilities Q [n, V] with which `tokens` [n, 1] were proposed, and Q(token) [n, 1]; strikes the tokens off `left`
    [n, V]. None if no token was drawn.

    `left` holds the draft's probabilities without the tokens of earlier siblings. Q is one-hot where a token was certain: it
    was chosen, or nothing was left of its row. That is written as a row of zeros with Q(token) = 1, since `_offer` strikes the
    token anyway.
    """
    if not any(drawn):
        left.scatter_(-1, tokens, 0.0)
        return None
    mass = left.sum(-1, keepdim=True, dtype=torch.float64)  # [n, 1]
    certain = mass == 0
    if not all(drawn):
        certain |= ~index_tensor(drawn, left.device).bool()[:, None]
    proposal = left / mass.masked_fill(certain, 1.0).to(left.dtype)  # [n, V]
    if not all(drawn):
        proposal.masked_fill_(certain, 0.0)
    proposed = proposal.gather(-1, tokens).masked_fill_(certain, 1.0)  # [n, 1]
    left.scatter_(-1, tokens, 0.0)
    return proposal, proposed


def _offer(residual: Tensor, wanted: Tensor, proposal: tuple[Tensor, Tensor] | None, tokens: Tensor) -> Tensor:
    """Offer one child per row: its acceptance [n] float64. `residual` [n, V] and `wanted` [n] move on in place. A proposal of
    None is one-hot at `tokens` [n, 1]."""
    residual *= wanted[:, None].to(residual.dtype)
    accept = residual.gather(-1, tokens).double()  # [n, 1]
    if proposal is not None:
        accept /= proposal[1]
        residual -= proposal[0]
        residual.clamp_(min=0.0)
    # Rejected means w P(c) < Q(c), so the residual is 0 at c; where acceptance is certain, what follows is never used.
    residual.scatter_(-1, tokens, 0.0)
    mass = residual.sum(-1, dtype=torch.float64)  # [n]
    # Nothing left where all is wanted: in exact arithmetic acceptance is 1, and rounding must not leave a gap without a token.
    certain = (mass == 0) & (wanted == 1)
    # In this order: a mass below 2**-53 must survive next to a share of 1.
    wanted.copy_((mass / (mass + (1.0 - wanted))).masked_fill_(certain, 1.0))
    residual /= mass.masked_fill(mass == 0, 1.0)[:, None].to(residual.dtype)
    return accept.squeeze(-1).clamp_(max=1.0).masked_fill_(certain, 1.0)
