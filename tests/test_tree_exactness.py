"""Losslessness by enumeration: every draft tree, every outcome of the verifier, in float64, against the target's law.

Only the random draws are left out here (test_tree_verify and test_tree_sampling test those): the probabilities of trees and
of outcomes are computed, and total variation must vanish to rounding. Negative controls show that the harness can fail.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from enumeration import (
    TOLERANCE,
    UNIT,
    VERIFIERS,
    Law,
    World,
    continued,
    last_two,
    node_logits,
    path_tokens,
    random_world,
    target_logits,
)
from shapes import chain, from_widths
from tree.draft import DraftTree
from tree.sampling import SamplingParams, to_probabilities
from tree.shape import TreeShape
from tree.verify import _end_of_walk, _first_in_post_order, rejection_stops, traversal_stops

Trees = Iterator[tuple[float, DraftTree]]
NEGATIVE_CONTROL_TV = 1e-2

SHAPES = {
    "root": TreeShape.root_only(),
    "chain": chain(4),
    "star": from_widths((3,)),
    "binary": from_widths((2, 2)),
    "uneven": TreeShape((-1, 0, 0, 1, 1, 3)),
    "fork": TreeShape((-1, 0, 0, 2)),
}


# -- growth policies: every tree with its probability --------------------------------------------------------------------


def next_child(row: np.ndarray, ranking: np.ndarray, earlier: tuple[int, ...], is_drawn: bool) -> Iterator[tuple[float, int]]:
    """By definition: drawn from what the earlier siblings leave, renormalised, or for certain the highest ranked one."""
    left = [token for token in range(len(row)) if token not in earlier]
    mass = sum(row[token] for token in left)
    if not is_drawn or mass == 0:
        yield 1.0, max(left, key=lambda token: ranking[token])
        return
    yield from ((row[token] / mass, token) for token in left if row[token] > 0)


def ordered_children(
    row: np.ndarray, ranking: np.ndarray, are_drawn: Sequence[bool]
) -> Iterator[tuple[float, tuple[int, ...]]]:
    """All children that a node may have, with their probability."""
    if not are_drawn:
        yield 1.0, ()
        return
    for probability, earlier in ordered_children(row, ranking, are_drawn[:-1]):
        for factor, token in next_child(row, ranking, earlier, are_drawn[-1]):
            yield probability * factor, (*earlier, token)


def grown_trees(world: World, shape: TreeShape, context: tuple[int, int], drawn: tuple[bool, ...]) -> Trees:
    """All trees of `shape` whose nodes are drawn or chosen as `drawn` [N] says."""

    def fill(node: int, tokens: tuple[int, ...], probability: float) -> Trees:
        if node == shape.num_nodes:
            yield probability, drafted(world, shape, context, tokens, drawn)
            return
        logits = node_logits(world.draft, shape, context, tokens, node)
        are_drawn = [drawn[child] for child in shape.children(node)]
        for factor, children in ordered_children(to_probabilities(logits, world.params).numpy(), logits.numpy(), are_drawn):
            yield from fill(node + 1, tokens + children, probability * factor)

    yield from fill(0, (context[1],), 1.0)


def policy(is_drawn: Callable[[int, int], bool]) -> Callable[..., Trees]:
    """Trees whose child of rank k of node v is drawn where is_drawn(v, k), and chosen elsewhere."""

    def grow_all(world: World, shape: TreeShape, context: tuple[int, int]) -> Trees:
        children = range(1, shape.num_nodes)
        drawn = (False, *(is_drawn(shape.parents[child], shape.ranks[child]) for child in children))
        return grown_trees(world, shape, context, drawn)

    return grow_all


sampled_trees = policy(lambda node, rank: True)  # what `grow(..., sampled=True)` may give
POLICIES = {
    "sampled": sampled_trees,
    "deterministic": policy(lambda node, rank: False),  # what `grow(..., sampled=False)` gives
    "chosen first": policy(lambda node, rank: rank > 0),
    "drawn first": policy(lambda node, rank: rank == 0),
    "chosen between": policy(lambda node, rank: rank != 1),
    "by node and rank": policy(lambda node, rank: (node + rank) % 2 == 0),  # one step offers drawn and chosen children
}


def drafted(
    world: World, shape: TreeShape, context: tuple[int, int], tokens: tuple[int, ...], drawn: tuple[bool, ...]
) -> DraftTree:
    logits = torch.stack([node_logits(world.draft, shape, context, tokens, node) for node in range(shape.num_nodes)])
    return DraftTree(shape, torch.tensor(tokens), to_probabilities(logits, world.params) if any(drawn) else None, drawn)


# -- verifiers, and the law of rounds ----------------------------------------------------------------------------------------


def traversal_by_recursion(tree: DraftTree, logits: torch.Tensor, params: SamplingParams) -> Law:
    """Procedure V(v, w) of docs/losslessness.md, node by node: the oracle of the parallel form."""
    own = to_probabilities(logits, params).numpy()
    emitted: Law = defaultdict(float)

    def visit(node: int, weight: float, undecided: float) -> float:
        """Adds what the subtree of `node` emits; returns the probability that it accepts nothing."""
        current, remaining = own[node].copy(), None if tree.probabilities is None else tree.probabilities[node].numpy().copy()
        for child in tree.shape.children(node):
            token = int(tree.token_ids[child])
            proposal = np.zeros_like(current)
            if remaining is None or not tree.drawn[child] or remaining.sum() == 0:
                proposal[token] = 1.0
            else:
                proposal = remaining / remaining.sum()
            if remaining is not None:
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


def round_law(world: World, context: tuple[int, int], trees: Trees, verifier: Callable[..., Law]) -> Law:
    emitted: Law = defaultdict(float)
    for probability, tree in trees:
        for tokens, factor in verifier(tree, target_logits(world, tree, context), world.params).items():
            emitted[tokens] += probability * factor
    return emitted


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


KINDS = ("dense", "zeros", "ties", "disjoint", "one-hot", "equal")


@pytest.mark.matrix
@pytest.mark.parametrize("kind", KINDS[:3] + tuple(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[3:]))
@pytest.mark.parametrize("verifier", VERIFIERS)
@pytest.mark.parametrize("policy", POLICIES)
def test_two_rounds_have_the_law_of_the_target(policy: str, verifier: str, kind: str) -> None:
    cases = [(2, "chain"), (2, "binary"), (2, "uneven"), (3, "fork"), (4, "star"), (3, "root")]
    for seed, (vocabulary, shape) in enumerate(cases):
        world = random_world(seed, vocabulary, kind)
        assert total_variation(world, SHAPES[shape], POLICIES[policy], VERIFIERS[verifier]) <= TOLERANCE, shape


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_a_drawn_child_may_be_called_chosen(verifier: str) -> None:
    """The text keeps its law, whatever first children were drawn from; only less is accepted."""

    def call_first_chosen(world: World, shape: TreeShape, context: tuple[int, int]) -> Trees:
        for probability, tree in sampled_trees(world, shape, context):
            yield probability, replace(tree, drawn=tuple(rank > 0 for rank in shape.ranks))

    for seed, kind in enumerate(KINDS):
        assert total_variation(random_world(seed, 3, kind), PAIR, call_first_chosen, VERIFIERS[verifier]) <= TOLERANCE, kind


@pytest.mark.matrix
@pytest.mark.parametrize("verifier", VERIFIERS)
@pytest.mark.parametrize(
    "params",
    [SamplingParams(0.6), SamplingParams(1.5, top_k=2), SamplingParams(1.0, top_p=0.7), SamplingParams(0.8, 3, 0.9)],
    ids=str,
)
def test_the_law_is_the_one_asked_for(params: SamplingParams, verifier: str) -> None:
    for shape in ("star", "chain"):
        world = random_world(7, 4 if shape == "star" else 3, "dense", params)
        assert total_variation(world, SHAPES[shape], sampled_trees, VERIFIERS[verifier]) <= TOLERANCE, shape


@pytest.mark.parametrize("kind", KINDS)
def test_parallel_traversal_equals_the_recursion_on_every_tree(kind: str) -> None:
    world = random_world(11, 3, kind)
    for grow_all in POLICIES.values():
        for _, tree in grow_all(world, SHAPES["uneven"], (1, 2)):
            logits = target_logits(world, tree, (1, 2))
            parallel = VERIFIERS["traversal"](tree, logits, UNIT)
            recursion = traversal_by_recursion(tree, logits, UNIT)
            assert max(abs(parallel[key] - recursion[key]) for key in {*parallel, *recursion}) <= TOLERANCE


# -- negative controls: each of these is a mistake that some implementation made -------------------------------------------


def trees_with_untempered_laws(world: World, shape: TreeShape, context: tuple[int, int]) -> Trees:
    """Children drawn at the world's temperature, verified as if drawn at another."""
    hotter = World(world.target, world.draft * 0.4, world.params)
    for probability, tree in sampled_trees(world, shape, context):
        yield probability, drafted(hotter, shape, context, tuple(tree.token_ids.tolist()), tree.drawn)


