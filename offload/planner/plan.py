"""Turns "auto" into numbers, once, before anything is loaded: draft, tree, which layer lives where, slots, rows per pass.

Pure: budgets and rates come in as numbers, a frozen Plan goes out, or a FitError that shows the sum.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tree.acceptance import Acceptance
from tree.optimizer import best_tree, expected_tokens
from tree.shape import TreeShape
from tree.spec import OptimalTree

from ..config import EngineSettings, counted
from ..errors import FitError, UsageError
from ..weights.placement import Placement
from .cost import ModelCost
from .hardware import HardwareProfile
from .memory import MAX_AUTO_SLOTS, MIN_SLOTS, Budgets, MemoryPlan, plan_memory
from .rounds import DraftOption, Prediction, Workload, predict
from .search import MAX_NODES, Choice, best_choice

# Attention costs grow with the context; predictions are for a text in its middle, and texts are seldom longer than this.
TYPICAL_CONTEXT_TOKENS = 512
ASSUMED_DISK_BYTES_PER_S = 3e9  # of a profile that does not say: sequential reads of a common NVMe drive on PCIe 3
SLOTS = (MIN_SLOTS, MAX_AUTO_SLOTS)
ROOT = TreeShape.root_only()
Point = tuple[int | None, TreeShape, MemoryPlan, Prediction]  # the draft's place among those offered, and what runs with it
NOTHING_STREAMED = "the model fits on the device entirely: nothing is streamed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Every decision of a run. Ledgers are bytes by named part; `context_rows` counts prompt, new tokens and tree.

    `draft` is the place of the chosen draft among those offered, None for none. `draft_passes` says how its passes run:
    "graphs", recorded and replayed, or "eager", launched kernel by kernel; None without one. `link_bytes_per_s` is what copies
    can reach, None when nothing is streamed.
    """

    draft: int | None
    placement: Placement
    num_slots: int
    tree: TreeShape
    context_rows: int
    pass_rows: int
    max_positions: int
    bytes_per_pass: int
    device_ledger: Mapping[str, int]
    device_budget_bytes: int | None
    host_ledger: Mapping[str, int]
    host_budget_bytes: int | None
    link_bytes_per_s: float | None
    prediction: Prediction
    autoregressive_s_per_token: float | None
    draft_passes: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def text_tokens(self) -> int:
        """Most tokens of prompt and answer together: what the rows leave beside the tree, and the model has positions for."""
        return min(self.context_rows - self.tree.num_nodes + 1, self.max_positions)

    def to_json(self) -> dict[str, object]:
        """What `--json` reports of the plan of a run."""
        prediction = self.prediction
        return {
            "predicted_pass_s": prediction.pass_s,
            "predicted_draft_s": prediction.draft_s,
            "predicted_compute_s": prediction.compute_s,
            "predicted_round_s": prediction.round_s,
            "predicted_s_per_token": prediction.s_per_token,
            "autoregressive_s_per_token": self.autoregressive_s_per_token,
            "expected_tokens_per_pass": prediction.expected_tokens,
            "link_bytes_per_s": self.link_bytes_per_s,
            "draft_passes": self.draft_passes,
            "context_rows": self.context_rows,
            "pass_rows": self.pass_rows,
            "device_bytes": dict(self.device_ledger),
            "device_budget_bytes": self.device_budget_bytes,
            "host_bytes": dict(self.host_ledger),
            "host_budget_bytes": self.host_budget_bytes,
            "notes": list(self.notes),
        }


def make_workload(
    settings: EngineSettings,
    target: ModelCost,
    hardware: HardwareProfile,
    budgets: Budgets,
    *,
    max_positions: int,
) -> Workload:
    """What the search needs to know of this target on this machine."""

    def memory(draft: DraftOption | None, num_nodes: int, num_slots: int) -> MemoryPlan:
        cost = draft.cost if draft else None
        return plan_memory(settings, target, cost, num_nodes, num_slots, max_positions=max_positions, budgets=budgets)

    return Workload(
        target=target,
        times=hardware.times(target, "target", context_tokens(settings), settings.law),
        verify=hardware.law_times("verify", target.vocab_size, settings.law),
        link_bytes_per_s=settings.emulate_link_bytes_per_s or hardware.link_bytes_per_s,
        disk_bytes_per_s=hardware.disk_bytes_per_s or ASSUMED_DISK_BYTES_PER_S,
        disk_is_assumed=hardware.disk_bytes_per_s is None,
        doubts=hardware.doubts,
        memory=memory,
    )


def make_option(
    settings: EngineSettings, hardware: HardwareProfile, name: str, cost: ModelCost, acceptance: Acceptance
) -> DraftOption:
    """The same of a draft that is offered."""
    times = hardware.times(cost, "draft", context_tokens(settings), settings.draft_law)
    return DraftOption(name=name, cost=cost, times=times, acceptance=acceptance)


