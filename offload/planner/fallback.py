"""Pure: what a run gives up when there is less memory than was planned, and the plan that it goes on with.

The models are loaded, so nothing is chosen anew: a plan that failed becomes the next smaller one. Its last note says what was
given up and what that costs.
"""

import math
from dataclasses import dataclass, replace
from functools import partial

from tree.optimizer import best_part

from ..config import EngineSettings, bytes_text, counted
from ..errors import OutOfMemoryError
from ..weights.placement import Placement, spread_evenly
from .cost import computed_bytes, stored_bytes
from .found import USUAL
from .host_draft import NAMES as HOST_DRAFT
from .memory import CHUNK_ROWS, Budgets, MemoryPlan, device_ledger, host_ledger, plan_memory, ring_bytes
from .notes import NOTHING_STREAMED
from .plan import Plan
from .prediction import DraftOption, Workload, predict_tree
from .residency import MIN_SLOTS, layers_ledger

# Turns of remedies for one pass. Each halves something or moves a layer: where so many do not help, others take what is freed.
MAX_TURNS = 3
MIN_CHUNK_ROWS = CHUNK_ROWS[-1]  # shorter pieces of a prompt take a stream of the weights each, and hardly less memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Fallbacks:
    """What a plan was made from; `draft` is the one that it chose."""

    settings: EngineSettings
    workload: Workload
    draft: DraftOption | None
    budgets: Budgets

    def relief(self, plan: Plan, prompt_rows: int, turn: int) -> tuple[Plan, int] | None:
        """A smaller plan for a pass that the device had no memory for, what costs least first: fewer of the `prompt_rows` rows
        that are still to be read, a smaller tree, fewer resident layers, and again. With it comes the `turn` (0 at first) to go
        on with if the pass fails once more. None when nothing is left to give up, or after MAX_TURNS of each."""
        remedies = (partial(self.fewer_rows, prompt_rows=prompt_rows), self.smaller_tree, self.fewer_resident)
        for number in range(turn, MAX_TURNS * len(remedies)):
            smaller = remedies[number % len(remedies)](plan)
            if smaller is not None:
                return smaller, number + 1
        return None

    def fewer_rows(self, plan: Plan, prompt_rows: int) -> Plan | None:
        """Half of the rows that the next pass would have, if most of them are the prompt's."""
        tree_rows = plan.max_sequences * plan.tree.num_nodes
        failed_rows = min(plan.pass_rows, prompt_rows + tree_rows)
        rows = max(failed_rows // 2, tree_rows + plan.max_sequences, MIN_CHUNK_ROWS)
        if prompt_rows <= tree_rows or rows >= failed_rows:
            return None
        what = f"out of device memory: passes of at most {rows} rows, not {plan.pass_rows}, so that prompts take more of them"
        return self._completed(replace(plan, pass_rows=rows), plan, what)

    def smaller_tree(self, plan: Plan) -> Plan | None:
        """Half of the nodes, those that are accepted most often."""
        if plan.tree.num_nodes == 1:
            return None
        acceptance = self.draft.acceptance if self.draft is not None else USUAL
        tree = best_part(plan.tree, acceptance, plan.tree.num_nodes // 2)
        what = f"out of device memory: a tree of {counted(tree.num_nodes, 'node')}, not {plan.tree.num_nodes}"
        return self._completed(replace(plan, tree=tree, room_nodes=tree.num_nodes), plan, what)

    def fewer_resident(self, plan: Plan) -> Plan | None:
        """One layer less on the device; where all were, as many as free more than the slots take that streaming needs. They go
        to the host, or to disk where a run reads from it already, as the host has no room left. Nothing else
        is left to give up where the tree is the root alone and the prompt has been read."""
        placement, resident = plan.placement, sorted(plan.placement.resident)
        leaving, num_slots = self._leaving(plan)
        if not leaving or (not placement.disk and not self._host_has_room(plan, leaving)):
            return None
        left = replace(
            placement,
            resident=placement.resident - leaving,
            coded=placement.coded - leaving,
            disk=placement.disk | leaving if placement.disk else placement.disk,
        )
        what = f"out of device memory: {counted(len(left.resident), 'resident layer')}, not {len(resident)}"
        return self._completed(replace(plan, placement=left, num_slots=num_slots), plan, what)

    def less_host(self, plan: Plan, available_bytes: int) -> Plan:
        """The same tree with at most `available_bytes` of host memory for layers and ring, and less than `plan` has, whose was
        refused: more layers on disk. FitError when the ring does not fit, or the device's part where it is in the host, too."""
        least_bytes = ring_bytes(self.workload.target)
        host_bytes = min(available_bytes, max(sum(plan.host_ledger.values()) // 2, least_bytes))
        budgets = replace(self.budgets, host_bytes=max(host_bytes, 0))
        if self.budgets.shared:
            total_bytes = max(host_bytes + sum(plan.device_ledger.values()), 0)
            budgets = replace(budgets, host_bytes=total_bytes)
            if budgets.device_bytes is not None:
                budgets = replace(budgets, device_bytes=min(budgets.device_bytes, total_bytes))
        memory = plan_memory(
            self.settings,
            self.workload.target,
            self.draft.device_cost if self.draft else None,
            plan.room_nodes,
            plan.num_slots or None,
            max_positions=plan.max_positions,
            budgets=budgets,
            coded=bool(plan.placement.coded),
        )
        smaller = replace(
            plan,
            placement=memory.placement,
            num_slots=memory.num_slots,
            pass_rows=memory.pass_rows,
            ahead_rows=memory.ahead_rows,
            host_budget_bytes=budgets.host_bytes,
        )
        parts = smaller.placement.resident, smaller.placement.host, smaller.placement.disk
        counts = "{} layers resident, {} in host memory, {} on disk".format(*map(len, parts))
        what = f"less host memory than planned: {counts}, passes of at most {smaller.pass_rows} rows"
        return self._completed(smaller, plan, what)

    def as_placed(self, plan: Plan, placement: Placement, move_bytes_per_s: float | None) -> "tuple[Plan, Fallbacks]":
        """`plan` with its layers where they came to lie, and what later plans are made from. Layers in memory that the device
        would not pin are moved into a ring at `move_bytes_per_s`; a ring that found no room beside them keeps others on
        disk."""
        if placement == plan.placement:
            return plan, self
        fallbacks = replace(self, workload=replace(self.workload, move_bytes_per_s=move_bytes_per_s or math.inf))
        said, num_more = [], len(placement.disk) - len(plan.placement.disk)
        if move_bytes_per_s is not None:
            counts, rate = f"{len(placement.pageable)} of {len(placement.streamed)}", f"{move_bytes_per_s / 1e9:.3g} GB/s"
            said.append(f"{counts} streamed layers could not be pinned and are moved into a ring at {rate} on their way")
        if num_more:
            said.append(f"{num_more} more stay on disk, as the host has no room for a ring beside what could not be pinned")
        return fallbacks._completed(replace(plan, placement=placement), plan, ", ".join(said)), fallbacks

    def with_times(self, workload: Workload, draft: DraftOption | None) -> "Fallbacks":
        """The same where times and acceptance have proven to be others."""
        return replace(self, workload=workload, draft=draft)

    def _leaving(self, plan: Plan) -> tuple[frozenset[int], int]:
        """The fewest layers whose leaving frees device memory, spread evenly over the resident ones, and the slots then; none
        where there are not so many."""
        target, resident, coded = self.workload.target, sorted(plan.placement.resident), plan.placement.coded
        before_bytes = sum(layers_ledger(target, resident, plan.num_slots, coded).values())
        for num_slots in (plan.num_slots,) if plan.placement.streamed else range(MIN_SLOTS, 0, -1):
            for num_leaving in range(1, len(resident) + 1):
                leaving = frozenset(resident[order] for order in spread_evenly(num_leaving, len(resident)))
                left = layers_ledger(target, plan.placement.resident - leaving, num_slots, coded - leaving)
                if sum(left.values()) < before_bytes:
                    return leaving, num_slots
        return frozenset(), 0

    def _host_has_room(self, plan: Plan, leaving: frozenset[int]) -> bool:
        """Where one memory is host and device, a layer that moves takes no more of it."""
        if self.budgets.shared or plan.host_budget_bytes is None:
            return True
        used_bytes = sum(plan.host_ledger.values()) + stored_bytes(self.workload.target, leaving)
        return used_bytes <= plan.host_budget_bytes

    def _completed(self, plan: Plan, old: Plan, what: str) -> Plan:
        """`plan`, which decides otherwise than `old`, with all that follows from its decisions. The caches stay as they are."""
        target, draft, placement = self.workload.target, self.draft, plan.placement
        kept = {name: num_bytes for name, num_bytes in old.host_ledger.items() if name in HOST_DRAFT}
        on_device = device_ledger(
            target,
            draft.device_cost if draft else None,
            max_sequences=plan.max_sequences,
            tree_nodes=plan.room_nodes,
            context_rows=plan.context_rows,
            pass_rows=plan.pass_rows,
            ahead_rows=plan.ahead_rows,
            replays=self.budgets.replays,
        )
        memory = MemoryPlan(
            placement=placement,
            num_slots=plan.num_slots,
            max_sequences=plan.max_sequences,
            context_rows=plan.context_rows,
            pass_rows=plan.pass_rows,
            ahead_rows=plan.ahead_rows,
            device_ledger={**on_device, **layers_ledger(target, placement.resident, plan.num_slots, placement.coded)},
            host_ledger={**host_ledger(target, placement, shared=self.budgets.shared), **kept},
        )
        prediction = predict_tree(self.workload, memory, plan.tree, draft, plan.kind)
        if not math.isclose(prediction.s_per_token, old.prediction.s_per_token, rel_tol=1e-3):
            what += f"; predicted {prediction.s_per_token:.3g} s/token, not {old.prediction.s_per_token:.3g}"
        return replace(
            plan,
            bytes_per_pass=stored_bytes(target, placement.streamed),
            disk_bytes_per_pass=stored_bytes(target, placement.disk),
            raw_bytes_per_pass=computed_bytes(target, placement.streamed),
            device_ledger=memory.device_ledger,
            host_ledger=memory.host_ledger,
            link_bytes_per_s=(plan.link_bytes_per_s or self.workload.link_bytes_per_s) if placement.streamed else None,
            prediction=prediction,
            notes=(*(note for note in plan.notes if note != NOTHING_STREAMED or not placement.streamed), what),
        )


def out_of_memory(plan: Plan, kind: type[OutOfMemoryError], reason: str, device_name: str, free_bytes: int) -> OutOfMemoryError:
    """What is said when `plan` has nothing left to give up."""
    return kind(
        f"no pass finds the memory that it needs: {reason}; {bytes_text(sum(plan.device_ledger.values()))} were planned, "
        f"{bytes_text(free_bytes)} are free",
        where=f"{device_name}, with a tree of {counted(plan.tree.num_nodes, 'node')} and "
        + counted(len(plan.placement.resident), "resident layer"),
        cure="lower --gpu-memory, --max-context or --slots, or end what else uses the device",
    )
