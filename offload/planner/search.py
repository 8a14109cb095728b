"""Pure: the tree, the draft, the slots and the resident layers, decoded for good or in every pass, that give the least seconds
per token together.

They compete for the same memory and hide under the same stream, so they are chosen together: minimise E[round] / E[tokens]
over all of them (a ratio of expectations, as renewal-reward has it). For an acceptance and a bound on the width of levels the
best trees of all sizes and numbers of levels are known at once (tree.optimizer.growth). Trees beside which the layers lie alike
are timed together.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np
import numpy.typing as npt

from tree.acceptance import Acceptance
from tree.dynamic_growth import DynamicGrowth, dynamic_growth
from tree.optimizer import Growth, growth

from ..errors import FitError
from ..weights.placement import Placement
from .ahead import idle_s
from .memory import MemoryPlan
from .prediction import MOST_LEVELS, Drafting, DraftOption, Workload, predict, rounds

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

MAX_NODES, MAX_LEVELS = 4096, MOST_LEVELS
# Dynamic trees of drawn children brought 0.8 to 1.1 of the tokens of static ones, all within two errors of 1 but one, where
# 1.00 to 1.03 were predicted (docs/benchmarks/dynamic_trees_cpu.json): they must win by more than that.
LEAST_DRAWN_WIN = 0.05
NEAR = 0.03  # of the least seconds per token, by which a smaller tree may be slower: it takes less memory and less work
# All sizes up to 16, then four per doubling, as tokens per pass grow with the logarithm of the nodes; at the end as many as
# BETWEEN around the best.
NODES = (*range(1, 17), *(round(2 ** (quarter / 4)) for quarter in range(17, 49)))
BETWEEN = 32
# Levels are tried as sizes are: tokens grow ever less with them. Those between are tried around the best.
LEVELS = (*range(1, 17), *range(18, 33, 2), *range(36, MAX_LEVELS + 1, 4))
WIDTHS = (4, 8, 16, 32, 64, 128, 256)  # tried as bounds on a level's nodes, where a wider level takes a draft longer


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One point of the search. `max_level_width` None: unbounded. `dynamic` as in Plan. `s_per_token` is by the smoothed
    acceptance, as trees are grown for it."""

    draft: DraftOption | None
    memory: MemoryPlan
    num_nodes: int
    num_levels: int
    max_level_width: int | None
    dynamic: bool = False
    s_per_token: float


def best_choice(
    workload: Workload,
    drafts: Sequence[DraftOption | None],
    slots: Sequence[int],
    *,
    max_nodes: int = MAX_NODES,
    max_levels: int = MAX_LEVELS,
    sizes: Sequence[int] = NODES,
    kinds: Sequence[bool] = (True, False),
) -> Choice | None:
    """The point with the least predicted seconds per token, or one with fewer nodes that is NEAR it. `kinds` says which trees
    are asked for: dynamic ones, others, or both. Of both, dynamic ones are taken, unless what was counted by context says that
    others are better; drawn ones must win by LEAST_DRAWN_WIN. Without a draft there is only the root. None when nothing
    fits."""
    grid = [size for size in sizes if size <= max_nodes]
    trees: dict[tuple[Acceptance, bool], _Trees] = {}
    found: list[Choice | None] = []
    for draft in drafts:
        if draft is None:
            found += [_plain(workload, num_slots, coded) for num_slots, coded in product(slots, workload.codings)]
            continue
        for dynamic in kinds if draft.acceptance.contexts or workload.draws else kinds[:1]:
            if (key := (draft.acceptance, dynamic)) not in trees:
                trees[key] = _Trees(draft.acceptance, grid[-1], max_levels, workload.target.vocab_size, dynamic)
            for num_slots, coded in product(slots, workload.codings):
                found.append(_Search(workload, draft, trees[key], num_slots, coded).run(grid))
    return min((choice for choice in found if choice is not None), key=partial(_preference, workload), default=None)


def quickest(choices: Sequence[Choice | None]) -> tuple[int, Choice] | None:
    """The best of some choices, and its place among them; of equals the first. None where all are."""
    found = [(place, choice) for place, choice in enumerate(choices) if choice is not None]
    return min(found, key=lambda one: _order(one[1]), default=None)


