"""What `plan` says beside a plan: what it rests on that nobody measured, and what would make it quicker."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from ..config import seconds_text
from ..errors import FitError
from ..planner.tree_flag import DEFAULT_ACCEPTANCE, read_acceptance
from .plan_question import Question

if TYPE_CHECKING:
    from ..planner.plan import Plan

LEAST_WIN = 0.02  # of a pass; less is not worth a line


def noted(made: "Plan", question: Question) -> "Plan":
    """`made` with all that there is to say about it."""
    return replace(made, notes=(*made.notes, *_notes(made, question)))


def _notes(made: "Plan", question: Question) -> Iterator[str]:
    stored = question.target.stored
    if stored is not None and stored.is_estimated:
        cost = question.target.cost(question.dtype_bytes)
        bits = 8 * cost.stored_bytes / sum(layer.num_parameters for layer in cost.layers)
        yield f"layers are taken to have {bits:.3g} bits a weight ({stored.name}): no file of them was looked at"
    if made.placement.streamed and question.settings.codec == "auto":
        yield from _coding(made, question)
    if made.draft is not None and not question.settings.acceptances:
        source = read_acceptance(DEFAULT_ACCEPTANCE).source
        yield f"acceptance is assumed, not this pair's ({source}): `profile acceptance` measures it"


def _pass_of_less(made: "Plan", question: Question) -> float:
    """Seconds of a pass over half of the tree; infinite where that does not fit either. To search for the best tree anew would
    take longer than all else that `plan` does."""
    from tree.optimizer import best_part

    if made.draft is None:
        return math.inf
    acceptance = question.options()[made.draft].acceptance
    try:
        half = best_part(made.tree, acceptance, max(made.tree.num_nodes // 2, 1))
        return question.answer(half).prediction.pass_s
    except FitError:
        return math.inf


def _coding(made: "Plan", question: Question) -> Iterator[str]:
    """What the same would take with 16-bit weights coded without loss, where that is less."""
    from ..planner.what_if import coded_without_loss

    coded = coded_without_loss(question.target)
    if coded is question.target:
        return
    other, now_s = replace(question, target=coded), made.prediction.pass_s
    try:
        pass_s = other.answer(made.tree).prediction.pass_s
    except FitError:  # the decoded layer takes room: of so large a tree, at first
        pass_s = _pass_of_less(made, other)
    if pass_s < now_s * (1 - LEAST_WIN):
        yield f"`convert --codec lossless` would make a pass {seconds_text(pass_s)} s, not {seconds_text(now_s)} s"
