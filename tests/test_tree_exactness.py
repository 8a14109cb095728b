"""Losslessness by enumeration: every draft tree, every outcome of the verifier, in float64, against the target's law.

Only the random draws are left out here (test_tree_verify and test_tree_sampling test those): the probabilities of trees and
of outcomes are computed, and total variation must vanish to rounding. Negative controls show that the harness can fail.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations, product

import numpy as np
import pytest
import torch
from tree.draft import DraftTree
from tree.residual import weigh
from tree.sampling import SamplingParams, law, top_k_tokens
from tree.shape import TreeShape
from tree.verify import rejection_stops, traversal_stops, verify

Law = dict[tuple[int, ...], float]  # of emitted token ids
Trees = Iterator[tuple[float, DraftTree]]
UNIT = SamplingParams(temperature=1.0)
TOLERANCE = 1e-12
NEGATIVE_CONTROL_TV = 1e-3

SHAPES = {
    "root": TreeShape.root_only(),
    "chain": TreeShape.chain(4),
    "star": TreeShape.from_widths((3,)),
    "binary": TreeShape.from_widths((2, 2)),
    "uneven": TreeShape((-1, 0, 0, 1, 1, 3)),
    "fork": TreeShape((-1, 0, 0, 2)),
}


@dataclass(frozen=True)
class World:
    """A toy target and draft over a small vocabulary: next-token logits depend on the last two tokens."""

    target: torch.Tensor  # [V, V, V] float64
    draft: torch.Tensor
    params: SamplingParams = UNIT

    @property
    def vocabulary(self) -> int:
        return len(self.target)

    @cached_property
    def target_laws(self) -> np.ndarray:
        return law(self.target, self.params).numpy()


def random_world(seed: int, vocabulary: int, kind: str, params: SamplingParams = UNIT) -> World:
    rng = np.random.default_rng(seed)
    target, draft = (rng.normal(scale=1.5, size=(vocabulary,) * 3) for _ in range(2))
    if kind == "zeros":
        for logits in (target, draft):
            logits[rng.random(logits.shape) < 0.4] = -np.inf
            logits[..., rng.integers(vocabulary)] = 0.0  # every law keeps a token
    elif kind == "ties":
        target, draft = np.round(target), np.round(draft)
    elif kind == "disjoint":
        target[..., ::2], draft[..., 1::2] = -np.inf, -np.inf
    elif kind == "one-hot":
        target, draft = target * 1e4, draft * 1e4
    elif kind == "equal":
        draft = target.copy()
    return World(torch.from_numpy(target), torch.from_numpy(draft), params)


# -- growth policies: every tree with its probability --------------------------------------------------------------------


def ordered_draws(draft_law: np.ndarray, ranking: np.ndarray, k: int) -> Iterator[tuple[float, tuple[int, ...]]]:
    """Sequential sampling without replacement by its definition, then the highest ranked tokens for certain."""
    support = [token for token in range(len(draft_law)) if draft_law[token] > 0]
    rest = sorted(set(range(len(draft_law))) - set(support), key=lambda token: -ranking[token])
    for drawn in permutations(support, min(k, len(support))):
        probability, mass = 1.0, draft_law.sum()
        for token in drawn:
            probability *= draft_law[token] / mass
            mass -= draft_law[token]
        yield probability, (*drawn, *rest[: k - len(drawn)])


def sampled_trees(world: World, shape: TreeShape, context: tuple[int, int]) -> Trees:
    """What `grow(..., sampled=True)` may give."""

    def fill(node: int, tokens: tuple[int, ...], probability: float) -> Trees:
        if node == shape.num_nodes:
            yield probability, drafted(world, shape, context, tokens, with_laws=True)
            return
        logits = node_logits(world.draft, shape, context, tokens, node)
        for factor, children in ordered_draws(law(logits, world.params).numpy(), logits.numpy(), shape.num_children[node]):
            yield from fill(node + 1, tokens + children, probability * factor)

    yield from fill(0, (context[1],), 1.0)


def deterministic_trees(world: World, shape: TreeShape, context: tuple[int, int]) -> Trees:
    """What `grow(..., sampled=False)` gives."""
    tokens: tuple[int, ...] = (context[1],)
    for node in range(shape.num_nodes):
        logits = node_logits(world.draft, shape, context, tokens, node)
        tokens += tuple(top_k_tokens(logits[None], shape.num_children[node])[0].tolist()) if shape.num_children[node] else ()
    yield 1.0, drafted(world, shape, context, tokens, with_laws=False)


def node_logits(
    table: torch.Tensor, shape: TreeShape, context: tuple[int, int], tokens: tuple[int, ...], node: int
) -> torch.Tensor:
    before = tokens[shape.parents[node]] if node else context[0]
    return table[before, tokens[node]]


def drafted(world: World, shape: TreeShape, context: tuple[int, int], tokens: tuple[int, ...], *, with_laws: bool) -> DraftTree:
    logits = torch.stack([node_logits(world.draft, shape, context, tokens, node) for node in range(shape.num_nodes)])
    return DraftTree(shape, torch.tensor(tokens), law(logits, world.params) if with_laws else None)


# -- verifiers: the law of what they emit, given a tree --------------------------------------------------------------------


def target_logits(world: World, tree: DraftTree, context: tuple[int, int]) -> torch.Tensor:
    tokens = tuple(tree.token_ids.tolist())
    return torch.stack([node_logits(world.target, tree.shape, context, tokens, node) for node in range(len(tokens))])


def path_tokens(tree: DraftTree, node: int) -> tuple[int, ...]:
    return tuple(int(tree.token_ids[node]) for node in tree.shape.path(node)[1:])


def emitted_by_weights(tree: DraftTree, logits: torch.Tensor, params: SamplingParams, *, traversal: bool) -> Law:
    weights = weigh(tree, logits, params, traversal=traversal)
    stops = (traversal_stops if traversal else rejection_stops)(tree.shape, weights.accept.tolist())
    own = law(logits, params)
    emitted: Law = defaultdict(float)
    for node, stop in enumerate(stops):
        row = weights.rows[node]
        if stop:
            for token, probability in enumerate((own[node] if row < 0 else weights.residuals[row]).tolist()):
                emitted[(*path_tokens(tree, node), token)] += stop * probability
    return emitted


def emitted_by_sampling(tree: DraftTree, logits: torch.Tensor, params: SamplingParams) -> Law:
    """Walks: at every node reached, a child with its own probability, or a token that is no child."""
    own = law(logits, params).tolist()
    reach, emitted = [1.0] * tree.shape.num_nodes, defaultdict(float)
    for node in range(tree.shape.num_nodes):
        children = {int(tree.token_ids[child]): child for child in tree.shape.children(node)}
        for token, probability in enumerate(own[node]):
            if token in children:
                reach[children[token]] = reach[node] * probability
            else:
                emitted[(*path_tokens(tree, node), token)] += reach[node] * probability
    return emitted


def traversal_by_recursion(tree: DraftTree, logits: torch.Tensor, params: SamplingParams) -> Law:
    """Procedure V(v, w) of trees.md 2.2 as it is written there: the oracle of the parallel form."""
    own = law(logits, params).numpy()
    emitted: Law = defaultdict(float)

    def visit(node: int, weight: float, undecided: float) -> float:
        """Adds what the subtree of `node` emits; returns the probability that it accepts nothing."""
        current, remaining = own[node].copy(), None if tree.laws is None else tree.laws[node].numpy().copy()
        for child in tree.shape.children(node):
            token = int(tree.token_ids[child])
            proposal = np.zeros_like(current)
            if remaining is None or remaining.sum() == 0:
                proposal[token] = 1.0
            else:
                proposal = remaining / remaining.sum()
                remaining[token] = 0.0
            undecided = visit(child, min(1.0, weight * current[token] / proposal[token]), undecided)
            residual = np.maximum(weight * current - proposal, 0.0)
            if weight < 1:
                weight = residual.sum() / (residual.sum() + 1.0 - weight)
            current = residual / residual.sum() if residual.sum() else current
        for token, probability in enumerate(current):
            emitted[(*path_tokens(tree, node), token)] += undecided * weight * probability
        return undecided * (1.0 - weight)

    assert visit(0, 1.0, 1.0) == 0.0
    return emitted


VERIFIERS: dict[str, Callable[[DraftTree, torch.Tensor, SamplingParams], Law]] = {
    "sample": emitted_by_sampling,
    "traversal": lambda tree, logits, params: emitted_by_weights(tree, logits, params, traversal=True),
    "rejection": lambda tree, logits, params: emitted_by_weights(tree, logits, params, traversal=False),
    "traversal recursion": traversal_by_recursion,
}


# -- laws of text --------------------------------------------------------------------------------------------------------


def round_law(world: World, context: tuple[int, int], trees: Trees, verifier: Callable[..., Law]) -> Law:
    emitted: Law = defaultdict(float)
    for probability, tree in trees:
        for tokens, factor in verifier(tree, target_logits(world, tree, context), world.params).items():
            emitted[tokens] += probability * factor
    return emitted


def last_two(context: tuple[int, int], tokens: tuple[int, ...]) -> tuple[int, int]:
    before, last = (*context, *tokens)[-2:]
    return before, last


def continued(world: World, context: tuple[int, int], emitted: Law, length: int) -> np.ndarray:
    """Joint law of `length` tokens after `context`, [V] * length: what `emitted` says, then the target's own."""
    joint = np.zeros((world.vocabulary,) * length)
    pending = dict(emitted)
    while pending:
        tokens, probability = pending.popitem()
        if len(tokens) == length:
            joint[tokens] += probability
            continue
        for token, factor in enumerate(world.target_laws[last_two(context, tokens)]):
            if factor:
                pending[*tokens, token] = pending.get((*tokens, token), 0.0) + probability * factor
    return joint


