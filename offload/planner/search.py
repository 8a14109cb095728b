"""Pure: the tree, the draft, the slots and the resident layers that give the least seconds per token together.

They compete for the same memory and hide under the same stream, so they are chosen together: minimise E[round] / E[tokens]
over all of them (a ratio of expectations, as renewal-reward has it). For an acceptance and a bound on the width of levels the
best trees of all sizes and numbers of levels are known at once (tree.optimizer.growth). A lower bound of the round leaves few
to be timed, and those that lie in memory alike are timed together.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from tree.acceptance import Acceptance
from tree.optimizer import Growth, growth

from ..errors import FitError
from ..weights.placement import Placement
from .cost import stored_bytes
from .memory import MemoryPlan
from .prediction import DraftOption, Workload, predict, rounds

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

MAX_NODES, MAX_LEVELS = 4096, 32
# All sizes up to 16, then four per doubling, as tokens per pass grow with the logarithm of the nodes; at the end as many as
# BETWEEN around the best.
NODES = (*range(1, 17), *(round(2 ** (quarter / 4)) for quarter in range(17, 49)))
BETWEEN = 32
TIE = 1e-9  # of seconds per token: rounding
WIDTHS = (4, 8, 16, 32, 64, 128, 256)  # tried as bounds on a level's nodes, where a wider level takes a draft longer


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One point of the search. `max_level_width` None: unbounded. `s_per_token` is by the smoothed acceptance, as trees are
    grown for it."""

    draft: DraftOption | None
    memory: MemoryPlan
    num_nodes: int
    num_levels: int
    max_level_width: int | None
    s_per_token: float


@dataclass(frozen=True, slots=True, eq=False)
class _Sizes:
    """Numbers of nodes, ascending, the memory of each, and the place of the first whose layers lie as its own do."""

    nodes: Ints
    plans: tuple[MemoryPlan, ...]
    alike: Ints


def best_choice(
    workload: Workload,
    drafts: Sequence[DraftOption | None],
    slots: Sequence[int],
    *,
    max_nodes: int = MAX_NODES,
    max_levels: int = MAX_LEVELS,
    sizes: Sequence[int] = NODES,
    known: Choice | None = None,
) -> Choice | None:
    """The point with the least predicted seconds per token, `known` among them; of equals the one with fewer nodes, then fewer
    levels. Without a draft there is only the root. None when nothing fits."""
    best = known
    grid = [size for size in sizes if size <= max_nodes]
    trees: dict[Acceptance, _Trees] = {}
    for draft in drafts:
        if draft is not None and draft.acceptance not in trees:
            trees[draft.acceptance] = _Trees(draft.acceptance, grid, max_levels, workload.target.vocab_size)
        for num_slots in slots:
            if draft is None:
                found = _plain(workload, num_slots)
            else:
                search = _Search(workload, draft, trees[draft.acceptance], num_slots)
                found = search.run(best.s_per_token if best else np.inf)
            best = _better(best, found) if best else found
    return best


def _better(best: Choice, found: Choice | None) -> Choice:
    """`found` if it is quicker by more than rounding; of equals the smaller."""
    if found is None or found.s_per_token > best.s_per_token * (1 + TIE):
        return best
    smaller = (found.num_nodes, found.num_levels) < (best.num_nodes, best.num_levels)
    return found if smaller or found.s_per_token < best.s_per_token * (1 - TIE) else best


def _plain(workload: Workload, num_slots: int) -> Choice | None:
    """The root alone, without a draft."""
    try:
        memory = workload.memory(None, 1, num_slots)
    except FitError:
        return None
    s_per_token = predict(workload, memory, 1, 0.0, 1.0).s_per_token
    return Choice(draft=None, memory=memory, num_nodes=1, num_levels=1, max_level_width=None, s_per_token=s_per_token)


class _Trees:
    """The best trees of all sizes for one acceptance, by number of levels and bound on their width: grown once, as memory does
    not change them."""

    def __init__(self, acceptance: Acceptance, grid: Sequence[int], max_levels: int, max_branching: int) -> None:
        self._grow = partial(growth, acceptance, grid[-1], max_branching=max_branching)
        self._growths: dict[tuple[int, int | None], Growth] = {}
        unbounded = self._grow(max_levels)
        for num_levels in range(1, max_levels + 1):
            self._growths[num_levels, None] = unbounded.within(num_levels)
        self.grid, self.max_levels = grid, max_levels
        self.tokens = np.stack([grown.expected_tokens(np.array(grid)) for grown in self._growths.values()], axis=1)

    def within(self, num_levels: int, max_level_width: int | None) -> Growth:
        key = num_levels, max_level_width
        if key not in self._growths:
            self._growths[key] = self._grow(num_levels, max_level_width=max_level_width).within(num_levels)
        return self._growths[key]


