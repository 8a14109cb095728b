"""Pure: trees of what a text, or others, have said before. They need no draft model, and take what the rows of a pass take."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tree.acceptance import Acceptance
from tree.optimizer import best_tree
from tree.shape import TreeShape
from tree.spec import DynamicTree, TreeRequest

from ..config import EngineSettings
from ..errors import FitError
from .candidate import ROOT
from .memory import MemoryPlan
from .notes import NO_TREE
from .prediction import Prediction, Workload, predict_tree, rounds

MOST_NODES, MOST_LEVELS = 64, 33  # finds are of 32 tokens; beyond so many nodes there is little to find
SIZES = (64, 48, 32, 24, 16, 12, 8, 4, 2)
MEMORY_COST = 0.01  # of the seconds of a round, at most: layers that are not resident for the memory of these rows
# A node is worth its row if it is more probable than what the row costs in rounds; by how much more, as times and estimates are
# rough. Finds that must be more probable than MOST_VALUE are too few to look for.
MARGIN, MOST_VALUE = 1.5, 0.6
# Looking up and growing such a tree takes a processor half a millisecond before a pass: a hundredth of this.
LEAST_ROUND_S = 0.05
# The shape of such trees varies between a chain and nothing. This one stands for them.
USUAL = Acceptance(levels=((0.8, 0.08, 0.03),))
NOTE = "there is no draft model: trees are of what the text has said before, where it repeats itself"
TOO_DEAR = "what the text has said before is not looked up: a row costs as much as it may bring"
TOO_QUICK = "what the text has said before is not looked up: that would take more than a hundredth of a pass"
NO_ROOM = "what the text has said before is not looked up: there is no memory for a second row"


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundTrees:
    """What is planned for them: `least_value` as in `tree.aim.Aim`, and `prediction` of a round in which nothing is found."""

    tree: TreeShape
    memory: MemoryPlan
    prediction: Prediction
    least_value: float


def found_trees(
    settings: EngineSettings, asked: TreeRequest | None, workload: Workload, plain: MemoryPlan
) -> FoundTrees | str | None:
    """Beside a target that has no draft; `plain` is the memory of its root alone. As large as was asked for, or as pays; or why
    there are none; None where nobody wants any. FitError for one that was asked for and does not fit."""
    if not settings.has_ngram or not (asked is None or isinstance(asked, DynamicTree)):
        return None
    if asked is not None:
        memory = workload.memory(None, asked.num_nodes, plain.num_slots, bool(plain.placement.coded))
        return _of(settings, workload, memory, asked.num_nodes)
    root_s = predict_tree(workload, plain, ROOT, None).round_s
    if root_s < LEAST_ROUND_S and not settings.needs_ngram:
        return TOO_QUICK
    for num_nodes in _sizes(settings):
        try:
            memory = workload.memory(None, num_nodes, plain.num_slots, bool(plain.placement.coded))
        except FitError:
            continue
        if predict_tree(workload, memory, ROOT, None).round_s > root_s * (1 + MEMORY_COST):
            continue
        found = _of(settings, workload, memory, num_nodes)
        return found if settings.needs_ngram or found.least_value < MOST_VALUE else TOO_DEAR
    return NO_ROOM


def with_found(notes: Sequence[str], found: FoundTrees | str | None) -> tuple[str, ...]:
    """The notes of a plan without a draft, in which it says why it has no tree."""
    if isinstance(found, FoundTrees):
        return NOTE, *(note for note in notes if not note.startswith(NO_TREE))
    return tuple(f"{note}; {found}" if found and note.startswith(NO_TREE) else note for note in notes)


def _sizes(settings: EngineSettings) -> Sequence[int]:
    """Of trees that leave the text the tokens that it needs."""
    if settings.max_context is None:
        return SIZES
    left = settings.max_context // 8
    if settings.text_tokens is not None:
        left = min(left, settings.max_context + 1 - settings.text_tokens)
    return [size for size in SIZES if size <= left]


def _of(settings: EngineSettings, workload: Workload, memory: MemoryPlan, num_nodes: int) -> FoundTrees:
    tree = best_tree(USUAL, num_nodes, MOST_LEVELS, max_branching=workload.target.vocab_size)
    return FoundTrees(
        tree=tree,
        memory=memory,
        prediction=predict_tree(workload, memory, ROOT, None),
        least_value=min(MARGIN * _row_cost(workload, memory, num_nodes, settings.max_sequences), MOST_VALUE),
    )


def _row_cost(workload: Workload, memory: MemoryPlan, num_nodes: int, num_texts: int) -> float:
    """What a row of a tree costs, in rounds: the most that it does, by the size of trees up to `num_nodes`, where all texts
    have such trees. A token more saves one text the round that the others share."""
    nodes = np.array([1, *(size for size in reversed(SIZES) if size < num_nodes), num_nodes])
    rows, nothing = nodes * num_texts, np.zeros(len(nodes))
    round_s = rounds(workload, memory, rows, nothing, workload.after_s(rows)).round_s
    costs = (round_s[1:] / round_s[0] - 1) / (nodes[1:] - 1)
    return max(float(costs.max(initial=0.0)), 0.0)
