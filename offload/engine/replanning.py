"""A plan beside the rounds that run under it: where it proves wrong, the machine is looked at again and another tree chosen.

Once in a while: a plan changes again after twice as many rounds at the earliest, and measuring takes a small share of the run.
What is chosen again is the tree, within the memory that there is, which changes no greedy text; a request that must not depend
on it says so.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from ..errors import OffloadError
from ..planner.fallback import Fallbacks
from ..planner.hardware import HardwareProfile
from ..planner.plan import Plan
from ..planner.refit import Seen, believed_tokens, choose_again, measured_anew, refit
from ..report.stats import PassStats

logger = logging.getLogger(__name__)

OFF = 0.25  # of what was predicted, by which a plan has proven wrong
SEVERAL = 8  # rounds that say so
MANY = 4 * SEVERAL  # rounds that say how many tokens a pass has where they are drawn, which differ more than its seconds
FIRST_WAIT, MOST_WAIT = 10, 640  # rounds until a plan may be changed: the first ones are not as all others are
MEASURED_SHARE = 0.05  # of the time of all rounds, which may be spent on measuring


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
        self._num_rounds, self._due = 0, FIRST_WAIT
        self._run_s = self._measured_s = 0.0

    def saw(self, plan: Plan, stats: PassStats) -> None:
        """A round has run under `plan`."""
        if plan is not self._plan:
            self._plan = plan
            self._rounds.clear()
        if stats.num_rows == plan.tree.num_nodes:  # neither the prompt's nor one that was cut
            self._rounds.append(stats)
        self._run_s += stats.round_s
        self._num_rounds += 1

    def consider(self, loop: Loop) -> bool:
        """Between two rounds: whether `loop` goes on under another plan."""
        plan, fallbacks = loop.plan, loop.fallbacks
        if plan is not self._plan or fallbacks is None or self._num_rounds < self._due or len(self._rounds) < SEVERAL:
            return False
        seen = seen_in(self._rounds, SEVERAL if fallbacks.settings.sampling == "greedy" else MANY)
        doubtful = plan.tree.num_nodes == 1 and self._may_measure()  # nothing was speculated, because of what was measured
        if not (doubtful or is_off(plan, seen)):
            return False
        self._due = self._num_rounds + min(self._num_rounds, MOST_WAIT)
        workload, draft = fallbacks.workload, fallbacks.draft
        hardware = self._measured_again()
        if hardware is not None:
            workload, draft = measured_anew(fallbacks.settings, workload, draft, hardware)
        tokens = believed_tokens(fallbacks.settings, seen, plan)
        workload, draft = refit(seen, plan, workload, draft, tokens)
        chosen = choose_again(fallbacks.settings, plan, workload, draft, tokens, self._num_rounds)
        loop.follow(chosen, fallbacks.with_times(workload, draft))
        logger.info("%s", chosen.notes[-1])
        return True

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


def is_off(plan: Plan, seen: Seen) -> bool:
    """Whether rounds, or tokens, take otherwise than `plan` has it, by more than OFF."""
    predicted = plan.prediction
    ratios = seen.round_s / predicted.round_s, seen.round_s / seen.tokens / predicted.s_per_token
    return any(not 1 / (1 + OFF) <= ratio <= 1 + OFF for ratio in ratios)


def seen_in(rounds: Sequence[PassStats], num_rounds: int) -> Seen:
    """What `rounds` took: of the last SEVERAL, without the longest, which may have been a hiccup; tokens of the last
    `num_rounds`."""
    tokens = [one.emitted_tokens for one in rounds][-num_rounds:]
    last = sorted(list(rounds)[-SEVERAL:], key=lambda one: one.round_s)[: SEVERAL - 1]

    def mean(part: Callable[[PassStats], float]) -> float:
        return sum(map(part, last)) / len(last)

    return Seen(
        num_rounds=len(tokens),
        tokens=sum(tokens) / len(tokens),
        round_s=mean(lambda one: one.round_s),
        compute_s=mean(lambda one: max(one.pass_s - one.stall_s, 0.0)),
        draft_s=mean(lambda one: one.draft_s),
        after_s=mean(lambda one: one.verify_s),
        copied_s=mean(lambda one: one.copied_s),
    )