class _Search:
    """All trees for one draft and one number of slots."""

    def __init__(self, workload: Workload, draft: DraftOption, trees: _Trees, num_slots: int) -> None:
        self._workload, self._draft, self._trees, self._num_slots = workload, draft, trees, num_slots

    def run(self, bound_s: float) -> Choice | None:
        """The best choice, None if none is better than `bound_s` seconds per token. First the number of levels that promises
        most, then all others that may still win; then a bound on their width; then the sizes between those of the grid."""
        grid = self._trees.grid
        sizes = self._fitting(grid)
        if not sizes.plans:
            return None
        least_s = self._lower_bound(sizes, bound_s * (1 + TIE))
        levels, first = np.arange(least_s.shape[1]), least_s.min(axis=0).argmin()
        best: Choice | None = None
        for some in (levels == first, levels != first):
            limit_s = min(bound_s, best.s_per_token if best else np.inf) * (1 + TIE)
            found = self._best(sizes, [(int(level) + 1, None) for level in levels], some & (least_s <= limit_s))
            best = _better(best, found) if best else found
        if best is None:
            return None
        widths, num_levels = self._widths(int(sizes.nodes[-1])), best.num_levels
        holds = sizes.nodes[:, None] <= 1 + np.array(widths, dtype=np.int64) * (num_levels - 1)
        may_win = least_s[:, num_levels - 1 : num_levels] <= best.s_per_token
        best = _better(best, self._best(sizes, [(num_levels, width) for width in widths], holds & may_win))
        first_size = max((size for size in grid if size < best.num_nodes), default=best.num_nodes)
        last_size = min((size for size in grid if size > best.num_nodes), default=best.num_nodes)
        between = self._fitting(range(first_size, last_size + 1, max((last_size - first_size) // BETWEEN, 1)))
        every = np.ones((len(between.plans), 1), dtype=np.bool_)
        return _better(best, self._best(between, [(num_levels, best.max_level_width)], every))

    def _fitting(self, grid: Iterable[int]) -> _Sizes:
        plans: dict[int, MemoryPlan] = {}
        for size in grid:
            try:
                plans[size] = self._workload.memory(self._draft, size, self._num_slots)
            except FitError:
                break  # a larger tree takes no less
        firsts: dict[tuple[Placement, int], int] = {}
        alike = [firsts.setdefault((memory.placement, memory.num_slots), place) for place, memory in enumerate(plans.values())]
        return _Sizes(np.array(list(plans), dtype=np.int64), tuple(plans.values()), np.array(alike, dtype=np.int64))

    def _lower_bound(self, sizes: _Sizes, limit_s: float) -> Floats:
        """[sizes, levels]: seconds per token that no tree of that size and just so many levels beats: its round when every
        level takes the draft as little as any does, or its longest part, where that is already more than `limit_s`."""
        tokens = self._trees.tokens[: len(sizes.plans)]
        deeper = np.diff(tokens, prepend=0.0) > 0  # a tree that does not use the last level is one of fewer
        least_s = np.where(deeper, self._longest_part_s(sizes)[:, None] / tokens, np.inf)
        rows, levels = np.nonzero(least_s <= limit_s)
        level_s = float(self._draft.level_s(np.array(self._draft.times.rows)).min())
        draft_s = level_s * np.arange(tokens.shape[1], dtype=np.float64)
        least_s[rows, levels] = self._round_s(sizes, rows, draft_s[levels]) / tokens[rows, levels]
        return least_s

    def _longest_part_s(self, sizes: _Sizes) -> Floats:
        """[sizes]: seconds of all copies, all reads or all computing, which no round is shorter than."""
        work, target = self._workload, self._workload.target
        copied = np.array([stored_bytes(target, memory.placement.streamed) for memory in sizes.plans])
        read = np.array([stored_bytes(target, memory.placement.disk) for memory in sizes.plans])
        moved_s = np.maximum(copied / work.link_bytes_per_s, read / work.disk_bytes_per_s)
        computed_s = target.equivalent_layers * work.times.layer(sizes.nodes) + work.after_s(sizes.nodes)
        return np.asarray(np.maximum(moved_s, computed_s))

    def _widths(self, num_nodes: int) -> tuple[int, ...]:
        """Bounds on a level's nodes that are worth trying: those at which a level is at least a tenth quicker than the
        widest."""
        widest_s = float(self._draft.level_s(num_nodes))
        return tuple(width for width in WIDTHS if float(self._draft.level_s(width)) < 0.9 * widest_s)

    def _best(self, sizes: _Sizes, bounds: Sequence[tuple[int, int | None]], tried: Bools) -> Choice | None:
        """The best of the trees within `bounds` on levels and width, None if there is none; `tried` [sizes, bounds] says which
        are looked at. Of equals the one with fewer nodes, then the one of the earlier bound."""
        tokens, draft_s = np.zeros((2, *tried.shape))
        for place in np.flatnonzero(tried.any(axis=0)).tolist():
            grown = self._trees.within(*bounds[place])
            rows = np.flatnonzero(tried[:, place] & (sizes.nodes <= len(grown.values)))
            tokens[rows, place] = grown.expected_tokens(sizes.nodes[rows])
            draft_s[rows, place] = self._draft.draft_s(grown.expanded(sizes.nodes[rows]))
        rows, places = np.nonzero(tokens)
        if not len(rows):
            return None
        s_per_token = self._round_s(sizes, rows, draft_s[rows, places]) / tokens[rows, places]
        best = int(np.flatnonzero(s_per_token <= s_per_token.min() * (1 + TIE))[0])
        num_levels, width = bounds[int(places[best])]
        return Choice(
            draft=self._draft,
            memory=sizes.plans[rows[best]],
            num_nodes=int(sizes.nodes[rows[best]]),
            num_levels=num_levels,
            max_level_width=width,
            s_per_token=float(s_per_token[best]),
        )

    def _round_s(self, sizes: _Sizes, rows: Ints, draft_s: Floats) -> Floats:
        """Seconds of a round of each; one timeline for each placement of the layers."""
        alike, round_s = sizes.alike[rows], np.empty(len(rows))
        for first in np.flatnonzero(np.bincount(alike)):
            places = np.flatnonzero(alike == first)
            nodes = sizes.nodes[rows[places]]
            times = rounds(self._workload, sizes.plans[first], nodes, draft_s[places], self._workload.after_s(nodes))
            round_s[places] = times.round_s
        return round_s
