"""Drafters whose trees depend on the text, round after round: the text is the target's own. And what the fakes promise."""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from enumeration import TOLERANCE, UNIT, VERIFIERS, Choices, Law, World, continued, every_run, random_world, target_logits
from exactness import chi_square
from text_drafters import Draw, FeatureDrafter, TextContext, TextDrafter
from tree.aim import Aim
from tree.draft import Drafter, DraftTree
from tree.sampling import SamplingParams
from tree.shape import TreeShape
from tree.verify import METHODS, Method, verify

PROMPT = (0, 1)
GREEDY = SamplingParams()

# From a tree and the target's logits at its nodes to a path and the tokens that are emitted.
Judge = Callable[[DraftTree, torch.Tensor], tuple[tuple[int, ...], tuple[int, ...]]]


def write(drafter: Drafter, world: World, length: int, judge: Judge, generator: torch.Generator) -> tuple[int, ...]:
    """`length` tokens after PROMPT, in rounds as the engine runs them. Features are the target's probabilities."""
    text = [*PROMPT]
    context = drafter.start(0, text, len(text))
    while (wanted := length + len(PROMPT) - len(text)) > 0:
        tree = context.grow(6, min(wanted, 3), world.params, generator, sampled=not world.params.greedy)
        context.grow_ahead()
        logits = target_logits(world, tree, (text[-2], text[-1]))
        path, token_ids = judge(tree, logits)
        outputs = logits[list(path)].softmax(-1).repeat(1, len(drafter.feature_layers))  # [len(path), layers * V]
        context.follow(path, token_ids, outputs if drafter.feature_layers else None)
        text += token_ids
    return tuple(text[len(PROMPT) :])


def law_of_text(
    drafter_for: Callable[[int, Choices], Drafter], world: World, length: int, verifier: Callable[..., Law]
) -> np.ndarray:
    """[V] * length: over every draw and every verdict. drafter_for: from a vocabulary's size to a drafter that draws by
    choices."""

    def program(choices: Choices) -> tuple[int, ...]:
        def judge(tree: DraftTree, logits: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
            emitted = verifier(tree, logits, world.params)
            token_ids = list(emitted)[choices.choose(list(emitted.values()))]
            path = [0]
            for token_id in token_ids[:-1]:
                path += [child for child in tree.shape.children(path[-1]) if tree.token_ids[child] == token_id]
            return tuple(path), token_ids

        return write(drafter_for(world.vocabulary, choices), world, length, judge, torch.Generator())

    joint = np.zeros((world.vocabulary,) * length)
    for probability, text in every_run(program):
        joint[text] += probability
    return joint


def total_variation(
    drafter_for: Callable[[int, Choices], Drafter], world: World, length: int, verifier: Callable[..., Law]
) -> float:
    written = law_of_text(drafter_for, world, length, verifier)
    return float(abs(written - continued(world, PROMPT, {(): 1.0}, length)).sum() / 2)


def drawing(choices: Choices) -> Draw:
    def draw(probabilities: torch.Tensor, logits: torch.Tensor, generator: torch.Generator) -> int:
        mass = float(probabilities.sum())
        return choices.choose((probabilities / mass).tolist()) if mass else int(logits.argmax())

    return draw


def mixing(vocab_size: int, choices: Choices) -> TextDrafter:
    return TextDrafter(vocab_size, draw=drawing(choices))


def mixing_the_better_of_two(vocab_size: int, choices: Choices) -> TextDrafter:
    """The mistake: a drawn child is kept or replaced for what it is."""
    draw = drawing(choices)
    return TextDrafter(vocab_size, draw=lambda *row: max(draw(*row), draw(*row)))


def of_features(vocab_size: int, choices: Choices) -> FeatureDrafter:
    return FeatureDrafter(vocab_size)


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["dense", "zeros"])
@pytest.mark.parametrize("verifier", VERIFIERS)
@pytest.mark.parametrize("drafter_for", [mixing, of_features])
def test_text_has_the_law_of_the_target(drafter_for: Callable[[int, Choices], Drafter], verifier: str, kind: str) -> None:
    """Enumerated: three tokens, in one round to three, of trees that follow what the rounds before have left."""
    assert total_variation(drafter_for, random_world(5, 3, kind), 3, VERIFIERS[verifier]) <= TOLERANCE


class AheadContext(TextContext):
    """Proposes one drawn child. Ahead, it draws on for two levels; the second is the next proposal if the first comes true."""

    def __init__(self, drafter: TextDrafter, text: list[int]) -> None:
        super().__init__(drafter, text)
        self.kept: int | None = None
        self.num_kept = 0

    def _draw(self, token_id: int) -> int:
        logits = self._drafter.logits(token_id)
        return self._drafter.draw(logits.softmax(-1), logits, torch.Generator())

    def grow(
        self, max_nodes: int, max_levels: int, params: SamplingParams, generator: torch.Generator, *, sampled: bool
    ) -> DraftTree:
        root = self.text[-1]
        if max_levels == 1:
            self.trees.append(DraftTree.root_only(torch.tensor([root])))
        else:
            child = self._draw(root) if self.kept is None else self.kept
            rows = torch.stack([self._drafter.logits(token_id).softmax(-1) for token_id in (root, child)])
            self.trees.append(DraftTree(TreeShape((-1, 0)), torch.tensor([root, child]), rows, (False, True)))
        return self.trees[-1]

    def grow_ahead(self) -> int:
        below = self._draw(int(self.trees[-1].token_ids[-1]))
        self.ahead = below, self._draw(below)
        return 2

    def follow(self, path: tuple[int, ...], token_ids: tuple[int, ...], features: torch.Tensor | None) -> None:
        at_the_end = path[-1] == self.trees[-1].shape.num_nodes - 1
        self.kept = self.ahead[1] if at_the_end and token_ids[-1] == self.ahead[0] else None
        self.num_kept += self.kept is not None
        super().follow(path, token_ids, features)


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_what_was_grown_ahead_may_be_the_next_tree(verifier: str) -> None:
    contexts: list[AheadContext] = []

    class Ahead(TextDrafter):
        def start(
            self,
            place: int,
            token_ids: Sequence[int],
            prompt_tokens: int,
            *,
            repeatable: bool = False,
            before: object | None = None,
        ) -> AheadContext:
            contexts.append(AheadContext(self, list(token_ids)))
            return contexts[-1]

    def ahead(vocab_size: int, choices: Choices) -> TextDrafter:
        return Ahead(vocab_size, draw=drawing(choices))

    assert total_variation(ahead, random_world(5, 2, "dense"), 3, VERIFIERS[verifier]) <= TOLERANCE
    assert sum(context.num_kept > 0 for context in contexts) > 10


