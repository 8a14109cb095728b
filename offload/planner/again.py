"""Pure: what is chosen again while a run goes on, by times and acceptance as they have proven to be, in the memory there is."""

from collections.abc import Sequence
from dataclasses import replace

from tree.shape import TreeShape

from ..config import EngineSettings, counted
from .candidate import kind_of, tree_of
from .marginal import with_bounds
from .notes import NO_TREE, why_no_tree
from .plan import Plan
from .prediction import STATIC, DraftOption, Prediction, TreeKind, Workload, predict_tree
from .refit import memory_of
from .search import NODES, best_choice

LEAST_WIN = 0.03  # of the seconds per token, for another tree
AGAIN = "planned again"
ROOT = TreeShape.root_only()

Trees = tuple[TreeShape, TreeKind]


def choose_again(
    settings: EngineSettings,
    plan: Plan,
    workload: Workload,
    draft: DraftOption | None,
    tokens: float,
    num_rounds: int,
    why: str = "",
    *,
    kinds: Sequence[bool] = (True, False),
) -> Plan:
    """`plan` with the trees that are best by the times of `workload` and `draft`, within `room_nodes`; or with its own, where
    others are hardly better; in any case with what is to be expected of them. The plan's trees may have more `tokens` a pass
    than `draft` says, which scales ranks alike and so never has nodes accepted for certain (see `_with_whole`). `why` is added
    to the note that says what changed; `kinds` as in `best_choice`."""
    memory = memory_of(plan)
    fixed = replace(workload, memory=lambda draft, num_nodes, num_slots, coded: memory, codings=(False,))
    plain = predict_tree(workload, memory, ROOT, None)
    sizes = [size for size in NODES if 1 < size <= plan.room_nodes]
    found = None
    if draft is not None and sizes:
        found = best_choice(fixed, [draft], (plan.num_slots,), max_nodes=plan.room_nodes, sizes=sizes, kinds=kinds)
    vocab_size = workload.target.vocab_size
    own = plan.tree, kind_of(fixed, memory, plan.tree, draft, dynamic=plan.dynamic) if plan.tree.num_nodes > 1 else STATIC
    expected = predict_tree(workload, memory, plan.tree, draft, own[1])
    more = max(tokens - expected.expected_tokens, 0.0)
    share = min(more / max(_most_tokens(*own) - expected.expected_tokens, 1e-6), 1.0)  # of rounds
    trees: dict[Trees, Prediction] = {own: _with_whole(expected, share, own, own)}
    best = None
    if found is not None:
        shape = tree_of(found, vocab_size)
        other = shape, kind_of(fixed, memory, shape, draft, dynamic=found.dynamic)
        trees[other] = best = _with_whole(predict_tree(workload, memory, shape, draft, other[1]), share, own, other)
    if not settings.needs_tree:
        trees[ROOT, STATIC] = plain
    chosen = min(trees, key=lambda one: trees[one].s_per_token)
    if trees[chosen].s_per_token > trees[own].s_per_token * (1 - LEAST_WIN):
        chosen = own
    (shape, kind), prediction = chosen, trees[chosen]
    notes = [note for note in plan.notes if not note.startswith((NO_TREE, AGAIN))]
    if shape.num_nodes == 1 and draft is not None:
        notes.append(why_no_tree([draft], plain, best))
    again = replace(
        plan,
        tree=shape,
        dynamic=kind.dynamic,
        ahead_steps=kind.ahead_steps,
        acceptance=draft.acceptance if draft is not None else plan.acceptance,
        prediction=prediction,
        autoregressive_s_per_token=plain.s_per_token,
        replanned=plan.replanned + 1,
        notes=(*notes, _note(plan, shape, kind, prediction, num_rounds, why)),
    )
    return with_bounds(again, workload, draft, memory)


def _note(plan: Plan, shape: TreeShape, kind: TreeKind, prediction: Prediction, num_rounds: int, why: str) -> str:
    """What is otherwise now, and why."""
    steps = f", {counted(kind.ahead_steps, 'step')} ahead" if kind.ahead_steps else ""
    before = f", {counted(plan.ahead_steps, 'step')} ahead" if plan.ahead_steps else ""
    kinds = [" that follow the text" if dynamic and nodes > 1 else "" for dynamic, nodes in _kinds(plan, shape, kind)]
    because = f", as {why}" if why else ""
    return (
        f"{AGAIN} after {counted(num_rounds, 'round')}{because}: {counted(shape.num_nodes, 'node')}{kinds[0]}{steps}, before "
        f"{plan.tree.num_nodes}{kinds[1]}{before}; {prediction.s_per_token:.3g} s/token expected, before "
        f"{plan.prediction.s_per_token:.3g}"
    )


def _kinds(plan: Plan, shape: TreeShape, kind: TreeKind) -> list[tuple[bool, int]]:
    return [(kind.dynamic, shape.num_nodes), (plan.dynamic, plan.tree.num_nodes)]


def _with_whole(prediction: Prediction, share: float, own: Trees, other: Trees) -> Prediction:
    """`prediction` of trees like `other`, where such a `share` of rounds accepted a whole tree like `own`. Such rounds accept a
    whole smaller tree, and as much less of a tree with fewer levels; what a larger one would bring, nobody has seen."""
    levels = min(other[0].num_levels / own[0].num_levels, 1.0)
    whole = max(min(_most_tokens(*other), levels * _most_tokens(*own)), prediction.expected_tokens)
    return replace(prediction, expected_tokens=share * whole + (1 - share) * prediction.expected_tokens)


def _most_tokens(shape: TreeShape, kind: TreeKind) -> int:
    """Tokens of a pass that accepts a tree whole: one that follows the text may be a chain."""
    return shape.num_nodes if kind.dynamic else shape.num_levels
