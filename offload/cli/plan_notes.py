"""What `plan` says beside a plan: what it rests on that nobody measured, and what would make it quicker."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from ..config import counted, seconds_text
from ..errors import FitError
from ..planner.tree_flag import assumed_acceptance
from ..planner.what_if import BITS_16
from .plan_question import Question

if TYPE_CHECKING:
    from ..planner.plan import Plan
    from ..planner.prediction import DraftOption
    from ..planner.shapes import ModelShape
    from ..planner.stored import Stored

LEAST_WIN = 0.02  # of a pass; less is not worth a line
USUAL_TREE = 256, 40  # nodes and levels of a tree that is good with a base, if not the best: to search takes long


def noted(made: "Plan", question: Question) -> "Plan":
    """`made` with all that there is to say about it."""
    return replace(made, notes=(*made.notes, *_notes(made, question)))


def _notes(made: "Plan", question: Question) -> Iterator[str]:
    target, draft = question.targets[made.offer], question.chosen_draft(made)
    if target.stored is not None and target.stored.is_estimated:
        yield from _estimates(target, target.stored, question.dtype_bytes)
    if made.placement.streamed and question.settings.codec == "auto":
        yield from _coding(made, question)
    if draft is not None and not draft.cost.is_base and not question.settings.acceptances:
        yield assumed_acceptance(draft.name)
    if draft is not None and made.ahead_steps:
        yield _growing_ahead(made, question, draft)
    if draft is not None and draft.cost.is_base and not question.hardware.knows(draft.cost, "draft"):
        yield "how long a level of its draft takes is estimated from the bytes of its base: nobody measured it"


def _growing_ahead(made: "Plan", question: Question, draft: "DraftOption") -> str:
    """What it wins, and what that rests on."""
    from ..planner.prediction import TreeKind, predict_tree
    from ..planner.refit import memory_of

    workload = question.offers[made.offer].workload
    without = predict_tree(workload, memory_of(made), made.tree, draft, TreeKind(made.dynamic))
    return (
        f"drafts grow ahead while layers stream, {counted(made.ahead_steps, 'step')} a pass: "
        f"{seconds_text(made.prediction.s_per_token)} s/token, {seconds_text(without.s_per_token)} with the same tree and "
        f"--grow-ahead off. {draft.foreseen:.0%} of a tree are taken to be foreseen, which a run will show"
    )


def _estimates(target: "ModelShape", stored: "Stored", dtype_bytes: int) -> Iterator[str]:
    """What is believed of weights that nobody has looked at."""
    cost = target.cost(dtype_bytes)
    num_weights = sum(layer.num_parameters for layer in cost.layers)
    bits, base_bits = 8 * cost.stored_bytes / num_weights, 8 * cost.base_bytes / num_weights
    beside = f", and their base {base_bits:.3g}" if cost.base_bytes else ""
    yield f"layers are taken to have {bits:.3g} bits a weight ({stored.name}){beside}: no file of them was looked at"
    if stored.codec == "residual" and target.dtype == "float16":
        yield (
            "its float16 weights are taken to be numbers that were bfloat16 before, as those of Llama 2 were: of others, three "
            "more bits of each would travel"
        )


def other_flags(made: "Plan", question: Question) -> dict[str, Callable[[], "Plan"]]:
    """Plans with flags that nobody gave, where they may be worth it: a shorter context where nothing else could make room for a
    tree, or for the base that was asked for; and a base where none was."""
    from tree.spec import OptimalTree

    from ..planner.offered import offered_targets

    usual = OptimalTree(*USUAL_TREE)
    settings, found = question.settings, dict[str, Callable[[], "Plan"]]()
    target, draft = question.targets[0], question.chosen_draft(made)
    is_self = draft is not None and draft.cost.is_base
    lacks_room = not made.placement.resident if is_self else settings.self_kind is not None
    if lacks_room and settings.max_context is None and settings.tree == "auto":
        shorter = replace(settings, max_context=made.text_tokens // 2)
        found[f"--max-context {shorter.max_context}"] = partial(replace(question, settings=shorter).answer, usual)
    is_16_bit = target.dtype in BITS_16 and (target.stored is None or bool(target.stored.codec))
    if settings.self_kind is None and settings.codec == "auto" and is_16_bit and made.placement.streamed:
        drafted = replace(settings, draft_models=("self",), acceptances=())
        other = replace(question, settings=drafted, targets=offered_targets(drafted, target)[-1:], drafts=())
        found["--draft-model self, accepted as is published of others"] = partial(other.answer, usual)
    return found


def _pass_of_less(made: "Plan", question: Question) -> float:
    """Seconds of a pass over half of the tree; infinite where that does not fit either. To search for the best tree anew would
    take longer than all else that `plan` does."""
    from tree.optimizer import best_part

    draft = question.chosen_draft(made)
    if draft is None:
        return math.inf
    try:
        half = best_part(made.tree, draft.acceptance, max(made.tree.num_nodes // 2, 1))
        return question.answer(half).prediction.pass_s
    except FitError:
        return math.inf


def _coding(made: "Plan", question: Question) -> Iterator[str]:
    """What the same would take with 16-bit weights coded without loss, where that is less."""
    from ..planner.what_if import coded_without_loss

    target = question.targets[made.offer]
    coded = coded_without_loss(target)
    if coded is target:
        return
    other, now_s = replace(question, targets=(coded,)), made.prediction.pass_s
    try:
        pass_s = other.answer(made.tree).prediction.pass_s
    except FitError:  # the decoded layer takes room: of so large a tree, at first
        pass_s = _pass_of_less(made, other)
    if pass_s < now_s * (1 - LEAST_WIN):
        yield f"`convert --codec lossless` would make a pass {seconds_text(pass_s)} s, not {seconds_text(now_s)} s"
