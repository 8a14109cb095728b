"""The text of dynamic trees is the target's own, by enumeration: drawn, mixed with finds, and grown ahead, round after round.

Every draw, every verdict, with its probability, in float64. A candidate is drawn when the tree takes it, and not before: so no
rule can look at what it has not taken, and those that look at what they have taken fail.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

import tree.dynamic
from enumeration import TOLERANCE, UNIT, VERIFIERS, Choices, Law, World, continued, every_run, random_world, target_logits
from shapes import chain
from table_models import TableModel
from tree.acceptance import Acceptance
from tree.aim import Aim
from tree.candidates import Candidates, candidates_of
from tree.context import TreeContext
from tree.draft import DraftTree
from tree.growing import GrowingTree
from tree.nodes import Node, breadth_first
from tree.sampling import SamplingParams
from tree.sources import Found

PROMPT = (0, 1)
LENGTH = 3  # tokens whose joint law is compared
ACCEPTANCE = Acceptance(((0.5, 0.25, 0.2),))


class Race:
    """Draws without replacement, by choices, one after another as they are asked for."""

    def __init__(self, choices: Choices, row: Sequence[float], ranking: Sequence[float]) -> None:
        self.choices, self.row, self.ranking = choices, row, ranking
        self.token_ids: list[int] = []

    def token(self, place: int) -> int:
        while len(self.token_ids) <= place:
            left = [0.0 if token in self.token_ids else share for token, share in enumerate(self.row)]
            rest = [token for token in range(len(left)) if token not in self.token_ids]
            mass = sum(left)
            certain = max(rest, key=lambda token: self.ranking[token])
            self.token_ids.append(self.choices.choose([share / mass for share in left]) if mass else certain)
        return self.token_ids[place]


class Drawn(list[int]):
    """What a race brings, at `places` of it: drawn when somebody looks, and not before."""

    def __init__(self, race: Race, places: Sequence[int]) -> None:
        super().__init__(places)
        self.race = race

    def __getitem__(self, place):  # type: ignore[no-untyped-def,override]
        places = super().__getitem__(place)
        return [self.race.token(each) for each in places] if isinstance(place, slice) else self.race.token(places)

    def index(self, token_id: int) -> int:  # type: ignore[override]
        return self[:].index(token_id)

    def copy(self) -> "Drawn":
        return Drawn(self.race, list(self))


class DrawnWith(list[float]):
    """The probabilities of what a race brings, at the same places: to ask for one is to look."""

    def __init__(self, token_ids: Drawn) -> None:
        super().__init__([0.0] * len(token_ids))
        self.token_ids = token_ids.copy()

    def __getitem__(self, place):  # type: ignore[no-untyped-def,override]
        return self.token_ids.race.row[self.token_ids[place]]

    def __delitem__(self, place):  # type: ignore[no-untyped-def]
        del self.token_ids[place]
        super().__delitem__(place)

    def copy(self) -> "DrawnWith":
        return DrawnWith(self.token_ids)


class Repeats:
    """Finds what follows from the sum of the last tokens: a chain of two, the first of which is the likelier."""

    priors = (0.6, 0.4)

    def __init__(self, vocab_size: int, text: Sequence[int]) -> None:
        self.vocab_size, self.text = vocab_size, list(text)

    def find(self, path: Sequence[int], most: int) -> list[Found]:
        first = sum([*self.text, *path][-2:]) % self.vocab_size
        return [Found(-1, first, 0), Found(0, (first + 1) % self.vocab_size, 1)][:most]

    def follow(self, token_ids: Sequence[int]) -> None:
        self.text += token_ids


class Seen(Counter[str]):
    """What the rounds of an enumeration have come across."""

    def look_at(self, tree: DraftTree) -> None:
        shape = tree.shape
        self["foreseen"] += tree.foreseen > 0
        for node in range(shape.num_nodes):
            drawn = [tree.drawn[child] for child in shape.children(node)]
            self["mixed"] += len(set(drawn)) == 2
            self["chosen between"] += drawn[1:-1].count(False)
            self["siblings"] += len(drawn) > 1
        self["deep"] += shape.num_levels > 2


Making = Callable[[World, Choices], TreeContext]


def law_of_rounds(
    making: Making, world: World, verifier: str, rounds: int, seen: Seen, *, most: int, steps: int, levels: int
) -> np.ndarray:
    """[V] * LENGTH. The last round is not followed up: what the verifier emits then is summed over."""
    law: Law = defaultdict(float)

    def program(choices: Choices) -> tuple[tuple[int, ...], Law]:
        context, text = making(world, choices), [*PROMPT]
        for number in range(rounds):
            draft = context.grow(most, levels, world.params, torch.Generator(), sampled=True)
            seen.look_at(draft)
            for _ in range(steps if number + 1 < rounds else 0):
                context.grow_ahead()
            emitted = VERIFIERS[verifier](draft, target_logits(world, draft, (text[-2], text[-1])), world.params)
            if number + 1 == rounds or len(text) - len(PROMPT) >= LENGTH:
                break
            token_ids = list(emitted)[choices.choose(list(emitted.values()))]
            path = [0]
            for token_id in token_ids[:-1]:
                path += [child for child in draft.shape.children(path[-1]) if draft.token_ids[child] == token_id]
            context.follow(tuple(path), token_ids, None)
            text += token_ids
        return tuple(text[len(PROMPT) :]), emitted

    for probability, (begin, emitted) in every_run(program):
        seen["runs"] += 1
        for token_ids, share in emitted.items():
            law[(*begin, *token_ids)[:LENGTH]] += probability * share
    return continued(world, PROMPT, law, LENGTH)


def total_variation(
    making: Making, world: World, verifier: str, *, rounds: int = 2, most: int = 3, steps: int = 0, levels: int = 3
) -> tuple[float, Seen]:
    seen = Seen()
    written = law_of_rounds(making, world, verifier, rounds, seen, most=most, steps=steps, levels=levels)
    return float(abs(written - continued(world, PROMPT, {(): 1.0}, LENGTH)).sum() / 2), seen


@pytest.fixture
def making(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Making]:
    """Contexts whose races are run by choices, as far as they are looked at. finds: whether a source proposes, too. room: how
    many nodes the model can run. children: the most that a race is run for. stale: the mistake of running a race again for
    a row that has come before. wrong: that of handing the verifier another row than the tokens were drawn from."""

    def contexts(*, finds: bool = False, room: int = 3, children: int = 3, stale: bool = False, wrong: bool = False) -> Making:
        def make(world: World, choices: Choices) -> TreeContext:
            races: dict[tuple[float, ...], Race] = {}

            def race(row: list[float], ranking: list[float]) -> Race:
                return races.setdefault(tuple(row), Race(choices, row, ranking)) if stale else Race(choices, row, ranking)

            def candidates(logits: torch.Tensor, *arguments: object, sampled: bool) -> Candidates:
                real = candidates_of(logits, *arguments, sampled=sampled)  # type: ignore[arg-type]
                if real.rows is None:
                    return real
                ranking = logits.masked_fill(real.rows == 0, -torch.inf) if finds else logits
                rows = zip(real.rows.tolist(), ranking.tolist(), real.token_ids, strict=True)
                drawn = [Drawn(race(row, rank), range(len(ids))) for row, rank, ids in rows]
                return replace(
                    real,
                    token_ids=[*drawn],
                    probabilities=[DrawnWith(each) for each in drawn],
                    rows=real.rows.roll(1, -1) if wrong else real.rows,
                )

            monkeypatch.setattr(tree.dynamic, "candidates_of", candidates)
            monkeypatch.setattr(tree.dynamic, "MAX_CHILDREN", children)
            aim = Aim(shape=chain(4), dynamic=True, acceptance=ACCEPTANCE)
            sources = [Repeats(world.vocabulary, PROMPT)] if finds else []
            return TreeContext(TableModel(world.draft, PROMPT, most=room), PROMPT[-1], lambda: aim, sources)

        return make

    return contexts


WARM = SamplingParams(0.8, None, 0.95)
LAWS = [(UNIT, "dense"), (UNIT, "zeros"), (WARM, "dense")]


@pytest.mark.matrix
@pytest.mark.parametrize(("params", "kind"), LAWS, ids=str)
@pytest.mark.parametrize("verifier", VERIFIERS)
def test_text_of_drawn_trees_has_the_law_of_the_target(
    making: Callable[..., Making], verifier: str, params: SamplingParams, kind: str
) -> None:
    distance, seen = total_variation(making(room=2), random_world(5, 3, kind, params), verifier)
    assert distance <= TOLERANCE
    assert seen["siblings"] > 0 and (seen["deep"] > 0 or params != UNIT)


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_text_of_trees_that_are_drawn_and_found_has_the_law_of_the_target(making: Callable[..., Making], verifier: str) -> None:
    distance, seen = total_variation(making(finds=True), random_world(5, 3, "dense"), verifier, most=4)
    assert distance <= TOLERANCE
    assert seen["mixed"] > 0 and seen["deep"] > 0


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_text_of_trees_that_were_grown_ahead_has_the_law_of_the_target(making: Callable[..., Making], verifier: str) -> None:
    distance, seen = total_variation(making(room=4), random_world(5, 3, "zeros"), verifier, most=2, steps=2)
    assert distance <= TOLERANCE
    assert seen["foreseen"] > 10


@pytest.mark.slow
@pytest.mark.parametrize(("params", "kind"), LAWS, ids=str)
@pytest.mark.parametrize("verifier", VERIFIERS)
@pytest.mark.parametrize("finds", [False, True])
def test_text_of_larger_trees_has_the_law_of_the_target(
    making: Callable[..., Making], finds: bool, verifier: str, params: SamplingParams, kind: str
) -> None:
    """Grown ahead over more rounds, or beside finds, with races that bring less than the vocabulary; quick ones are above."""
    world = random_world(5, 3 if finds else 2, kind, params)
    contexts = making(finds=finds, room=4, children=2 if kind == "zeros" else 3)
    rounds, most = (2, 3) if finds else (3, 2)
    distance, seen = total_variation(contexts, world, verifier, rounds=rounds, most=most, steps=2)
    assert distance <= TOLERANCE and (seen["foreseen"] > 0 or kind == "zeros")


# -- mistakes ---------------------------------------------------------------------------------------------------------------


def looking_at_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child is taken the earlier for what it is."""
    worth = Node.urgency.fget  # type: ignore[attr-defined]

    def urgency(node: Node) -> float:
        is_liked = node.run is None or not node.is_open or node.token_ids[node.num_taken] != 0
        return float(worth(node)) * (1.0 if is_liked else 0.01)

    monkeypatch.setattr(Node, "urgency", property(urgency))