def context_tokens(settings: EngineSettings) -> int:
    """How many tokens an average pass looks back on: as the settings have it, or half of what there is room for."""
    room = settings.text_tokens or settings.max_context or 2 * TYPICAL_CONTEXT_TOKENS
    return settings.context_tokens or min(room // 2, TYPICAL_CONTEXT_TOKENS)


def plan_run(
    settings: EngineSettings,
    tree: TreeShape | OptimalTree | None,
    workload: Workload,
    drafts: Sequence[DraftOption],
    *,
    max_positions: int,
    budgets: Budgets,
) -> Plan:
    """The plan with the least predicted seconds per token. `tree` None leaves the choice of a tree, and whether to use a
    draft at all, to the planner. Raises FitError when the budgets hold no plan."""
    slots = (settings.slots,) if settings.slots else SLOTS
    plain = best_choice(workload, [None], slots)
    if tree is None:
        draft, shape, memory, prediction = _choose(settings, workload, drafts, slots, plain)
    else:
        draft, shape, memory, prediction = _fixed(tree, workload, drafts, slots)
    streams = bool(memory.placement.streamed)
    plain_s = plain.s_per_token if plain else None
    return Plan(
        draft=draft,
        placement=memory.placement,
        num_slots=memory.num_slots,
        tree=shape,
        context_rows=memory.context_rows,
        pass_rows=memory.pass_rows,
        max_positions=max_positions,
        bytes_per_pass=len(memory.placement.streamed) * workload.target.layer_bytes,
        device_ledger=memory.device_ledger,
        device_budget_bytes=budgets.device_bytes,
        host_ledger=memory.host_ledger,
        host_budget_bytes=budgets.host_bytes,
        link_bytes_per_s=workload.link_bytes_per_s if streams else None,
        prediction=prediction,
        autoregressive_s_per_token=plain_s,
        draft_passes=None if draft is None else "graphs" if budgets.replays else "eager",
        notes=tuple(_notes(workload, memory, drafts if tree is None else (), draft)),
    )


def _choose(
    settings: EngineSettings, workload: Workload, drafts: Sequence[DraftOption], slots: Sequence[int], plain: Choice | None
) -> Point:
    max_nodes = max(settings.max_context // 4, 1) if settings.max_context else MAX_NODES
    choice = best_choice(workload, drafts, slots, max_nodes=max_nodes, known=plain)
    if choice is None:
        workload.memory(None, 1, slots[0])  # raises, and says by how much
        raise AssertionError("no plan, and yet the smallest fits")
    shape = tree_of(choice, workload.target.vocab_size)
    draft = drafts.index(choice.draft) if choice.draft else None
    return draft, shape, choice.memory, predict_tree(workload, choice.memory, shape, choice.draft)


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


def _fixed(tree: TreeShape | OptimalTree, workload: Workload, drafts: Sequence[DraftOption], slots: Sequence[int]) -> Point:
    """The tree that was asked for, with the draft, of those that fit beside it, and the slots that suit it best. The root alone
    needs no draft. FitError when nothing fits."""
    candidates: list[tuple[int | None, DraftOption | None, TreeShape]] = [
        (place, draft, shape_for(tree, draft.acceptance, workload.target.vocab_size))
        for place, draft in enumerate(drafts)
        if tree.num_nodes > 1
    ] or [(None, None, ROOT)]
    points = [
        (place, shape, memory, predict_tree(workload, memory, shape, draft))
        for place, draft, shape in candidates
        for memory in _memories(workload, draft, shape.num_nodes, slots)
    ]
    if not points:
        _, draft, shape = candidates[0]
        workload.memory(draft, shape.num_nodes, slots[0])  # raises, and says by how much
        raise AssertionError("no plan, and yet the first draft fits")
    return min(points, key=lambda point: point[3].s_per_token)


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
    """One for every number of slots that fits."""
    found: list[MemoryPlan] = []
    for num_slots in slots:
        try:
            found.append(workload.memory(draft, num_nodes, num_slots))
        except FitError:
            break
    return found


def predict_tree(workload: Workload, memory: MemoryPlan, shape: TreeShape, draft: DraftOption | None) -> Prediction:
    if draft is None:
        return predict(workload, memory, 1, 0.0, 1.0)
    draft_s = float(draft.draft_s(expanded_per_level(shape)))
    return predict(workload, memory, shape.num_nodes, draft_s, expected_tokens(shape, draft.acceptance))


def expanded_per_level(shape: TreeShape) -> npt.NDArray[np.int64]:
    """How many nodes of each level have children."""
    return np.array([len(nodes) for nodes in shape.expanded], dtype=np.int64)


def _fits(workload: Workload, draft: DraftOption) -> bool:
    try:
        workload.memory(draft, 2, MIN_SLOTS)
    except FitError:
        return False
    return True


def _notes(
    workload: Workload,
    memory: MemoryPlan,
    drafts: Sequence[DraftOption],
    draft: int | None,
) -> Iterator[str]:
    placement = memory.placement
    if not placement.streamed:
        yield NOTHING_STREAMED
    if drafts and draft is None:
        fitting = [option for option in drafts if _fits(workload, option)]
        yield (
            "no draft is used: each that fits would take longer than the tokens it brings are worth"
            if fitting
            else "no draft is used: none of those offered fits beside the target's slots"
        )
    if placement.disk:
        disk_s = len(placement.disk) * workload.target.layer_bytes / workload.disk_bytes_per_s
        if disk_s > len(placement.streamed) * workload.target.layer_bytes / workload.link_bytes_per_s:
            yield f"the disk sets the pace: every pass reads {counted(len(placement.disk), 'layer')} from it"
        if workload.disk_is_assumed:
            yield f"the disk is taken to read {workload.disk_bytes_per_s / 1e9:g} GB/s, as nobody said: --disk names its rate"
    yield from workload.doubts
