"""Pure: times and acceptance corrected by what rounds of a run took.

Rounds are the best measurement there is, of the trees that ran: what was measured before, of all trees, is scaled to them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..config import EngineSettings
from .hardware import HardwareProfile, ModelTimes
from .learned import scaled_acceptance
from .memory import MemoryPlan
from .plan import Plan
from .prediction import DraftOption, Workload, drafting_of, expanded_of, predict_tree
from .workload import context_tokens

MOST_TIMES = 32.0  # by which a time is corrected at most: what is further off was not what is thought
# What was expected of a pass's tokens counts as so many rounds. Greedy text has stretches that are alike, where the last rounds
# tell the next ones; sampled text differs from round to round.
BELIEVED_ROUNDS, BELIEVED_GREEDY_ROUNDS = 8, 2
MOST_FORESEEN = 0.95
APART = 1.25  # times as many rows: points that are nearer say nothing more


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """Seconds of a round and its parts, as a Prediction has them, and tokens a round, over the last `num_rounds` rounds of one
    plan, whose trees had `nodes` nodes, of which the share `foreseen` was grown ahead. `found`: how many of the tokens were
    found in a text. `ahead_s`: what all steps ahead took, where they keep the host. `copied_s`: how long the link was at its
    copies, 0 where nothing is streamed."""

    num_rounds: int
    tokens: float
    found: float = 0.0
    nodes: float = 0.0
    foreseen: float = 0.0
    round_s: float
    compute_s: float
    draft_s: float
    after_s: float
    ahead_s: float = 0.0
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


@dataclass(frozen=True, slots=True)
class Point:
    """What a layer of the target took over so many rows, and a level of the draft, 0 where there was none."""

    nodes: float
    layer_s: float
    rows: float
    level_s: float


def refit(
    seen: Seen,
    plan: Plan,
    workload: Workload,
    draft: DraftOption | None,
    tokens: float,
    earlier: Sequence[Point] = (),
) -> tuple[Workload, DraftOption | None]:
    """The same, so that the tree of `plan` takes what was seen of it, and has `tokens` a pass as nearly as can be; and other
    trees that ran take what was seen of them `earlier`. A draft that nobody has seen draft is as much quicker or slower than
    was measured as the target is."""
    vocab_size, nodes = workload.target.vocab_size, seen.nodes or float(plan.tree.num_nodes)
    expected = predict_tree(workload, memory_of(plan), plan.tree, draft, plan.kind)
    compute_s = workload.target.equivalent_layers * float(workload.times.layer(nodes)) + expected.decode_s
    slower, later_s = _ratio(seen.compute_s, compute_s), seen.after_s - expected.after_s
    times = replace(
        workload.times,
        layer_s=tuple(slower * seconds for seconds in workload.times.layer_s),
        rest_s=tuple(max(seconds + later_s, 0.0) for seconds in workload.times.rest_s),  # Python, whatever the tree
        wake_s=slower * workload.times.wake_s,
    )
    times = _through(times, [(point.nodes, point.layer_s) for point in earlier], nodes)
    workload = replace(workload, times=times, decode_s=tuple(slower * seconds for seconds in workload.decode_s))
    if seen.copied_s > 0:
        workload = replace(workload, link_bytes_per_s=plan.bytes_per_pass / seen.copied_s)
    if draft is None:
        return workload, draft
    if plan.tree.num_nodes == 1:
        return workload, _slower(draft, slower)
    if plan.ahead_steps:
        drafting = drafting_of(draft, plan.tree, vocab_size, plan.kind)
        draft = replace(draft, foreseen=min(draft.foreseen * seen.foreseen / max(drafting.hidden, 1e-6), MOST_FORESEEN))
    # Layers of the target that serve its draft take as long as has been seen of them already.
    served_s = predict_tree(workload, memory_of(plan), plan.tree, _slower(draft, 0.0), plan.kind).draft_s
    own_s = predict_tree(workload, memory_of(plan), plan.tree, draft, plan.kind).draft_s - served_s
    draft = _slower(draft, _ratio(max(seen.draft_s - served_s, 0.0), own_s))
    rows = _rows(plan, draft, vocab_size)
    levels = [(point.rows, point.level_s / draft.cost.equivalent_layers) for point in earlier if point.level_s]
    if not draft.cost.is_base:
        draft = replace(draft, times=_through(draft.times, levels, rows))
    if plan.ahead_steps and seen.ahead_s > 0:
        steps_s = plan.ahead_steps * float(replace(draft, ahead_times=1.0).ahead_s(plan.tree.num_nodes))
        draft = replace(draft, ahead_times=_ratio(seen.ahead_s, steps_s))
    fitted = scaled_acceptance(draft.acceptance, plan.tree, tokens, vocab_size=vocab_size, dynamic=plan.dynamic)
    return workload, replace(draft, acceptance=fitted)


def point_of(plan: Plan, seen: Seen, workload: Workload, draft: DraftOption | None) -> Point:
    """What times that were refitted to `seen` say of its tree."""
    nodes = seen.nodes or float(plan.tree.num_nodes)
    layer_s = float(workload.times.layer(nodes))
    if draft is None or plan.tree.num_nodes == 1:
        return Point(nodes, layer_s, 1.0, 0.0)
    rows = _rows(plan, draft, workload.target.vocab_size)
    return Point(nodes, layer_s, rows, draft.cost.equivalent_layers * float(draft.times.layer(rows)))


def _rows(plan: Plan, draft: DraftOption, vocab_size: int) -> float:
    """Of a level of the draft, in the mean."""
    expanded = expanded_of(draft, plan.tree, vocab_size, plan.kind)
    return max(float(expanded.sum() / np.maximum(np.minimum(expanded, 1).sum(), 1)), 1.0)


def _through(times: ModelTimes, points: Sequence[tuple[float, float]], fixed: float) -> ModelTimes:
    """`times` of a layer corrected so that it takes what `points` (rows, seconds) say, and what it took over `fixed` rows;
    between them the correction goes evenly with the logarithm of rows."""
    known = {fixed: 1.0}
    for rows, seconds in points:
        if all(max(rows, other) / min(rows, other) > APART for other in known):
            known[rows] = _ratio(seconds, float(times.layer(rows)))
    if len(known) == 1:
        return times
    at = sorted(known)
    factors = np.interp(np.log(times.rows), np.log(at), [known[rows] for rows in at])
    return replace(times, layer_s=tuple(float(factor * one) for factor, one in zip(factors, times.layer_s, strict=True)))


def _slower(draft: DraftOption, times: float) -> DraftOption:
    measured = draft.times
    measured = replace(
        measured,
        layer_s=tuple(times * seconds for seconds in measured.layer_s),
        rest_s=tuple(times * seconds for seconds in measured.rest_s),
        wake_s=times * measured.wake_s,
    )
    return replace(draft, times=measured)


def believed_tokens(settings: EngineSettings, seen: Seen, plan: Plan) -> float:
    """Tokens of a pass over the tree of `plan`: what was seen of it, and what was expected counts as some more rounds."""
    as_much = BELIEVED_GREEDY_ROUNDS if settings.sampling == "greedy" else BELIEVED_ROUNDS
    believed = seen.num_rounds / (seen.num_rounds + as_much)
    return believed * seen.tokens + (1 - believed) * plan.prediction.expected_tokens


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
