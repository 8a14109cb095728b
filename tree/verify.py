"""Which tokens of a tree the target accepts, so that the text stays the target's own. Pure: values in, a verdict out.

Three lossless methods, all batched over nodes, each with fresh randomness and one wait for the device:
    sample     draw a token at every node and descend while it is a child (SpecExec); at temperature 0, the argmax walk.
    traversal  first acceptance in post-order (arXiv 2505.12398); the most tokens from trees that were sampled.
    rejection  recursive rejection from the root down (Sequoia, arXiv 2402.12374, algorithm 2).

On trees whose children were chosen, not drawn, the three accept equally often (docs/losslessness.md).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .blocks import row_blocks
from .draft import DraftTree
from .residual import Chances, chances_of
from .sampling import SamplingParams, sample, to_probabilities
from .shape import TreeShape
from .transfer import index_tensor, to_host

Method = Literal["sample", "traversal", "rejection"]
# `traversal` nearly always accepts more than `rejection`, which stays as a choice: Sequoia's own figures are of it, it is the
# better one on some trees, and besides a walk it needs nothing of its own.
METHODS: tuple[Method, ...] = ("sample", "traversal", "rejection")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a pass yields.

    path: accepted nodes, the root first.
    token_ids: the tokens emitted, as many as `path` has nodes: the accepted draft tokens, then one of the target's own.
    expected_tokens: E[len(token_ids)] given the tree and the logits, over the randomness of the verifier alone: the
        Rao-Blackwell estimate of tokens per pass, less noisy than the count.
    """

    path: tuple[int, ...]
    token_ids: tuple[int, ...]
    expected_tokens: float


def verify(tree: DraftTree, logits: Tensor, params: SamplingParams, generator: torch.Generator, *, method: Method) -> Verdict:
    """Judge `tree` by the target's logits [N, V] at its nodes, any float dtype; they share `generator`'s device.

    The emitted tokens are distributed exactly as if they had been sampled one by one from to_probabilities(logits, params).
    That asks of the tree: its probabilities are those that its drawn children were drawn from, and no drawn child was dropped
    for its value (docs/losslessness.md). Draft token ids lie in [0, V). FloatingPointError if a row of logits holds NaN or
    +inf or no finite entry, or if a row of the tree's probabilities that is needed holds NaN; ValueError for mismatched shapes.
    """
    _check_arguments(tree, logits, method)
    if params.greedy:
        return _verify_greedily(tree, logits)
    if method == "sample" or tree.shape.num_nodes == 1:
        return _verify_by_sampling(tree, logits, params, generator)
    return _verify_by_chances(tree, logits, params, generator, traversal=method == "traversal")


def _check_arguments(tree: DraftTree, logits: Tensor, method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"unknown verification method {method!r}; one of {', '.join(METHODS)}")
    if logits.ndim != 2 or logits.shape[0] != tree.shape.num_nodes:
        raise ValueError(f"logits of shape {tuple(logits.shape)} for a tree of {tree.shape.num_nodes} nodes")
    if tree.probabilities is not None and tree.probabilities.shape[1] != logits.shape[1]:
        shapes = f"{tuple(tree.probabilities.shape)} beside logits of shape {tuple(logits.shape)}"
        raise ValueError(f"draft probabilities of shape {shapes}")


# -- sample ------------------------------------------------------------------------------------------------------------


def _verify_greedily(tree: DraftTree, logits: Tensor) -> Verdict:
    maxima, targets = logits.max(-1)
    host_maxima, host_targets, drafted = to_host(maxima, targets, tree.token_ids)
    _check_finite(host_maxima)
    path = _descend(tree.shape, host_targets, drafted)
    return Verdict(path, tuple(int(host_targets[node]) for node in path), float(len(path)))


def _verify_by_sampling(tree: DraftTree, logits: Tensor, params: SamplingParams, generator: torch.Generator) -> Verdict:
    shape = tree.shape
    targets, edges = [], []  # per block of nodes: a token drawn at each, and the probability of each of their children
    for nodes in row_blocks(*logits.shape):
        rows = to_probabilities(logits[nodes.start : nodes.stop], params)  # [n, V]
        targets.append(sample(rows, generator))
        children = range(shape.children(nodes[0]).start, shape.children(nodes[-1]).stop)
        parents = index_tensor([shape.parents[child] - nodes.start for child in children], rows.device)
        edges.append(rows[parents, tree.token_ids[children.start : children.stop]])
    host_maxima, host_targets, drafted, probabilities = to_host(
        logits.amax(-1), torch.cat(targets), tree.token_ids, torch.cat(edges)
    )
    _check_finite(host_maxima)
    path = _descend(shape, host_targets, drafted)
    reach = [1.0]  # of every node: the probability of its path
    for node, probability in enumerate(probabilities, start=1):
        reach.append(reach[shape.parents[node]] * probability)
    return Verdict(path, tuple(int(host_targets[node]) for node in path), sum(reach))