def dropping_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """A leaf that was drawn is left out for what it is."""
    submitted = GrowingTree.submitted

    def keep(tree: GrowingTree, num_nodes: int, max_depth: int) -> list[Node]:
        dropped = [node for node in submitted(tree, num_nodes, max_depth) if node.token_id == 0 and not node.children]
        for node in dropped:
            node.submitted = node is tree.root
        return [node for node in breadth_first(tree.root) if node.submitted]

    monkeypatch.setattr(GrowingTree, "submitted", keep)


MISTAKES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {"looking": looking_at_values, "dropping": dropping_by_value}


@pytest.mark.parametrize("verifier", ["traversal", "rejection"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_rule_that_looks_at_what_it_draws_is_caught(
    making: Callable[..., Making], monkeypatch: pytest.MonkeyPatch, mistake: str, verifier: str
) -> None:
    MISTAKES[mistake](monkeypatch)
    assert total_variation(making(room=2), random_world(5, 3, "dense"), verifier, rounds=1)[0] > 1e-2


@pytest.mark.parametrize("verifier", ["traversal", "rejection"])
def test_another_row_than_was_drawn_from_is_caught(making: Callable[..., Making], verifier: str) -> None:
    assert total_variation(making(room=2, wrong=True), random_world(5, 3, "dense"), verifier, rounds=1)[0] > 1e-2


@pytest.mark.parametrize("verifier", ["traversal", "rejection"])
def test_a_draw_that_was_submitted_and_is_used_again_is_caught(making: Callable[..., Making], verifier: str) -> None:
    assert total_variation(making(room=2, stale=True), random_world(5, 2, "dense"), verifier, rounds=3)[0] > 1e-3
