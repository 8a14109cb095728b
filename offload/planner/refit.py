"""Pure: times and acceptance corrected by what rounds of a run took, and the tree that is best by them in the memory there is.

Rounds are the best measurement there is, of the one tree that ran: what was measured before, of all trees, is scaled to it.
"""

from dataclasses import dataclass, replace

from tree.acceptance import Acceptance
from tree.optimizer import expected_tokens
from tree.shape import TreeShape

from ..config import EngineSettings, counted
from .candidate import tree_of
from .hardware import HardwareProfile
from .memory import MemoryPlan
from .notes import NO_TREE, why_no_tree
from .plan import Plan
from .prediction import DraftOption, Prediction, Workload, predict_tree
from .search import NODES, best_choice
from .workload import context_tokens

MOST_TIMES = 32.0  # by which a time is corrected at most: what is further off was not what is thought
# What was expected of a pass's tokens counts as so many rounds. Greedy text has stretches that are alike, where the last rounds
# tell the next ones; sampled text differs from round to round.
BELIEVED_ROUNDS, BELIEVED_GREEDY_ROUNDS = 8, 2
MOST_ACCEPTED = 0.99  # of an acceptance that is scaled up: some of the children are refused
LEAST_WIN = 0.03  # of the seconds per token, for another tree
AGAIN = "planned again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """Seconds of a round and its parts, as a Prediction has them, and tokens a round, over the last `num_rounds` rounds of one
    plan. `copied_s`: how long the link was at its copies, 0 where nothing is streamed."""

    num_rounds: int
    tokens: float
    round_s: float
    compute_s: float
    draft_s: float
    after_s: float
    copied_s: float


def measured_anew(
    settings: EngineSettings, workload: Workload, draft: DraftOption | None, hardware: HardwareProfile
) -> tuple[Workload, DraftOption | None]:
    """The same with the times of `hardware`; rates of link and disk stay, as the run knows them better."""
    context_rows, vocab_size = context_tokens(settings), workload.target.vocab_size
    workload = replace(
        workload,
        times=hardware.times(workload.target, "target", context_rows, settings.sampling),
        verify=hardware.task_times("verify", vocab_size, settings.sampling),
        decode_s=hardware.decode_s(workload.target),
        decode_is_assumed=not hardware.knows_decoder(workload.target),
        doubts=hardware.doubts,
    )
    if draft is not None and not draft.on_host:
        draft = replace(draft, times=hardware.times(draft.cost, "draft", context_rows, settings.draft_sampling))
    return workload, draft


def refit(
    seen: Seen, plan: Plan, workload: Workload, draft: DraftOption | None, tokens: float
) -> tuple[Workload, DraftOption | None]:
    """The same, so that the tree of `plan` takes what was seen of it, and has `tokens` a pass as nearly as can be."""
    expected = predict_tree(workload, memory_of(plan), plan.tree, draft, plan.kind)
    slower, later_s = _ratio(seen.compute_s, expected.compute_s), seen.after_s - expected.after_s
    times = replace(
        workload.times,
        layer_s=tuple(slower * seconds for seconds in workload.times.layer_s),
        rest_s=tuple(max(seconds + later_s, 0.0) for seconds in workload.times.rest_s),  # Python, whatever the tree
        wake_s=slower * workload.times.wake_s,
    )
    workload = replace(workload, times=times, decode_s=tuple(slower * seconds for seconds in workload.decode_s))
    if seen.copied_s > 0:
        workload = replace(workload, link_bytes_per_s=plan.bytes_per_pass / seen.copied_s)
    if draft is None or plan.tree.num_nodes == 1:
        return workload, draft
    # Layers of the target that serve its draft take as long as has been seen of them already.
    served_s = predict_tree(workload, memory_of(plan), plan.tree, _of_no_time(draft), plan.kind).draft_s
    own_s = predict_tree(workload, memory_of(plan), plan.tree, draft, plan.kind).draft_s - served_s
    slower = _ratio(max(seen.draft_s - served_s, 0.0), own_s)
    times = replace(
        draft.times,
        layer_s=tuple(slower * seconds for seconds in draft.times.layer_s),
        rest_s=tuple(slower * seconds for seconds in draft.times.rest_s),
        wake_s=slower * draft.times.wake_s,
    )
    return workload, replace(draft, times=times, acceptance=scaled_acceptance(draft.acceptance, plan.tree, tokens))


def _of_no_time(draft: DraftOption) -> DraftOption:
    nothing = (0.0,) * len(draft.times.rows)
    return replace(draft, times=replace(draft.times, layer_s=nothing, rest_s=nothing, wake_s=0.0))


def believed_tokens(settings: EngineSettings, seen: Seen, plan: Plan) -> float:
    """Tokens of a pass over the tree of `plan`: what was seen of it, and what was expected counts as some more rounds."""
    as_much = BELIEVED_GREEDY_ROUNDS if settings.sampling == "greedy" else BELIEVED_ROUNDS
    believed = seen.num_rounds / (seen.num_rounds + as_much)
    return believed * seen.tokens + (1 - believed) * plan.prediction.expected_tokens


def scaled_acceptance(acceptance: Acceptance, shape: TreeShape, tokens: float) -> Acceptance:
    """`acceptance` times a factor by which a pass over `shape` has `tokens` tokens, or as near to it as there is one."""
    least, most = 1 / MOST_TIMES, MOST_TIMES
    for _ in range(30):
        factor = (least * most) ** 0.5
        if expected_tokens(shape, _times(acceptance, factor)) < tokens:
            least = factor
        else:
            most = factor
    return _times(acceptance, factor)


def choose_again(
    settings: EngineSettings, plan: Plan, workload: Workload, draft: DraftOption | None, tokens: float, num_rounds: int
) -> Plan:
    """`plan` with the tree that is best by the times of `workload` and `draft`, within `room_nodes`; or with its own, where
    another is hardly better; in any case with what is to be expected of it. If the plan's tree has more `tokens` a pass than
    `draft` says, which scales ranks alike and so never has nodes accepted for certain, then any tree has as many times more."""
    memory = memory_of(plan)
    fixed = replace(workload, memory=lambda draft, num_nodes, num_slots, coded: memory, codings=(False,))
    plain = predict_tree(workload, memory, TreeShape.root_only(), None)
    sizes = [size for size in NODES if 1 < size <= plan.room_nodes]
    found = best_choice(fixed, [draft], (plan.num_slots,), max_nodes=plan.room_nodes, sizes=sizes) if draft and sizes else None
    by_draft = predict_tree(workload, memory, plan.tree, draft, plan.kind)
    more = max(tokens / by_draft.expected_tokens, 1.0)
    kept = _with_tokens(by_draft, plan.tree, more)
    shapes = {plan.tree: kept}
    if found is not None:
        shape = tree_of(found, workload.target.vocab_size)
        shapes[shape] = best = _with_tokens(predict_tree(workload, memory, shape, draft), shape, more)
    if not settings.needs_tree:
        shapes[TreeShape.root_only()] = plain
    shape = min(shapes, key=lambda shape: shapes[shape].s_per_token)
    if shapes[shape].s_per_token > kept.s_per_token * (1 - LEAST_WIN):
        shape = plan.tree
    notes = [note for note in plan.notes if not note.startswith((NO_TREE, AGAIN))]
    if shape.num_nodes == 1 and draft is not None:
        notes.append(why_no_tree([draft], plain, best if found is not None else None))
    notes.append(
        f"{AGAIN} after {counted(num_rounds, 'round')}: {counted(shape.num_nodes, 'node')}, before {plan.tree.num_nodes}; "
        f"{shapes[shape].s_per_token:.3g} s/token expected, before {plan.prediction.s_per_token:.3g}"
    )
    return replace(
        plan,
        tree=shape,
        prediction=shapes[shape],
        autoregressive_s_per_token=plain.s_per_token,
        replanned=plan.replanned + 1,
        notes=tuple(notes),
    )


def memory_of(plan: Plan) -> MemoryPlan:
    return MemoryPlan(
        placement=plan.placement,
        num_slots=plan.num_slots,
        max_sequences=plan.max_sequences,
        context_rows=plan.context_rows,
        pass_rows=plan.pass_rows,
        ahead_rows=plan.ahead_rows,
        device_ledger=plan.device_ledger,
        host_ledger=plan.host_ledger,
    )


def _ratio(seen: float, expected: float) -> float:
    return min(max(seen / expected, 1 / MOST_TIMES), MOST_TIMES) if expected > 0 else 1.0


def _with_tokens(prediction: Prediction, shape: TreeShape, times: float) -> Prediction:
    """As many `times` the tokens, one for every level at most."""
    return replace(prediction, expected_tokens=min(times * prediction.expected_tokens, float(shape.num_levels)))


def _times(acceptance: Acceptance, factor: float) -> Acceptance:
    def scaled(vector: tuple[float, ...]) -> tuple[float, ...]:
        most = max(sum(vector), MOST_ACCEPTED)
        return tuple(factor * probability * most / max(factor * sum(vector), most) for probability in vector)

    return replace(acceptance, levels=tuple(map(scaled, acceptance.levels)))
