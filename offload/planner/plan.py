"""Turns "auto" into numbers, once, before anything is loaded: draft, tree, which layer lives where, slots, rows per pass.

Pure: budgets and rates come in as numbers, a frozen Plan goes out, or a FitError that shows the sum.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tree.acceptance import Acceptance
from tree.aim import Aim
from tree.shape import TreeShape
from tree.spec import TreeRequest

from ..config import EngineSettings
from ..weights.placement import Placement
from .candidate import ROOT, Candidate, candidate
from .cost import computed_bytes, stored_bytes
from .found import FoundTrees, found_trees, with_found
from .given_tree import with_tree
from .marginal import with_bounds
from .memory import Budgets
from .notes import NO_TREE, plan_notes, why_no_tree
from .prediction import DraftOption, Offer, Prediction, TreeKind, predict_tree
from .residency import MAX_AUTO_SLOTS, MIN_SLOTS
from .room import reserve_memory, with_room
from .search import MAX_NODES, NODES, Choice, best_choice, quickest
from .tree_flag import assumed_acceptance, default_acceptance, read_acceptance

SLOTS = (MIN_SLOTS, MAX_AUTO_SLOTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Every decision of a run. Ledgers are bytes by named part. There is memory for `max_sequences` texts at once, each of
    `context_rows` rows: prompt, new tokens and tree. A pass has at most `pass_rows` rows, of all texts together. What is
    predicted is of one text.

    `offer` is the place of the offer that was chosen, `draft` that of its draft, None for none. `draft_passes` says how its
    passes run: "graphs", recorded and replayed, or "eager", launched kernel by kernel; None without one. `draft_on_host`: it
    computes on the CPU, beside a device that has the target. `small_uploads` says
    how small tensors reach the device, as soon as that is known: "copy", "mapped", or None on a CPU. There is memory for any
    tree of at most `room_nodes` nodes; `replanned` is how often another was chosen since the run began. `link_bytes_per_s` is
    what copies can reach, None when nothing is streamed.

    `tree` is the shape of every tree, or, of `dynamic` ones, a common shape of the most nodes that they have; `ngram` says
    whether they have nodes of what was found in the text, or in datastores. `acceptance`, `least_gain` and `least_value` are
    those of `tree.aim.Aim`. `ahead_steps` is how often drafts grow ahead in a pass, for
    which the draft's cache has `ahead_rows` more rows for each text.

    A pass sends `bytes_per_pass` over the link, of which `disk_bytes_per_pass` are read from disk; the parameters of the layers
    that it streams take `raw_bytes_per_pass`.
    """

    offer: int = 0
    draft: int | None
    placement: Placement
    num_slots: int
    tree: TreeShape
    room_nodes: int
    max_sequences: int
    context_rows: int
    pass_rows: int
    max_positions: int
    bytes_per_pass: int
    disk_bytes_per_pass: int
    raw_bytes_per_pass: int
    device_ledger: Mapping[str, int]
    device_budget_bytes: int | None
    host_ledger: Mapping[str, int]
    host_budget_bytes: int | None
    link_bytes_per_s: float | None
    prediction: Prediction
    autoregressive_s_per_token: float | None
    acceptance: Acceptance | None = None
    dynamic: bool = False
    ngram: bool = False
    least_gain: float = 0.0
    least_value: float = 0.0
    ahead_steps: int = 0
    ahead_rows: int = 0
    draft_passes: str | None = None
    draft_on_host: bool = False
    small_uploads: str | None = None
    replanned: int = 0
    notes: tuple[str, ...] = ()

    @property
    def aim(self) -> Aim:
        """What a drafter is to know of it."""
        return Aim(
            shape=self.tree,
            dynamic=self.dynamic,
            acceptance=self.acceptance,
            least_gain=self.least_gain,
            least_value=self.least_value,
        )

    @property
    def kind(self) -> TreeKind:
        return TreeKind(self.dynamic, self.ahead_steps)

    @property
    def text_tokens(self) -> int:
        """Most tokens of one text, prompt and answer: what rows leave beside any tree, and the model has positions for."""
        return min(self.context_rows - self.room_nodes + 1, self.max_positions)

    @property
    def why_no_tree(self) -> str | None:
        """The note that says why there is only a root, where nobody asked for that."""
        return next((note for note in self.notes if note.startswith(NO_TREE)), None)

    def to_json(self) -> dict[str, object]:
        """What `--json` reports of the plan of a run."""
        prediction = self.prediction
        return {
            "predicted_pass_s": prediction.pass_s,
            "predicted_draft_s": prediction.draft_s,
            "hidden_draft_s": prediction.hidden_draft_s,
            "dynamic": self.dynamic,
            "ahead_steps": self.ahead_steps,
            "predicted_compute_s": prediction.compute_s,
            "predicted_decode_s": prediction.decode_s,
            "coded_layers": len(self.placement.coded),
            "predicted_round_s": prediction.round_s,
            "predicted_s_per_token": prediction.s_per_token,
            "autoregressive_s_per_token": self.autoregressive_s_per_token,
            "expected_tokens_per_pass": prediction.expected_tokens,
            "link_bytes_per_s": self.link_bytes_per_s,
            "ngram": self.ngram,
            "draft_passes": self.draft_passes,
            "draft_device": None if self.draft is None else "cpu" if self.draft_on_host else "same",
            "small_uploads": self.small_uploads,
            "max_sequences": self.max_sequences,
            "context_rows": self.context_rows,
            "pass_rows": self.pass_rows,
            "device_bytes": dict(self.device_ledger),
            "device_budget_bytes": self.device_budget_bytes,
            "host_bytes": dict(self.host_ledger),
            "host_budget_bytes": self.host_budget_bytes,
            "replanned": self.replanned,
            "notes": list(self.notes),
        }


