"""Pure: a tree in the memory that it would have, and what is predicted of it: what plans are made of."""

from collections.abc import Sequence
from dataclasses import dataclass

from tree.optimizer import best_tree
from tree.shape import TreeShape

from .ahead import most_ahead
from .memory import MemoryPlan
from .prediction import STATIC, DraftOption, Offer, Prediction, TreeKind, Workload, predict_tree
from .search import Choice

ROOT = TreeShape.root_only()


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A tree in the memory that it would have, and what is predicted of it. `offer` is the place of an offer, `draft` that of
    the tree's draft in it; `notes` say why it is what it is."""

    offer: int = 0
    draft: int | None
    tree: TreeShape
    kind: TreeKind = STATIC
    memory: MemoryPlan
    prediction: Prediction
    notes: tuple[str, ...] = ()


def candidate(offers: Sequence[Offer], place: int, choice: Choice, notes: tuple[str, ...] = ()) -> Candidate:
    """What a choice of one of the offers stands for."""
    workload, draft = offers[place].workload, choice.draft
    shape = tree_of(choice, workload.target.vocab_size)
    kind = kind_of(workload, choice.memory, shape, draft, dynamic=choice.dynamic)
    return Candidate(
        offer=place,
        draft=offers[place].drafts.index(draft) if draft else None,
        tree=shape,
        kind=kind,
        memory=choice.memory,
        prediction=predict_tree(workload, choice.memory, shape, draft, kind),
        notes=notes,
    )


def kind_of(workload: Workload, memory: MemoryPlan, shape: TreeShape, draft: DraftOption | None, *, dynamic: bool) -> TreeKind:
    """With as many steps ahead as there is time for. Trees without rows to grow in have a shape that is known."""
    if draft is None or not dynamic or not memory.ahead_rows:
        return STATIC
    return TreeKind(dynamic, most_ahead(workload, memory, shape, draft))


def tree_of(choice: Choice, vocab_size: int) -> TreeShape:
    """The shape that a choice stands for."""
    if choice.draft is None:
        return ROOT
    return best_tree(
        choice.draft.acceptance,
        choice.num_nodes,
        choice.num_levels,
        max_branching=vocab_size,
        max_level_width=choice.max_level_width,
    )
