"""Pure: the tree, the draft, the slots and the resident layers that give the least seconds per token together.

They compete for the same memory and hide under the same stream, so they are chosen together: minimise E[round] / E[tokens]
over all of them (a ratio of expectations, as renewal-reward has it). For a draft, a number of levels and a bound on their
width the best trees of all sizes are known at once (tree.optimizer.growth_table); a lower bound of the round orders the
numbers of levels, so that most are never tried.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from tree.acceptance import Acceptance
from tree.optimizer import Growth, expected_tokens_table, growth_table

from ..errors import FitError
from ..weights.placement import Placement
from .cost import ModelCost
from .hardware import LawTimes, ModelTimes
from .memory import MemoryPlan
from .pipeline import PartTimes, RoundTimes, steady_round

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

MAX_NODES, MAX_LEVELS = 4096, 32
# All sizes up to 16, then four per doubling, as tokens per pass grow with the logarithm of the nodes; at the end as many as
# BETWEEN around the best.
NODES = (*range(1, 17), *(round(2 ** (quarter / 4)) for quarter in range(17, 49)))
BETWEEN = 32
TIE = 1e-9  # of seconds per token: rounding
WIDTHS = (4, 8, 16, 32, 64, 128, 256)  # tried as bounds on a level's nodes, where a wider level takes a draft longer
CATCH_UP_ROWS = 2  # what a draft reads before its first level: the new root, and an accepted leaf it has not seen


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftOption:
    """A draft that may be used, how often the target accepts it, and how long its levels take."""

    name: str
    cost: ModelCost
    times: ModelTimes
    acceptance: Acceptance

    def level_s(self, rows: npt.ArrayLike) -> Floats:
        """Seconds of one level's forward over `rows` nodes, drawing their children included."""
        return self.cost.num_layers * self.times.layer(rows) + self.times.rest(rows)

    def draft_s(self, expanded: Ints) -> Floats:
        """Seconds to grow trees with so many expanded nodes on each level: [..., levels] to [...]. The first level finds
        threads asleep, after a verdict was waited for."""
        levels = self.level_s(np.maximum(expanded, 1))
        levels[..., 0] = self.level_s(CATCH_UP_ROWS) + self.times.wake_s
        return np.asarray(np.where(expanded > 0, levels, 0.0).sum(axis=-1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What does not depend on the choice: the target, the rates, and what memory allows.

    `memory(draft, nodes, slots)` raises FitError where nothing fits.
    """

    target: ModelCost
    times: ModelTimes
    verify: LawTimes
    link_bytes_per_s: float
    disk_bytes_per_s: float
    disk_is_assumed: bool = False
    memory: Callable[[DraftOption | None, int, int], MemoryPlan]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Seconds of one steady round and its parts. pass_s is a pass alone, weights arriving and being used; in a round part of
    it hides under the rest, and exposed_pass_s is what is left of it after drafting."""

    expected_tokens: float
    pass_s: float
    exposed_pass_s: float
    compute_s: float
    draft_s: float
    after_s: float
    round_s: float

    @property
    def s_per_token(self) -> float:
        return self.round_s / self.expected_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One point of the search. `max_level_width` None: unbounded."""

    draft: DraftOption | None
    memory: MemoryPlan
    num_nodes: int
    num_levels: int
    max_level_width: int | None
    s_per_token: float


def predict(workload: Workload, memory: MemoryPlan, num_nodes: int, draft_s: float, expected_tokens: float) -> Prediction:
    """The round of one plan with its parts."""
    alone = _rounds(workload, memory, np.array([num_nodes]), np.zeros(1), alone=True)
    together = _rounds(workload, memory, np.array([num_nodes]), np.array([draft_s]))
    return Prediction(
        expected_tokens=expected_tokens,
        pass_s=float(alone.round_s[0]),
        exposed_pass_s=float(together.pass_s[0]),
        compute_s=float(workload.target.num_layers * workload.times.layer(num_nodes)),
        draft_s=draft_s,
        after_s=float(workload.times.rest(num_nodes) + workload.verify.at(num_nodes)),
        round_s=float(together.round_s[0]),
    )


def best_choice(
    workload: Workload,
    drafts: Sequence[DraftOption | None],
    slots: Sequence[int],
    *,
    max_nodes: int = MAX_NODES,
    max_levels: int = MAX_LEVELS,
    sizes: Sequence[int] = NODES,
) -> Choice | None:
    """The point with the least predicted seconds per token; of equals the one with fewer nodes, then fewer levels. Without
    a draft there is only the root. None when nothing fits."""
    best: Choice | None = None
    grid = [size for size in sizes if size <= max_nodes]
    for draft in drafts:
        trees = _Trees(draft.acceptance, grid[-1], workload.target.vocab_size) if draft is not None else None
        for num_slots in slots:
            search = _Search(workload, draft, trees, num_slots, grid, max_levels)
            found = search.run(best.s_per_token if best else np.inf)
            best = _better(best, found) if best else found
    return best


def _better(best: Choice, found: Choice | None) -> Choice:
    """`found` if it is quicker by more than rounding; of equals the smaller."""
    if found is None or found.s_per_token > best.s_per_token * (1 + TIE):
        return best
    smaller = (found.num_nodes, found.num_levels) < (best.num_nodes, best.num_levels)
    return found if smaller or found.s_per_token < best.s_per_token * (1 - TIE) else best


class _Trees:
    """The best trees of all sizes for one draft, by number of levels and bound on their width: made once, when first asked
    for, as memory does not change them."""

    def __init__(self, acceptance: Acceptance, num_nodes: int, max_branching: int) -> None:
        self._grow = partial(growth_table, acceptance, num_nodes, max_branching=max_branching)
        self._tables: dict[tuple[int, int | None], Growth] = {}

    def within(self, num_levels: int, max_level_width: int | None) -> Growth:
        key = num_levels, max_level_width
        if key not in self._tables:
            self._tables[key] = self._grow(num_levels, max_level_width=max_level_width)
        return self._tables[key]


class _Search:
    """All trees for one draft and one number of slots."""

    def __init__(
        self,
        workload: Workload,
        draft: DraftOption | None,
        trees: _Trees | None,
        num_slots: int,
        sizes: Sequence[int],
        max_levels: int,
    ) -> None:
        self._workload, self._draft, self._num_slots, self._max_levels = workload, draft, num_slots, max_levels
        self._trees = trees
        self._grid = sizes if draft is not None else (1,)
        self._sizes, self._plans = self._fitting(self._grid)

    def run(self, bound_s: float) -> Choice | None:
        """The best choice, None if none is better than `bound_s` seconds per token. First the number of levels, most
        promising first and until no other can win; then a bound on their width; then the sizes between those of the grid."""
        draft = self._draft
        if not len(self._sizes):
            return None
        if draft is None:
            return self._best_size(1, None, self._sizes, np.ones(1), np.zeros(1))
        least_s = self._lower_bound(draft)
        best: Choice | None = None
        for place in np.argsort(least_s.min(axis=0), kind="stable"):
            limit_s = min(bound_s, best.s_per_token if best else np.inf) * (1 + TIE)
            if least_s[:, place].min() > limit_s:
                break
            found = self._evaluate(draft, int(place) + 1, None, self._sizes[least_s[:, place] <= limit_s])
            best = _better(best, found) if best else found
        if best is None:
            return None
        num_levels = best.num_levels
        for width in self._widths(draft):
            holds = (self._sizes <= 1 + width * (num_levels - 1)) & (least_s[:, num_levels - 1] <= best.s_per_token)
            if holds.any():
                best = _better(best, self._evaluate(draft, num_levels, width, self._sizes[holds]))
        first = max((size for size in self._grid if size < best.num_nodes), default=best.num_nodes)
        last = min((size for size in self._grid if size > best.num_nodes), default=best.num_nodes)
        between, self._plans = self._fitting(range(first, last + 1, max((last - first) // BETWEEN, 1)))
        return _better(best, self._evaluate(draft, num_levels, best.max_level_width, between))

    def _fitting(self, sizes: Iterable[int]) -> tuple[Ints, dict[int, MemoryPlan]]:
        plans: dict[int, MemoryPlan] = {}
        for size in sizes:
            try:
                plans[size] = self._workload.memory(self._draft, size, self._num_slots)
            except FitError:
                break  # a larger tree takes no less
        return np.array(list(plans), dtype=np.int64), plans

    def _lower_bound(self, draft: DraftOption) -> Floats:
        """[sizes, levels]: seconds per token that no tree of that size and just so many levels beats: its round when every
        level takes the draft as little as any does."""
        sizes, levels = self._sizes, np.arange(1, self._max_levels + 1)
        vocab_size = self._workload.target.vocab_size
        tokens = expected_tokens_table(draft.acceptance, int(sizes[-1]), self._max_levels, max_branching=vocab_size)[sizes]
        draft_s = (levels - 1) * float(draft.level_s(np.array(draft.times.rows)).min())
        round_s = self._round_s(np.repeat(sizes, len(levels)), np.tile(draft_s, len(sizes))).reshape(len(sizes), len(levels))
        reaches = tokens[:, 1:] > tokens[:, :-1]  # a tree that does not use the last level is one of fewer
        return np.where(reaches, round_s / np.maximum(tokens[:, 1:], 1.0), np.inf)

    def _widths(self, draft: DraftOption) -> tuple[int, ...]:
        """Bounds on a level's nodes that are worth trying: those at which a level is at least a tenth quicker than the
        widest."""
        widest_s = float(draft.level_s(self._sizes[-1]))
        return tuple(width for width in WIDTHS if float(draft.level_s(width)) < 0.9 * widest_s)

    def _evaluate(self, draft: DraftOption, num_levels: int, width: int | None, sizes: Ints) -> Choice | None:
        """The best tree of one of `sizes` nodes within `num_levels` levels of `width` nodes; None if they hold none."""
        assert self._trees is not None
        growth, rows = self._trees.within(num_levels, width), sizes - 1
        full = growth.nodes_per_level[rows].sum(axis=1) == sizes  # the others have run out of nodes
        if not full.any():
            return None
        tokens, draft_s = growth.expected_tokens[rows][full], draft.draft_s(growth.expanded[rows][full])
        return self._best_size(num_levels, width, sizes[full], tokens, draft_s)

    def _best_size(self, num_levels: int, width: int | None, sizes: Ints, tokens: Floats, draft_s: Floats) -> Choice:
        """The best of `sizes` for trees that differ in nothing else."""
        s_per_token = self._round_s(sizes, draft_s) / tokens
        best = int(np.flatnonzero(s_per_token <= s_per_token.min() * (1 + TIE))[0])
        return Choice(
            draft=self._draft,
            memory=self._plans[int(sizes[best])],
            num_nodes=int(sizes[best]),
            num_levels=num_levels,
            max_level_width=width,
            s_per_token=float(s_per_token[best]),
        )

    def _round_s(self, sizes: Ints, draft_s: Floats) -> Floats:
        """Seconds of a round of each; one timeline for each placement of the layers."""
        same: dict[tuple[Placement, int], list[int]] = {}
        for size in np.unique(sizes):
            memory = self._plans[int(size)]
            same.setdefault((memory.placement, memory.num_slots), []).append(int(size))
        round_s = np.empty(len(sizes))
        for alike in same.values():
            places = np.isin(sizes, alike)
            round_s[places] = _rounds(self._workload, self._plans[alike[0]], sizes[places], draft_s[places]).round_s
        return round_s


def _rounds(workload: Workload, memory: MemoryPlan, nodes: Ints, draft_s: Floats, *, alone: bool = False) -> RoundTimes:
    """Rounds of trees of so many nodes under one placement; `alone`: passes back to back, nothing between them."""
    layer_bytes = workload.target.layer_bytes
    after_s = workload.times.rest(nodes) + workload.verify.at(nodes)
    parts = PartTimes(
        copy_s=layer_bytes / workload.link_bytes_per_s,
        read_s=layer_bytes / workload.disk_bytes_per_s,
        before_s=np.zeros_like(draft_s) if alone else draft_s,
        layer_s=workload.times.layer(nodes),
        after_s=np.zeros_like(after_s) if alone else after_s,
        wake_s=workload.times.wake_s,
    )
    return steady_round(memory.placement, memory.num_slots, parts)
