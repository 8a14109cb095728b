"""Pure: a tree that somebody asked for, with the draft and the memory that suit it best."""

from collections.abc import Sequence
from functools import partial
from itertools import product

from tree.acceptance import Acceptance
from tree.optimizer import best_tree
from tree.shape import TreeShape
from tree.spec import DynamicTree, OptimalTree, TreeRequest

from ..errors import FitError, UsageError
from .candidate import ROOT, Candidate, candidate
from .memory import MemoryPlan
from .prediction import DraftOption, Offer, Workload, predict_tree
from .search import best_choice, quickest


def with_tree(tree: TreeRequest, offers: Sequence[Offer], slots: Sequence[int]) -> Candidate:
    """The tree that was asked for, with the draft, of those that fit beside it, and the slots that suit it best. The root alone
    needs no draft. FitError when nothing fits."""
    if isinstance(tree, DynamicTree):
        if any(offer.drafts for offer in offers):
            return _dynamic(tree.num_nodes, offers, slots)
        tree = ROOT  # what is found makes it grow, see found.py
    are_drafted = tree.num_nodes > 1 and any(offer.drafts for offer in offers)
    pairs = [
        (place, draft) for place, offer in enumerate(offers) for draft in (range(len(offer.drafts)) if are_drafted else (None,))
    ]
    candidates: list[Candidate] = []
    tried: list[tuple[Workload, DraftOption | None, int]] = []
    for place, number in pairs:
        workload = offers[place].workload
        draft = offers[place].drafts[number] if number is not None else None
        shape = ROOT if draft is None else shape_for(tree, draft.acceptance, workload.target.vocab_size)
        tried.append((workload, draft, shape.num_nodes))
        for memory in _memories(workload, draft, shape.num_nodes, slots):
            prediction = predict_tree(workload, memory, shape, draft)
            candidates.append(Candidate(offer=place, draft=number, tree=shape, memory=memory, prediction=prediction))
    if not candidates:
        workload, draft, num_nodes = tried[0]
        workload.memory(draft, num_nodes, slots[0], workload.codings[-1])  # raises, and says by how much
        raise AssertionError("no plan, and yet the first draft fits")
    return min(candidates, key=lambda candidate: candidate.prediction.s_per_token)


def _dynamic(num_nodes: int, offers: Sequence[Offer], slots: Sequence[int]) -> Candidate:
    """Trees of at most so many nodes that follow the text: with the draft that suits them best, and within as many levels as
    pay."""
    chosen = partial(best_choice, slots=slots, max_nodes=num_nodes, sizes=[num_nodes], kinds=[True])
    best = quickest([chosen(offer.workload, offer.drafts) for offer in offers])
    if best is None:
        workload, drafts = next((offer.workload, offer.drafts) for offer in offers if offer.drafts)
        workload.memory(drafts[0], num_nodes, slots[0], workload.codings[-1])  # raises, and says by how much
        raise AssertionError("no plan, and yet the first draft fits")
    return candidate(offers, *best)


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
