"""Pure: what would make a plan quicker, and what each draft brings. Every figure is a plan of its own, made the same way."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from ..errors import FitError
from .candidate import kind_of, tree_of
from .cost import GIB
from .memory import Budgets
from .plan import Plan
from .prediction import DraftOption, Offer, Workload, predict_tree
from .search import Choice, best_choice

MORE_BYTES = 8 * GIB
LEAST_WIN = 0.02  # of the time per token; less is not worth a line


@dataclass(frozen=True, slots=True, kw_only=True)
class Win:
    """Something to change, and seconds per token after it."""

    change: str
    s_per_token: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftVerdict:
    """What one draft brings with the tree that is best for it: by the formula of Decoding Speculative Decoding (arXiv
    2402.01528), tokens per second = expected tokens / (levels x draft time + target time), beside our own round, in which
    drafting partly hides under the stream."""

    name: str
    num_nodes: int
    num_levels: int
    expected_tokens: float
    level_s: float
    target_s: float
    s_per_token: float

    @property
    def formula_tokens_per_s(self) -> float:
        return self.expected_tokens / ((self.num_levels - 1) * self.level_s + self.target_s)


def wins(made: Plan, budgets: Budgets, again: Callable[[Budgets], Plan], others: Mapping[str, Callable[[], Plan]]) -> list[Win]:
    """The biggest first. `again` makes the same plan, with the same tree, within other budgets; `others` are plans with
    something else changed, by what that is."""
    plans = {change: partial(again, other) for change, other in _changes(made, budgets)}
    found = []
    for change, planned in (plans | dict(others)).items():
        try:
            s_per_token = planned().prediction.s_per_token
        except FitError:
            continue
        if s_per_token < made.prediction.s_per_token * (1 - LEAST_WIN):
            found.append(Win(change=change, s_per_token=s_per_token))
    return sorted(found, key=lambda win: win.s_per_token)


def _changes(made: Plan, budgets: Budgets) -> Iterator[tuple[str, Budgets]]:
    if made.placement.streamed and budgets.device_bytes is not None:
        more = replace(budgets, device_bytes=budgets.device_bytes + MORE_BYTES)
        yield f"{MORE_BYTES // GIB} GiB more device memory", more
    if made.placement.disk and budgets.host_bytes is not None:
        missing = made.disk_bytes_per_pass - made.host_ledger["bounce ring"]
        if missing > 0:
            gib = -(-missing // GIB)
            yield f"{gib} GiB more host memory, and no disk", replace(budgets, host_bytes=budgets.host_bytes + gib * GIB)


def compare_drafts(offers: Sequence[Offer], slots: Sequence[int]) -> list[DraftVerdict]:
    """One verdict for every draft that fits, the quickest first."""
    verdicts = []
    for offer in offers:
        for draft in offer.drafts:
            choice = best_choice(offer.workload, [draft], slots)
            if choice is not None:
                verdicts.append(_verdict(offer.workload, choice, draft))
    return sorted(verdicts, key=lambda verdict: verdict.s_per_token)


def _verdict(workload: Workload, choice: Choice, draft: DraftOption) -> DraftVerdict:
    shape = tree_of(choice, workload.target.vocab_size)
    kind = kind_of(workload, choice.memory, shape, draft, dynamic=choice.dynamic)
    predicted = predict_tree(workload, choice.memory, shape, draft, kind)
    return DraftVerdict(
        name=draft.name,
        num_nodes=shape.num_nodes,
        num_levels=shape.num_levels,
        expected_tokens=predicted.expected_tokens,
        level_s=predicted.draft_s / max(shape.num_levels - 1, 1),
        target_s=predicted.pass_s + predicted.after_s,
        s_per_token=predicted.s_per_token,
    )