@pytest.mark.parametrize("verifier", ["traversal", "rejection"])
def test_a_drafter_that_prefers_what_it_draws_is_caught(verifier: str) -> None:
    world = random_world(5, 3, "dense")
    assert total_variation(mixing_the_better_of_two, world, 2, VERIFIERS[verifier]) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_sampled_text_of_mixed_trees_has_the_law_of_the_target(method: Method) -> None:
    """Chi-square of 1000 texts of three tokens, 27 cells at most, at 1e-6. False alarm: 1e-6 each."""
    world, generator = random_world(5, 3, "dense"), torch.Generator().manual_seed(7)

    def judge(tree: DraftTree, logits: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        verdict = verify(tree, logits, UNIT, generator, method=method)
        return verdict.path, verdict.token_ids

    texts = Counter(write(TextDrafter(3), world, 3, judge, generator) for _ in range(1000))
    joint = continued(world, PROMPT, {(): 1.0}, 3)
    expected = {text: float(joint[text]) for text in itertools.product(range(3), repeat=3)}
    assert chi_square(texts, expected, 1000)[0] > 1e-6


# -- the fakes ----------------------------------------------------------------------------------------------------------------


def verdicts_of_the_first_child(drafter: Drafter, params: SamplingParams, rounds: int) -> list[DraftTree]:
    """Trees of a text of which the root's first child is accepted every time, if there is one."""
    vocab_size, generator = drafter.vocab_size, torch.Generator().manual_seed(3)  # type: ignore[attr-defined]
    text, trees = [0, 1], []
    context = drafter.start(0, text, 1)
    for number in range(rounds):
        tree = context.grow(7, 4, params, generator, sampled=not params.greedy)
        path = (0, 1) if tree.shape.num_nodes > 1 else (0,)
        token_ids = (*tree.token_ids[list(path[1:])].tolist(), (number * number) % vocab_size)
        features = torch.full((len(path), 6), float(number)) if drafter.feature_layers else None
        assert int(tree.token_ids[0]) == text[-1]
        context.grow_ahead()
        context.follow(path, token_ids, features)
        text += token_ids
        trees.append(tree)
    return trees


@pytest.mark.parametrize("params", [GREEDY, UNIT, SamplingParams(0.7, 2, 0.9)], ids=str)
@pytest.mark.parametrize("vocab_size", [2, 3, 50, 1000])
@pytest.mark.parametrize("drafter_class", [TextDrafter, FeatureDrafter])
def test_trees_keep_to_what_was_asked_for(
    drafter_class: type[TextDrafter | FeatureDrafter], vocab_size: int, params: SamplingParams
) -> None:
    drafter = drafter_class(vocab_size)
    trees = verdicts_of_the_first_child(drafter, params, 12)
    assert drafter.num_ahead == 12
    assert len({tree.shape for tree in trees}) > 1  # a mind of its own
    for tree in trees:
        assert tree.shape.num_nodes <= 7 and tree.shape.num_levels <= 4
        assert (tree.token_ids >= 0).all() and (tree.token_ids < vocab_size).all()
        for node in range(tree.shape.num_nodes):
            children = tree.token_ids[list(tree.shape.children(node))].tolist()
            assert len(set(children)) == len(children)
    drafter.aim(Aim(shape=TreeShape((-1, 0))), 16)
    assert all(tree.shape.num_nodes <= 2 for tree in verdicts_of_the_first_child(drafter, params, 3))


def test_a_text_drafter_mixes_drawn_and_chosen_siblings() -> None:
    orders = set()
    for tree in verdicts_of_the_first_child(TextDrafter(50), UNIT, 30):
        orders |= {tuple(tree.drawn[child] for child in tree.shape.children(node)) for node in range(tree.shape.num_nodes)}
    assert {(False, True), (True, False), (True, False, True)} <= orders
    assert not any(any(tree.drawn) for tree in verdicts_of_the_first_child(TextDrafter(50), GREEDY, 30))


@pytest.mark.parametrize("drafter_class", [TextDrafter, FeatureDrafter])
def test_a_round_that_was_taken_back_has_left_nothing(drafter_class: type[TextDrafter | FeatureDrafter]) -> None:
    drafter = drafter_class(50)
    context = drafter.start(0, [4, 2, 4], 2)
    context.grow(1, 1, UNIT, torch.Generator(), sampled=True)
    context.follow((0,), (2,), torch.ones(1, 2) if drafter.feature_layers else None)
    trees = [context.grow(7, 4, UNIT, torch.Generator().manual_seed(1), sampled=True) for _ in range(2)]
    assert trees[0].shape == trees[1].shape and trees[0].drawn == trees[1].drawn
    assert torch.equal(trees[0].token_ids, trees[1].token_ids) and trees[0].shape.num_nodes > 1