def total_variation(world: World, shape: TreeShape, grow_all: Callable[..., Trees], verifier: Callable[..., Law]) -> float:
    """Between the law of two rounds of speculation, continued by the target, and the target's own law."""
    context, rounds = (0, 0), {}

    def one_round(start: tuple[int, int]) -> Law:
        if start not in rounds:
            rounds[start] = round_law(world, start, grow_all(world, shape, start), verifier)
        return rounds[start]

    emitted: Law = defaultdict(float)
    for first, probability in one_round(context).items():
        for second, factor in one_round(last_two(context, first)).items():
            emitted[first + second] += probability * factor
    length = 2 * shape.num_levels
    return float(abs(continued(world, context, emitted, length) - continued(world, context, {(): 1.0}, length)).sum() / 2)


POLICIES = {"sampled": sampled_trees, "deterministic": deterministic_trees}
KINDS = ("dense", "zeros", "ties", "disjoint", "one-hot", "equal")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("verifier", VERIFIERS)
@pytest.mark.parametrize("policy", POLICIES)
def test_two_rounds_have_the_law_of_the_target(policy: str, verifier: str, kind: str) -> None:
    cases = [(2, "chain"), (2, "binary"), (2, "uneven"), (3, "fork"), (4, "star"), (3, "root")]
    for seed, (vocabulary, shape) in enumerate(cases):
        world = random_world(seed, vocabulary, kind)
        assert total_variation(world, SHAPES[shape], POLICIES[policy], VERIFIERS[verifier]) <= TOLERANCE, shape