def _preference(workload: Workload, choice: Choice) -> tuple[float, tuple[float, bool, int, int]]:
    doubt = 1 + LEAST_DRAWN_WIN if workload.draws and choice.dynamic else 1.0
    return choice.s_per_token * doubt, _order(choice)


def _order(choice: Choice) -> tuple[float, bool, int, int]:
    return choice.s_per_token, not choice.dynamic, choice.num_nodes, choice.num_levels


def _plain(workload: Workload, num_slots: int, coded: bool) -> Choice | None:
    """The root alone, without a draft."""
    try:
        memory = workload.memory(None, 1, num_slots, coded)
    except FitError:
        return None
    s_per_token = predict(workload, memory, 1, Drafting()).s_per_token
    return Choice(draft=None, memory=memory, num_nodes=1, num_levels=1, max_level_width=None, s_per_token=s_per_token)


class _Trees:
    """The best trees of at most `num_nodes` nodes for one acceptance, by number of levels and bound on their width; or the
    average `dynamic` ones, which have no such bound. They are grown once: memory does not change them."""

    def __init__(self, acceptance: Acceptance, num_nodes: int, max_levels: int, max_branching: int, dynamic: bool) -> None:
        self._grow = partial(growth, acceptance, num_nodes, max_branching=max_branching)
        self.max_levels, self.dynamic = max_levels, dynamic
        self._unbounded: Growth | DynamicGrowth
        if dynamic and acceptance.contexts:
            self._unbounded = dynamic_growth(acceptance, MAX_LEVELS, max_branching)
        else:
            self._unbounded = self._grow(max_levels)
        self._grown: dict[tuple[int, int | None], Growth | DynamicGrowth] = {}

    def within(self, num_levels: int, max_level_width: int | None) -> Growth | DynamicGrowth:
        key = num_levels, max_level_width
        if key not in self._grown:
            wide = max_level_width is None
            grown = self._unbounded if wide else self._grow(num_levels, max_level_width=max_level_width)
            self._grown[key] = grown.within(num_levels)
        return self._grown[key]