def _descend(shape: TreeShape, targets: list[float], drafted: list[float]) -> tuple[int, ...]:
    """From the root, to the child that holds the target's token, while there is one."""
    path = [0]
    while matching := [child for child in shape.children(path[-1]) if drafted[child] == targets[path[-1]]]:
        path.append(matching[0])
    return tuple(path)


# -- traversal and rejection -------------------------------------------------------------------------------------------


def _verify_by_chances(
    tree: DraftTree, logits: Tensor, params: SamplingParams, generator: torch.Generator, *, traversal: bool
) -> Verdict:
    shape = tree.shape
    chances = chances_of(tree, logits, params, traversal=traversal)
    uniforms = torch.rand(shape.num_nodes, generator=generator, dtype=torch.float64, device=logits.device)
    accepted = uniforms < chances.accept
    end = _first_in_post_order(shape, accepted) if traversal else _end_of_walk(shape, accepted)
    correction = sample(_after_end(chances, logits, end, params), generator)
    host_maxima, accept, drafted, (end_node,), (token_id,) = to_host(
        logits.amax(-1), chances.accept, tree.token_ids, end, correction
    )
    _check_finite(host_maxima)
    _check_chances(accept)
    path = shape.path(int(end_node))
    token_ids = (*(int(drafted[node]) for node in path[1:]), int(token_id))
    stops = traversal_stops(shape, accept) if traversal else rejection_stops(shape, accept)
    return Verdict(path, token_ids, sum(stop * (depth + 1) for stop, depth in zip(stops, shape.depths, strict=True)))


def traversal_stops(shape: TreeShape, accept: list[float]) -> list[float]:
    """Probability that the path ends at each node, [N], if the first node accepting in post-order ends it."""
    stops, undecided = [0.0] * shape.num_nodes, 1.0
    for node in shape.post_order:
        stops[node] = undecided * accept[node]
        undecided *= 1.0 - accept[node]
    return stops


def rejection_stops(shape: TreeShape, accept: list[float]) -> list[float]:
    """Probability that the path ends at each node, [N], if a walk from the root enters the first child that accepts."""
    reach = [1.0] * shape.num_nodes  # and, once its children are served, what is left to stop here
    for node in range(shape.num_nodes):
        for child in shape.children(node):
            reach[child] = reach[node] * accept[child]
            reach[node] *= 1.0 - accept[child]
    return reach


def _first_in_post_order(shape: TreeShape, accepted: Tensor) -> Tensor:
    """int64 [1]. The root always accepts and comes last, so there is one."""
    order = index_tensor(shape.post_order, accepted.device)
    return order.index_select(0, accepted.index_select(0, order).to(torch.uint8).argmax(0, keepdim=True))


def _end_of_walk(shape: TreeShape, accepted: Tensor) -> Tensor:
    """int64 [1]. From the root to the first child that accepts, until none does."""
    nodes = torch.arange(shape.num_nodes, device=accepted.device)
    parents = index_tensor((0, *shape.parents[1:]), accepted.device)
    first = index_tensor((0, *(shape.children(parent)[0] for parent in shape.parents[1:])), accepted.device)
    before = accepted.cumsum(0) - accepted.to(torch.int64)
    chosen = accepted & (before == before[first])  # no sibling between the first and this one accepts
    # The child that a walk enters next; a node where it ends is followed by itself.
    following = nodes.scatter_reduce(0, parents, torch.where(chosen, nodes, 0), "amax")
    end = nodes[:1]
    for _ in range(shape.num_levels - 1):
        end = following.index_select(0, end)
    return end


def _after_end(chances: Chances, logits: Tensor, end: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities [1, V] of the token that follows a path ending at node `end` [1]."""
    row = index_tensor(chances.rows, end.device).index_select(0, end)  # [1]
    residual = chances.residuals.index_select(0, row.clamp(min=0))  # [1, V]
    return torch.where(row[:, None] < 0, to_probabilities(logits.index_select(0, end), params), residual)


# -- what may be wrong with the numbers ----------------------------------------------------------------------------------


def _check_finite(maxima: list[float]) -> None:
    """The largest logit of a row is NaN if any is, +inf if any is, and -inf if all are: it alone tells."""
    for node, maximum in enumerate(maxima):
        if not -float("inf") < maximum < float("inf"):
            raise FloatingPointError(f"the target's logits at node {node} of {len(maxima)} are not finite: {maximum}")


def _check_chances(accept: list[float]) -> None:
    """With finite target logits, only NaN in the tree's probabilities makes a chance NaN: first that of the row's own node, or
    those of its children."""
    for node, chance in enumerate(accept):
        if chance != chance:
            raise FloatingPointError(
                f"the draft's probabilities at node {node} of {len(accept)}, or at its parent, are not finite"
            )
