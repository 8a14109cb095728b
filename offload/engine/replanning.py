"""A plan beside the rounds that run under it: where it proves wrong, another tree is chosen from what they took and accepted.

Once in a while: a plan changes again after twice as many rounds at the earliest. A plan that holds is looked at again every
REGULAR rounds, as what a text accepts is counted all the while. Rounds are measurements that cost nothing; the machine itself
is measured anew where that takes a small share of the run. What is chosen again is the tree, how it grows, and whether the
draft is used, within the memory that there is, which changes no greedy text; a request that must not depend on it says so.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from tree.acceptance import Acceptance, AcceptanceCounter
from tree.shape import TreeShape
from tree.transfer import to_host

from ..config import seconds_text
from ..errors import OffloadError
from ..planner.again import choose_again
from ..planner.fallback import Fallbacks
from ..planner.hardware import HardwareProfile
from ..planner.learned import learned
from ..planner.plan import Plan
from ..planner.refit import Point, Seen, believed_tokens, measured_anew, point_of, refit
from ..report.stats import PassStats

logger = logging.getLogger(__name__)

OFF = 0.15  # of what was predicted, by which a plan has proven wrong
LEAST_PART = 0.1  # of a round: what takes less is not looked at by itself
SEVERAL = 6  # rounds that say so
MANY = 32  # rounds that say how many tokens a pass has where they are drawn, which differ more than its seconds
COUNTED = 256  # of the last rounds, whose verdicts say what is accepted
FIRST_WAIT, MOST_WAIT = 7, 640  # rounds until a plan may be changed: the first ones are not as all others are
LEAST_FOUND = 0.05  # of the tokens of a pass, for which a tree has to follow the text
REGULAR = 64  # rounds after which a plan that holds is looked at again
MEASURED_SHARE = 0.05  # of the time of all rounds, which may be spent on measuring
KEPT_POINTS = 3  # trees that ran before, whose times are remembered


@dataclass(frozen=True, slots=True)
class Counted:
    """Which nodes of a tree of this shape were accepted, and how sure the draft was at each (see DraftTree.tops)."""

    shape: TreeShape
    path: tuple[int, ...]
    tops: Tensor | None = None


class Loop(Protocol):
    """What has a plan that can be changed between rounds."""

    @property
    def plan(self) -> Plan: ...

    @property
    def fallbacks(self) -> Fallbacks | None: ...

    def follow(self, plan: Plan, fallbacks: Fallbacks) -> None: ...


class Replanner:
    """Watches one loop. `measure` looks at the machine again, which took `measuring_s` before; None where nobody may."""

    def __init__(
        self,
        measure: Callable[[], HardwareProfile] | None,
        measuring_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._measure, self._measuring_s, self._clock = measure, measuring_s, clock
        self._plan: Plan | None = None
        self._rounds: deque[PassStats] = deque(maxlen=MANY)  # whole ones, of the plan that runs
        self._verdicts: deque[Counted] = deque(maxlen=COUNTED)
        self._points: list[Point] = []
        self._believed: Acceptance | None = None  # before anything was counted
        self._num_rounds, self._due, self._looked = 0, FIRST_WAIT, 0
        self._run_s = self._measured_s = 0.0

    def saw(self, plan: Plan, stats: PassStats, counted: Counted | None = None) -> None:
        """A round has run under `plan`, and accepted what is `counted`."""
        if plan is not self._plan:
            self._plan = plan
            self._rounds.clear()
        if _is_whole(stats, plan):
            self._rounds.append(stats)
        if counted is not None and counted.shape.num_nodes > 1:
            self._verdicts.append(counted)
        self._run_s += stats.round_s
        self._num_rounds += 1

    def consider(self, loop: Loop) -> bool:
        """Between two rounds: whether `loop` goes on under another plan."""
        plan, fallbacks = loop.plan, loop.fallbacks
        if plan is not self._plan or fallbacks is None or self._num_rounds < self._due or len(self._rounds) < SEVERAL:
            return False
        seen = seen_in(self._rounds, SEVERAL if fallbacks.settings.sampling == "greedy" else MANY)
        doubtful = plan.tree.num_nodes == 1 and self._may_measure()  # nothing was speculated, because of what was measured
        why = why_off(plan, seen)
        is_regular = self._num_rounds - self._looked >= REGULAR and bool(self._verdicts)
        if not (doubtful or why or is_regular):
            return False
        self._looked = self._num_rounds
        chosen, revised = self._chosen(plan, fallbacks, seen, why)
        if not (doubtful or why) and (chosen.tree, chosen.kind) == (plan.tree, plan.kind):
            return False  # it holds, and still is the best
        if doubtful or why:
            self._due = self._num_rounds + min(self._num_rounds, MOST_WAIT)
        loop.follow(chosen, revised)
        logger.info("%s", chosen.notes[-1])
        return True

    def _chosen(self, plan: Plan, fallbacks: Fallbacks, seen: Seen, why: str) -> tuple[Plan, Fallbacks]:
        """What is best by all that is known now, and what later plans are made from."""
        workload, draft = fallbacks.workload, fallbacks.draft
        hardware = self._measured_again() if why or plan.tree.num_nodes == 1 else None
        if hardware is not None:
            workload, draft = measured_anew(fallbacks.settings, workload, draft, hardware)
            self._points = []
        tokens = believed_tokens(fallbacks.settings, seen, plan)
        if draft is not None and self._verdicts:
            counter, num_nodes = self._counter()
            self._believed = self._believed or draft.acceptance
            draft = replace(draft, acceptance=learned(self._believed, counter, num_nodes))
        workload, draft = refit(seen, plan, workload, draft, tokens, self._points)
        self._points = [*self._points, point_of(plan, seen, workload, draft)][-KEPT_POINTS:]
        # Trees of one shape hold no finds, which is more than any acceptance says of them.
        kinds = (True,) if plan.dynamic and seen.found > LEAST_FOUND * seen.tokens else (True, False)
        chosen = choose_again(fallbacks.settings, plan, workload, draft, tokens, self._num_rounds, why, kinds=kinds)
        return chosen, fallbacks.with_times(workload, draft)

    def _counter(self) -> tuple[AcceptanceCounter, int]:
        """Of the verdicts that are remembered, and how many nodes they accepted. Each is counted once."""
        counter, num_nodes = AcceptanceCounter(), 0
        for one, tops in zip(self._verdicts, _on_host([one.tops for one in self._verdicts]), strict=True):
            counter.add(one.shape, one.path, tops)
            num_nodes += len(one.path)
        return counter, num_nodes

    def _may_measure(self) -> bool:
        return self._measure is not None and self._measured_s + self._measuring_s <= MEASURED_SHARE * self._run_s

    def _measured_again(self) -> HardwareProfile | None:
        """None while the run has not taken long enough for it, and where there is no memory to measure with."""
        if self._measure is None or not self._may_measure():
            return None
        start_s = self._clock()
        try:
            return self._measure()
        except OffloadError as error:
            logger.info("the machine could not be measured again: %s", error.what)
            return None
        finally:
            self._measuring_s = self._clock() - start_s
            self._measured_s += self._measuring_s


def _on_host(columns: Sequence[Tensor | None]) -> list[list[float] | None]:
    """The same as lists, with one wait for each device that has any, not one for each column."""
    lists: list[list[float] | None] = [None] * len(columns)
    for device in {column.device for column in columns if column is not None}:
        there = {place: column for place, column in enumerate(columns) if column is not None and column.device == device}
        for place, values in zip(there, to_host(*there.values()), strict=True):
            lists[place] = values
    return lists


def _is_whole(stats: PassStats, plan: Plan) -> bool:
    """Neither the prompt's round nor one whose tree was cut. Trees that follow the text differ in size."""
    if plan.dynamic and plan.tree.num_nodes > 1:
        return stats.num_rows == stats.num_nodes > 1
    return stats.num_rows == plan.tree.num_nodes