class _Search:
    """All trees for one draft and one number of slots, with resident layers `coded` or not."""

    def __init__(self, workload: Workload, draft: DraftOption, trees: _Trees, num_slots: int, coded: bool) -> None:
        self._workload, self._draft, self._trees, self._num_slots, self._coded = workload, draft, trees, num_slots, coded

    def run(self, grid: Sequence[int]) -> Choice | None:
        """The best choice, None where nothing fits. First over the sizes and the numbers of levels of the grids, then over the
        numbers between and with bounds on the width of levels, then over the sizes between; and again over those just below
        the smallest size that is NEAR the best, so that the smallest of all is found."""
        plans = self._fitting(grid)
        if not plans or (self._coded and not any(memory.placement.coded for memory in plans.values())):
            return None  # nothing fits, or nothing is otherwise than where layers are decoded for good
        levels = [num_levels for num_levels in LEVELS if num_levels <= self._trees.max_levels]
        best = self._best(plans, [(num_levels, None) for num_levels in levels])
        draft = self._draft.beside(self._workload, best.memory.placement)
        fewest = max((num_levels for num_levels in levels if num_levels < best.num_levels), default=0)
        most = min((num_levels for num_levels in levels if num_levels > best.num_levels), default=self._trees.max_levels + 1)
        bounds: list[tuple[int, int | None]] = [(num_levels, None) for num_levels in range(fewest + 1, most)]
        if not self._trees.dynamic:
            bounds += [(best.num_levels, width) for width in self._widths(draft, max(plans))]
        best = self._best(plans, bounds)
        best = self._between(best, grid, best.s_per_token)
        bounds = [(best.num_levels, best.max_level_width)]
        if best.max_level_width is None:  # otherwise there would be trees to grow for each
            bounds += [(num_levels, None) for num_levels in levels if num_levels < best.num_levels]
        smallest = self._best(plans, bounds, best.s_per_token * (1 + NEAR))
        return self._between(smallest, grid, best.s_per_token * (1 + NEAR))

    def _between(self, best: Choice, grid: Sequence[int], enough_s: float) -> Choice:
        """The best of the sizes around that of `best`, within its bounds; or the smallest that takes `enough_s` at most."""
        first = max((size for size in grid if size < best.num_nodes), default=best.num_nodes)
        last = min((size for size in grid if size > best.num_nodes), default=best.num_nodes)
        between = self._fitting([*range(first, last + 1, max((last - first) // BETWEEN, 1))])
        found = self._best(between, [(best.num_levels, best.max_level_width)], enough_s)
        return min(found, best, key=lambda choice: (max(choice.s_per_token, enough_s), choice.num_nodes, choice.s_per_token))

    def _fitting(self, grid: Iterable[int]) -> dict[int, MemoryPlan]:
        """The memory of each size that fits."""
        plans: dict[int, MemoryPlan] = {}
        for size in grid:
            try:
                plans[size] = self._workload.memory(self._draft, size, self._num_slots, self._coded)
            except FitError:
                break  # a larger tree takes no less
        return plans

    def _widths(self, draft: DraftOption, num_nodes: int) -> tuple[int, ...]:
        """Bounds on a level's nodes that are worth trying: those at which a level is at least a tenth quicker than the
        widest."""
        widest_s = float(draft.level_s(num_nodes))
        return tuple(width for width in WIDTHS if float(draft.level_s(width)) < 0.9 * widest_s)

    def _best(self, plans: dict[int, MemoryPlan], bounds: Sequence[tuple[int, int | None]], enough_s: float = 0.0) -> Choice:
        """The best of the trees of each size within each of `bounds` on levels and width; of the smallest size that takes no
        more than `enough_s`, if any does."""
        sizes, memories = np.array(list(plans), dtype=np.int64), list(plans.values())
        s_per_token = self._table(sizes, memories, [self._trees.within(*bound) for bound in bounds])
        enough = np.flatnonzero(s_per_token.min(axis=1) <= enough_s)
        row = int(enough[0]) if len(enough) else int(s_per_token.min(axis=1).argmin())
        place = int(s_per_token[row].argmin())
        return Choice(
            draft=self._draft,
            memory=memories[row],
            num_nodes=int(sizes[row]),
            num_levels=bounds[place][0],
            max_level_width=bounds[place][1],
            dynamic=self._trees.dynamic,
            s_per_token=float(s_per_token[row, place]),
        )

    def _table(self, sizes: Ints, memories: Sequence[MemoryPlan], grown: Sequence[Growth | DynamicGrowth]) -> Floats:
        """Seconds per token of trees of these sizes within each of the bounds that are `grown`: [S, B]."""
        after_s = self._workload.after_s(sizes)
        tokens = np.stack([one.expected_tokens(sizes) for one in grown], axis=1)  # [S, B]
        expanded = np.zeros((len(sizes), len(grown), max(one.num_levels for one in grown)))  # [S, B, levels]
        for place, one in enumerate(grown):
            expanded[:, place, : one.num_levels] = one.expanded(sizes)
        held = np.stack([one.holds(sizes) for one in grown], axis=1)  # [S, B]: there are trees of so many nodes
        round_s = np.full(tokens.shape, np.inf)
        alike: dict[tuple[Placement, int], list[int]] = {}
        for row, memory in enumerate(memories):
            alike.setdefault((memory.placement, memory.num_slots), []).append(row)
        for rows in alike.values():
            memory = memories[rows[0]]
            draft = self._draft.beside(self._workload, memory.placement)
            draft_s = draft.draft_s(expanded[rows])  # [rows, B]
            if self._workload.grows_ahead and self._trees.dynamic and memory.placement.streamed:
                ahead_steps = idle_s(self._workload, memory, sizes[rows]) / draft.ahead_s(sizes[rows])  # [rows]
                num_steps = np.minimum(expanded[rows], 1).sum(axis=-1)
                draft_s = draft_s * (1 - draft.hidden(num_steps, ahead_steps[:, None]))
            times = rounds(self._workload, memory, sizes[rows, None], draft_s, after_s[rows, None])
            round_s[rows] = np.where(held[rows], times.round_s, np.inf)
        return round_s / tokens
