"""Pure: memory of a run whose draft lies on the host and computes there, beside a device that has the target."""

from collections.abc import Callable
from dataclasses import replace

from ..errors import FitError
from .cost import ModelCost, ledger_lines, size_text
from .memory import Budgets, MemoryPlan

NAMES = ("draft model", "draft key/value cache")


def memory_beside(draft: ModelCost, ahead_rows: int, budgets: Budgets, planned: Callable[[Budgets], MemoryPlan]) -> MemoryPlan:
    """What `planned` makes of the budgets for a target alone, with what `draft` leaves of the host's; its cache has
    `ahead_rows` more rows than the target's. FitError where that is nothing."""
    alone = planned(replace(budgets, host_bytes=None))
    cache_bytes = draft.kv_bytes_per_row * (alone.context_rows + ahead_rows) * alone.max_sequences
    ledger = dict(zip(NAMES, (draft.outside_bytes + draft.computed_bytes, cache_bytes), strict=True))
    needed_bytes, host_bytes = sum(ledger.values()), budgets.host_bytes
    if host_bytes is not None and needed_bytes > host_bytes:
        raise FitError(
            ledger_lines(ledger, host_bytes),
            where="--host-memory with --draft-device cpu",
            cure=f"allow at least {size_text(needed_bytes)}, or take a smaller draft",
        )
    found = planned(replace(budgets, host_bytes=None if host_bytes is None else host_bytes - needed_bytes))
    return replace(found, ahead_rows=ahead_rows, host_ledger={**found.host_ledger, **ledger})