def why_off(plan: Plan, seen: Seen) -> str:
    """How rounds, their parts, or tokens go otherwise than `plan` has it, by more than OFF; nothing where they do not. What is
    computed hides under the stream, so that a round may take what was predicted while another tree would not."""
    predicted = plan.prediction
    if _differ(seen.round_s, predicted.round_s):
        return f"a round took {seconds_text(seen.round_s)} s, expected {seconds_text(predicted.round_s)}"
    if _differ(seen.round_s / seen.tokens, predicted.s_per_token):
        return f"a pass brought {seen.tokens:.3g} tokens, expected {predicted.expected_tokens:.3g}"
    parts = {"computing": (seen.compute_s, predicted.compute_s)}
    if plan.tree.num_nodes > 1:
        parts["drafting"] = seen.draft_s, predicted.draft_s
    for part, (took_s, expected_s) in parts.items():
        if _differ(took_s, expected_s) and max(took_s, expected_s) > LEAST_PART * predicted.round_s:
            return f"{part} took {seconds_text(took_s)} s, expected {seconds_text(expected_s)}"
    return ""


def _differ(seen: float, expected: float) -> bool:
    return not expected / (1 + OFF) <= seen <= expected * (1 + OFF)


def seen_in(rounds: Sequence[PassStats], num_rounds: int) -> Seen:
    """What `rounds` took: of the last SEVERAL, without the longest, which may have been a hiccup; tokens of the last
    `num_rounds`."""
    tokens = [one.emitted_tokens for one in rounds][-num_rounds:]
    last = sorted(list(rounds)[-SEVERAL:], key=lambda one: one.round_s)[: SEVERAL - 1]

    def mean(part: Callable[[PassStats], float]) -> float:
        return sum(map(part, last)) / len(last)

    nodes = mean(lambda one: one.num_nodes)
    return Seen(
        num_rounds=len(tokens),
        tokens=sum(tokens) / len(tokens),
        found=sum([one.ngram_tokens for one in rounds][-num_rounds:]) / len(tokens),
        nodes=nodes,
        foreseen=mean(lambda one: one.foreseen_nodes) / nodes if nodes else 0.0,
        round_s=mean(lambda one: one.round_s),
        compute_s=mean(lambda one: one.compute_s),
        ahead_s=mean(lambda one: one.ahead_s),
        draft_s=mean(lambda one: one.draft_s),
        after_s=mean(lambda one: one.verify_s),
        copied_s=mean(lambda one: one.copied_s),
    )
