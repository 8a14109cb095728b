"""Pure: a tree in the memory that it would have, and what is predicted of it: what plans are made of."""

from collections.abc import Sequence
from dataclasses import dataclass

from tree.optimizer import best_tree
from tree.shape import TreeShape

from .memory import MemoryPlan
from .prediction import Offer, Prediction, predict_tree
from .search import Choice

ROOT = TreeShape.root_only()


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A tree in the memory that it would have, and what is predicted of it. `offer` is the place of an offer, `draft` that of
    the tree's draft in it; `dynamic` as in Plan; `notes` say why it is what it is."""

    offer: int = 0
    draft: int | None
    tree: TreeShape
    dynamic: bool = False
    memory: MemoryPlan
    prediction: Prediction
    notes: tuple[str, ...] = ()


def candidate(offers: Sequence[Offer], place: int, choice: Choice, notes: tuple[str, ...] = ()) -> Candidate:
    """What a choice of one of the offers stands for."""
    workload = offers[place].workload
    shape = tree_of(choice, workload.target.vocab_size)
    return Candidate(
        offer=place,
        draft=offers[place].drafts.index(choice.draft) if choice.draft else None,
        tree=shape,
        memory=choice.memory,
        prediction=predict_tree(workload, choice.memory, shape, choice.draft),
        notes=notes,
    )


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