def trees_pruned_by_value(world: World, shape: TreeShape, context: tuple[int, int]) -> Trees:
    """Three children drawn at the root, the two of highest draft probability kept, in draw order."""
    for probability, tree in sampled_trees(world, from_widths((3,)), context):
        assert tree.probabilities is not None
        tokens = tree.token_ids[1:].tolist()
        worst = min(tokens, key=lambda token: float(tree.probabilities[0, token]))
        kept = tuple(token for token in tokens if token != worst)
        yield probability, drafted(world, shape, context, (context[1], *kept), (False, True, True))


def trees_with_chosen_passed_off_as_drawn(world: World, shape: TreeShape, context: tuple[int, int]) -> Trees:
    for probability, tree in POLICIES["chosen first"](world, shape, context):
        yield probability, replace(tree, drawn=(False, *(True,) * (shape.num_nodes - 1)))


def trees_chosen_for_a_later_draw(world: World, shape: TreeShape, context: tuple[int, int]) -> Trees:
    """The first child is chosen, but for what the second one is, which was drawn before: not of what was known before."""
    assert shape == PAIR
    row = to_probabilities(world.draft[context], world.params)
    for second, probability in enumerate(row.tolist()):
        first = (second + 1) % world.vocabulary
        yield probability, drafted(world, shape, context, (context[1], first, second), (False, False, True))


