"""Probabilities of all that may happen, over a vocabulary of a few tokens: verdicts, texts, programs that choose."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch

from tree.draft import DraftTree
from tree.residual import chances_of
from tree.sampling import SamplingParams, to_probabilities
from tree.shape import TreeShape
from tree.verify import rejection_stops, traversal_stops

Law = dict[tuple[int, ...], float]  # of emitted token ids
Result = TypeVar("Result")
UNIT = SamplingParams(temperature=1.0)
TOLERANCE = 1e-12


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
        return to_probabilities(self.target, self.params).numpy()


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


def node_logits(
    table: torch.Tensor, shape: TreeShape, context: tuple[int, int], tokens: tuple[int, ...], node: int
) -> torch.Tensor:
    before = tokens[shape.parents[node]] if node else context[0]
    return table[before, tokens[node]]


# -- verifiers: the law of what they emit, given a tree --------------------------------------------------------------------


def target_logits(world: World, tree: DraftTree, context: tuple[int, int]) -> torch.Tensor:
    tokens = tuple(tree.token_ids.tolist())
    return torch.stack([node_logits(world.target, tree.shape, context, tokens, node) for node in range(len(tokens))])


def path_tokens(tree: DraftTree, node: int) -> tuple[int, ...]:
    return tuple(int(tree.token_ids[node]) for node in tree.shape.path(node)[1:])


def emitted_by_chances(tree: DraftTree, logits: torch.Tensor, params: SamplingParams, *, traversal: bool) -> Law:
    chances = chances_of(tree, logits, params, traversal=traversal)
    stops = (traversal_stops if traversal else rejection_stops)(tree.shape, chances.accept.tolist())
    own = to_probabilities(logits, params)
    emitted: Law = defaultdict(float)
    for node, stop in enumerate(stops):
        row = chances.rows[node]
        if stop:
            for token, probability in enumerate((own[node] if row < 0 else chances.residuals[row]).tolist()):
                emitted[(*path_tokens(tree, node), token)] += stop * probability
    return emitted


def emitted_by_sampling(tree: DraftTree, logits: torch.Tensor, params: SamplingParams) -> Law:
    """Walks: at every node reached, a child with its own probability, or a token that is no child."""
    own = to_probabilities(logits, params).tolist()
    reach, emitted = [1.0] * tree.shape.num_nodes, defaultdict(float)
    for node in range(tree.shape.num_nodes):
        children = {int(tree.token_ids[child]): child for child in tree.shape.children(node)}
        for token, probability in enumerate(own[node]):
            if token in children:
                reach[children[token]] = reach[node] * probability
            else:
                emitted[(*path_tokens(tree, node), token)] += reach[node] * probability
    return emitted


VERIFIERS: dict[str, Callable[[DraftTree, torch.Tensor, SamplingParams], Law]] = {
    "sample": emitted_by_sampling,
    "traversal": lambda tree, logits, params: emitted_by_chances(tree, logits, params, traversal=True),
    "rejection": lambda tree, logits, params: emitted_by_chances(tree, logits, params, traversal=False),
}


# -- laws of text --------------------------------------------------------------------------------------------------------


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
                pending[(*tokens, token)] = pending.get((*tokens, token), 0.0) + probability * factor
    return joint


# -- programs with choices -------------------------------------------------------------------------------------------------


class Choices:
    """What a program chooses, first by a script and then always the first outcome; `untried` are scripts that part from it."""

    def __init__(self, script: tuple[int, ...]) -> None:
        self._script = script
        self._made: tuple[int, ...] = ()
        self.probability = 1.0
        self.untried: list[tuple[int, ...]] = []

    def choose(self, probabilities: Sequence[float]) -> int:
        """An index into `probabilities`, of an outcome that is possible."""
        possible = [index for index, probability in enumerate(probabilities) if probability > 0]
        if len(self._made) < len(self._script):
            chosen = self._script[len(self._made)]
        else:
            chosen = possible[0]
            self.untried += [(*self._made, other) for other in possible[1:]]
        self._made += (chosen,)
        self.probability *= probabilities[chosen]
        return chosen


def every_run(program: Callable[[Choices], Result]) -> Iterator[tuple[float, Result]]:
    """Runs `program` anew for every sequence of choices that it can make: their probability, and what it returns."""
    scripts: list[tuple[int, ...]] = [()]
    while scripts:
        choices = Choices(scripts.pop())
        result = program(choices)
        yield choices.probability, result
        scripts += choices.untried
