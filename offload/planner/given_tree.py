"""Pure: a tree that somebody asked for, with the draft and the memory that suit it best."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from tree.acceptance import Acceptance
from tree.optimizer import best_tree
from tree.shape import TreeShape
from tree.spec import OptimalTree

from ..errors import FitError, UsageError
from .memory import MemoryPlan
from .prediction import DraftOption, Prediction, Workload, predict_tree

ROOT = TreeShape.root_only()


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A tree in the memory that it would have, and what is predicted of it. `draft` is the place of its draft among those
    offered; `notes` say why it is what it is."""

    draft: int | None
    tree: TreeShape
    memory: MemoryPlan
    prediction: Prediction
    notes: tuple[str, ...] = ()


def with_tree(
    tree: TreeShape | OptimalTree, workload: Workload, drafts: Sequence[DraftOption], slots: Sequence[int]
) -> Candidate:
    """The tree that was asked for, with the draft, of those that fit beside it, and the slots that suit it best. The root alone
    needs no draft. FitError when nothing fits."""
    offered: list[tuple[int | None, DraftOption | None]] = [(None, None)]
    if drafts and tree.num_nodes > 1:
        offered = list(enumerate(drafts))
    shapes = [ROOT if draft is None else shape_for(tree, draft.acceptance, workload.target.vocab_size) for _, draft in offered]
    candidates = [
        Candidate(draft=place, tree=shape, memory=memory, prediction=predict_tree(workload, memory, shape, draft))
        for (place, draft), shape in zip(offered, shapes, strict=True)
        for memory in _memories(workload, draft, shape.num_nodes, slots)
    ]
    if not candidates:
        workload.memory(offered[0][1], shapes[0].num_nodes, slots[0], workload.codings[-1])  # raises, and says by how much
        raise AssertionError("no plan, and yet the first draft fits")
    return min(candidates, key=lambda candidate: candidate.prediction.s_per_token)


def shape_for(tree: TreeShape | OptimalTree, acceptance: Acceptance, vocab_size: int) -> TreeShape:
    """A shape as it is; for a request, the best one for `acceptance` in which no node has more children than there are
    tokens. UsageError for a shape that has such a node."""
    if isinstance(tree, TreeShape):
        if tree.max_branching > vocab_size:
            raise UsageError(
                f"a node with {tree.max_branching} children, and a vocabulary of {vocab_size} tokens",
                where="--tree",
                cure="take a narrower tree",
            )
        return tree
    return best_tree(acceptance, tree.num_nodes, tree.num_levels, max_branching=vocab_size)


def _memories(workload: Workload, draft: DraftOption | None, num_nodes: int, slots: Sequence[int]) -> list[MemoryPlan]:
    """One for every number of slots that fits, with resident layers decoded for good and in every pass."""
    found: list[MemoryPlan] = []
    for num_slots, coded in product(slots, workload.codings):
        try:
            found.append(workload.memory(draft, num_nodes, num_slots, coded))
        except FitError:
            continue
    return found