def rejection_without_renormalising(tree: DraftTree, logits: torch.Tensor, params: SamplingParams) -> Law:
    """Recursive rejection at the root of a star, as if its children had been drawn with replacement."""
    assert tree.probabilities is not None
    current, proposal = to_probabilities(logits, params)[0].numpy(), tree.probabilities[0].numpy()
    emitted, reach = defaultdict(float), 1.0
    for child in tree.shape.children(0):
        token = int(tree.token_ids[child])
        accept = min(1.0, current[token] / proposal[token])
        for bonus, probability in enumerate(to_probabilities(logits, params)[child].tolist()):
            emitted[token, bonus] += reach * accept * probability
        residual = np.maximum(current - proposal, 0.0)
        reach *= 1.0 - accept
        current = residual / residual.sum() if residual.sum() else current
    for token, probability in enumerate(current.tolist()):
        emitted[token,] += reach * probability
    return emitted


def verifier_chosen_by_tokens(tree: DraftTree, logits: torch.Tensor, params: SamplingParams) -> Law:
    """Lossless verifiers, but the choice between them looks at what was drawn."""
    return VERIFIERS["sample" if tree.token_ids[1] == 0 else "traversal"](tree, logits, params)


PAIR = from_widths((2,))
MISTAKES = {
    "wrong Q, traversal": (PAIR, trees_with_untempered_laws, VERIFIERS["traversal"]),
    "wrong Q, rejection": (PAIR, trees_with_untempered_laws, VERIFIERS["rejection"]),
    "children pruned by value, traversal": (PAIR, trees_pruned_by_value, VERIFIERS["traversal"]),
    "children pruned by value, rejection": (PAIR, trees_pruned_by_value, VERIFIERS["rejection"]),
    "draws not renormalised": (PAIR, sampled_trees, rejection_without_renormalising),
    "chosen passed off as drawn, traversal": (PAIR, trees_with_chosen_passed_off_as_drawn, VERIFIERS["traversal"]),
    "chosen passed off as drawn, rejection": (PAIR, trees_with_chosen_passed_off_as_drawn, VERIFIERS["rejection"]),
    "chosen for a later draw, traversal": (PAIR, trees_chosen_for_a_later_draw, VERIFIERS["traversal"]),
    "chosen for a later draw, rejection": (PAIR, trees_chosen_for_a_later_draw, VERIFIERS["rejection"]),
    "verifier chosen by tokens": (PAIR, sampled_trees, verifier_chosen_by_tokens),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_lossy_scheme_is_caught(mistake: str) -> None:
    shape, grow_all, verifier = MISTAKES[mistake]
    assert total_variation(random_world(1, 4, "dense"), shape, grow_all, verifier) > NEGATIVE_CONTROL_TV


def test_sampling_from_the_target_forgives_pruning_by_value() -> None:
    world = random_world(3, 4, "dense")
    assert total_variation(world, PAIR, trees_pruned_by_value, VERIFIERS["sample"]) <= TOLERANCE


# -- how much is accepted --------------------------------------------------------------------------------------------------


def root_rejection(world: World, shape: TreeShape, verifier: str) -> float:
    """Probability that no child of the root is accepted, over draws and verifier."""
    emitted = round_law(world, (0, 0), sampled_trees(world, shape, (0, 0)), VERIFIERS[verifier])
    return sum(probability for tokens, probability in emitted.items() if len(tokens) == 1)


@pytest.mark.parametrize("verifier", ["traversal", "rejection"])
def test_one_sampled_child_is_accepted_with_one_minus_total_variation(verifier: str) -> None:
    """Optimal transport property, Sequoia theorem 3.7."""
    for seed, kind in enumerate(KINDS):
        world = random_world(seed, 4, kind)
        distance = abs(world.target_laws[0, 0] - to_probabilities(world.draft[0, 0], UNIT).numpy()).sum() / 2
        assert root_rejection(world, chain(2), verifier) == pytest.approx(distance, abs=TOLERANCE)


@pytest.mark.parametrize("verifier", ["traversal", "rejection"])
def test_children_that_cover_the_support_of_the_target_always_accept(verifier: str) -> None:
    """Cover property, Sequoia theorem 3.7: three children, a draft of three tokens, a target of some of them."""
    world = random_world(5, 4, "dense")
    world.draft[..., 3], world.target[..., 3] = -np.inf, -np.inf
    world.target[0, 0, 1] = -np.inf
    assert root_rejection(world, SHAPES["star"], verifier) == pytest.approx(0.0, abs=TOLERANCE)
    whole_vocabulary = random_world(6, 4, "dense")
    assert root_rejection(whole_vocabulary, from_widths((4,)), verifier) == pytest.approx(0.0, abs=TOLERANCE)


@pytest.mark.parametrize("verifier", ["traversal", "rejection"])
def test_a_draw_from_the_rest_is_worth_more_before_the_chosen_child_than_after_it(verifier: str) -> None:
    """One child is the draft's best token, the other is drawn from the rest of the draft. Offered first, the draw covers
    sum min(P, Q) of the rest and the chosen child all of its own probability: the most that these two can."""

    def accepted(world: World, *, drawn_first: bool) -> float:
        rows = to_probabilities(world.draft, UNIT)
        best = int(rows[0, 0].argmax())
        rest = rows[0, 0].clone()
        rest[best] = 0.0
        rest /= rest.sum()
        emitted: Law = defaultdict(float)
        for token in range(world.vocabulary):
            children, drawn = ((token, best), (True, False)) if drawn_first else ((best, token), (False, True))
            tree = drafted(world, PAIR, (0, 0), (0, *children), (False, *drawn))
            if token != best:
                assert tree.probabilities is not None
                tree.probabilities[0] = rest
                for tokens, factor in VERIFIERS[verifier](tree, target_logits(world, tree, (0, 0)), UNIT).items():
                    emitted[tokens] += float(rest[token]) * factor
        assert abs(continued(world, (0, 0), emitted, 2) - continued(world, (0, 0), {(): 1.0}, 2)).sum() / 2 <= TOLERANCE
        most = world.target_laws[0, 0, best] + np.minimum(world.target_laws[0, 0], rest.numpy()).sum()
        share = sum(probability for tokens, probability in emitted.items() if len(tokens) > 1)
        assert share == pytest.approx(most, abs=TOLERANCE) or not drawn_first
        return share

    for seed in range(5):
        world = random_world(seed, 4, "dense")
        assert accepted(world, drawn_first=True) > accepted(world, drawn_first=False)


def test_a_draft_equal_to_the_target_is_accepted_to_the_end_of_its_first_chain() -> None:
    world = random_world(8, 3, "equal")
    for verifier in ("traversal", "rejection"):
        emitted = round_law(world, (0, 0), sampled_trees(world, chain(4), (0, 0)), VERIFIERS[verifier])
        assert sum(probability for tokens, probability in emitted.items() if len(tokens) == 4) == pytest.approx(1.0)


def test_disjoint_supports_accept_nothing() -> None:
    world = random_world(9, 4, "disjoint")
    for verifier in VERIFIERS:
        assert root_rejection(world, PAIR, verifier) == pytest.approx(1.0)


# -- the random part against its own probabilities --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_choices_by_accept_bits_have_the_stop_probabilities(shape: TreeShape) -> None:
    """What the device does with accept bits, summed over all bits, is what expected_tokens and the tests above assume."""
    accept = [1.0, *np.random.default_rng(0).random(shape.num_nodes - 1).tolist()]
    for choose, stops in ((_first_in_post_order, traversal_stops), (_end_of_walk, rejection_stops)):
        chosen = [0.0] * shape.num_nodes
        for bits in product([True, False], repeat=shape.num_nodes - 1):
            end = int(choose(shape, torch.tensor([True, *bits])))
            chosen[end] += float(np.prod([p if bit else 1 - p for p, bit in zip(accept[1:], bits, strict=True)]))
        assert chosen == pytest.approx(stops(shape, accept), abs=TOLERANCE)
