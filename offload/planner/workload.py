"""What a plan is made from: a target and its drafts on one machine, as the search wants to know of them."""

from tree.acceptance import Acceptance

from ..config import EngineSettings
from ..errors import FitError
from .cost import ModelCost
from .hardware import HardwareProfile, Role
from .host_draft import memory_beside
from .memory import Budgets, MemoryPlan, plan_memory, rows_ahead
from .prediction import DraftOption, Workload

# Attention costs grow with the context; predictions are for a text in its middle, and texts are seldom longer than this.
TYPICAL_CONTEXT_TOKENS = 512
ASSUMED_DISK_BYTES_PER_S = 3e9  # of a profile that does not say: sequential reads of a common NVMe drive on PCIe 3


def make_workload(
    settings: EngineSettings,
    target: ModelCost,
    hardware: HardwareProfile,
    budgets: Budgets,
    *,
    max_positions: int,
) -> Workload:
    """What the search needs to know of this target on this machine."""

    def memory(draft: DraftOption | None, num_nodes: int, num_slots: int, coded: bool) -> MemoryPlan:
        cost, sizes = draft.device_cost if draft else None, (num_nodes, num_slots)

        def planned(budgets: Budgets) -> MemoryPlan:
            def place(*, may_follow: bool) -> MemoryPlan:
                named = {"max_positions": max_positions, "budgets": budgets, "coded": coded, "may_follow": may_follow}
                return plan_memory(settings, target, cost, *sizes, **named)  # type: ignore[arg-type]

            try:
                return place(may_follow=True)
            except FitError:
                if settings.tree != "auto":
                    raise
            return place(may_follow=False)  # a card's last bytes hold a tree of a shape that is known

        if draft is None or not draft.on_host:
            return planned(budgets)
        return memory_beside(draft.cost, rows_ahead(settings, num_nodes), budgets, planned)

    return Workload(
        target=target,
        times=hardware.times(target, "target", context_tokens(settings), settings.sampling),
        verify=hardware.task_times("verify", target.vocab_size, settings.sampling),
        link_bytes_per_s=settings.emulate_link_bytes_per_s or hardware.link_bytes_per_s,
        disk_bytes_per_s=hardware.disk_bytes_per_s or ASSUMED_DISK_BYTES_PER_S,
        disk_is_assumed=hardware.disk_bytes_per_s is None,
        decode_s=hardware.decode_s(target),
        decode_is_assumed=not hardware.knows_decoder(target),
        doubts=hardware.doubts,
        draws=settings.draft_sampling != "greedy",
        grows_ahead=settings.grow_ahead != "off",
        codings=(False, True) if target.is_decoded and budgets.device_bytes is not None else (False,),
        memory=memory,
    )


def make_option(
    settings: EngineSettings,
    hardware: HardwareProfile,
    name: str,
    cost: ModelCost,
    acceptance: Acceptance,
    *,
    on_host: bool = False,
) -> DraftOption:
    """The same of a draft that is offered, on the device or, measured there, on the host."""
    role: Role = "host draft" if on_host else "draft"
    times = hardware.times(cost, role, context_tokens(settings), settings.draft_sampling)
    return DraftOption(name=name, cost=cost, times=times, acceptance=acceptance, on_host=on_host)


def context_tokens(settings: EngineSettings) -> int:
    """How many tokens an average pass looks back on: as the settings have it, or half of what there is room for."""
    room = settings.text_tokens or settings.max_context or 2 * TYPICAL_CONTEXT_TOKENS
    return settings.context_tokens or min(room // 2, TYPICAL_CONTEXT_TOKENS)