def plan_run(
    settings: EngineSettings,
    tree: TreeRequest | None,
    offers: Sequence[Offer],
    *,
    max_positions: int,
    budgets: Budgets,
) -> Plan:
    """The plan with the least predicted seconds per token, of all `offers`. `tree` None leaves the choice of a tree, and
    whether to use a draft at all, to the planner. Raises FitError when the budgets hold no plan."""
    slots = (settings.slots,) if settings.slots else SLOTS
    plain = quickest([best_choice(offer.workload, [None], slots) for offer in offers])
    best = _choose(settings, offers, slots, plain) if tree is None else with_tree(tree, offers, slots)
    workload, drafts = offers[best.offer].workload, offers[best.offer].drafts
    found = found_trees(settings, tree, workload, best.memory) if best.draft is None else None
    if isinstance(found, FoundTrees):
        best = replace(best, tree=found.tree, kind=TreeKind(dynamic=True), memory=found.memory, prediction=found.prediction)
    room_nodes, memory, prediction = best.tree.num_nodes, best.memory, best.prediction
    if tree is None and best.draft is not None and not settings.fixed_plan and settings.max_context is None:
        room_nodes, memory, prediction = with_room(workload, drafts[best.draft], best.tree, best.kind, memory, prediction)
    streams, on_host = bool(memory.placement.streamed), best.draft is not None and drafts[best.draft].on_host
    plain_s = plain[1].s_per_token if plain else None
    made = Plan(
        offer=best.offer,
        draft=best.draft,
        placement=memory.placement,
        num_slots=memory.num_slots,
        tree=best.tree,
        room_nodes=room_nodes,
        max_sequences=memory.max_sequences,
        context_rows=memory.context_rows,
        pass_rows=memory.pass_rows,
        max_positions=max_positions,
        bytes_per_pass=stored_bytes(workload.target, memory.placement.streamed),
        disk_bytes_per_pass=stored_bytes(workload.target, memory.placement.disk),
        raw_bytes_per_pass=computed_bytes(workload.target, memory.placement.streamed),
        device_ledger=memory.device_ledger,
        device_budget_bytes=budgets.device_bytes,
        host_ledger=memory.host_ledger,
        host_budget_bytes=budgets.host_bytes,
        link_bytes_per_s=workload.link_bytes_per_s if streams else None,
        prediction=prediction,
        autoregressive_s_per_token=plain_s,
        acceptance=drafts[best.draft].acceptance if best.draft is not None else None,
        dynamic=best.kind.dynamic,
        ahead_steps=best.kind.ahead_steps,
        ahead_rows=memory.ahead_rows,
        ngram=best.kind.dynamic and settings.has_ngram,
        least_value=found.least_value if isinstance(found, FoundTrees) else 0.0,
        draft_passes=None if best.draft is None else "graphs" if budgets.replays and not on_host else "eager",
        draft_on_host=on_host,
        notes=(
            *with_found(best.notes, found),
            *plan_notes(workload, memory),
            *_assumed(drafts[best.draft] if best.draft is not None else None),
        ),
    )
    return with_bounds(made, workload, drafts[best.draft] if best.draft is not None else None, memory)


def _assumed(draft: DraftOption | None) -> list[str]:
    """What there is to say of the acceptance of a base that is told by what is published of others."""
    if draft is None or not draft.cost.is_base or draft.acceptance != read_acceptance(default_acceptance(draft.name)):
        return []
    return [assumed_acceptance(draft.name)]


def _choose(
    settings: EngineSettings, offers: Sequence[Offer], slots: Sequence[int], plain: tuple[int, Choice] | None
) -> Candidate:
    """The best tree, or the root alone, and then why. A draft that would not pay stays beside the root where it takes next to
    nothing from it: a later look at the machine may say otherwise."""
    max_nodes = max(settings.max_context // 4, 1) if settings.max_context else MAX_NODES
    sizes = [size for size in NODES if 1 < size <= max_nodes]
    by_offer = [
        best_choice(offer.workload, offer.drafts, slots, max_nodes=max_nodes, sizes=sizes) if offer.drafts and sizes else None
        for offer in offers
    ]
    speculative, drafts = quickest(by_offer), [draft for offer in offers for draft in offer.drafts]
    chosen = speculative or plain
    if chosen is None:
        workload = offers[0].workload
        workload.memory(None, 1, slots[0], workload.codings[-1])  # raises, and says by how much
        raise AssertionError("no plan, and yet the smallest fits")
    if speculative is None or plain is None or settings.needs_tree or speculative[1].s_per_token < plain[1].s_per_token:
        place, choice = chosen
        notes = () if choice.draft else (why_no_tree(drafts, None, None),)
        return candidate(offers, place, choice, notes)
    place, choice = plain
    best = candidate(offers, *plain, ())
    notes = (why_no_tree(drafts, best.prediction, candidate(offers, *speculative, ()).prediction),)
    best, beside = replace(best, notes=notes), by_offer[place]
    if settings.fixed_plan or settings.max_context or beside is None or beside.draft is None:
        return best
    workload = offers[place].workload
    if (reserve := reserve_memory(workload, beside, choice)) is None:
        return best
    draft, prediction = offers[place].drafts.index(beside.draft), predict_tree(workload, reserve, ROOT, None)
    return replace(best, draft=draft, memory=reserve, prediction=prediction)
