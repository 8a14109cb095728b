"""A plan of a machine that was measured while it had other work comes right within 20 rounds, whatever was measured."""

import re
from dataclasses import replace

import numpy as np
import pytest

from offload.engine.replanning import REGULAR, Counted, Replanner
from offload.planner.fallback import Fallbacks
from offload.planner.hardware import HardwareProfile, ModelTimes
from offload.planner.learned import BELIEVED_NODES, ENOUGH_NODES, learned
from offload.planner.plan import Plan, plan_run
from offload.planner.prediction import Offer, Prediction, predict_tree
from offload.planner.refit import memory_of
from offload.planner.workload import make_workload
from offload.report.stats import PassStats
from planning import L40, LLAMA_2_70B, PUBLISHED, SETTINGS, budgets, draft_option
from tree.acceptance import Acceptance, AcceptanceCounter
from tree.shape import TreeShape

LIMITS = budgets(48)
SLOW = replace(L40, flops_per_s=L40.flops_per_s / 20)  # computing is what a tree is chosen by
ROUNDS = 20


class Run:
    """A loop on a machine of `hardware`, planned for times that were measured up to four times too long, each by its own
    factor."""

    def __init__(self, hardware: HardwareProfile, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.workload = make_workload(SETTINGS, LLAMA_2_70B, hardware, LIMITS, max_positions=4096)
        self.draft = draft_option(hardware=hardware)
        self.best = self.planned(self.workload, self.draft)[0]
        busy, draft = replace(self.workload, times=self.late(self.workload.times)), self.late(self.draft.times)
        self.plan, self.fallbacks = self.planned(busy, replace(self.draft, times=draft))

    def planned(self, workload: object, draft: object) -> tuple[Plan, Fallbacks]:
        offer = Offer(workload=workload, drafts=(draft,))  # type: ignore[arg-type]
        made = plan_run(SETTINGS, None, [offer], max_positions=4096, budgets=LIMITS)
        return made, Fallbacks(settings=SETTINGS, workload=workload, draft=draft, budgets=LIMITS)  # type: ignore[arg-type]

    def late(self, times: ModelTimes) -> ModelTimes:
        factors = self.random.uniform(1, 4, len(times.rows))
        layer_s = np.maximum.accumulate(np.array(times.layer_s) * factors)
        return replace(times, layer_s=tuple(layer_s.tolist()))

    def follow(self, plan: Plan, fallbacks: Fallbacks) -> None:
        self.plan, self.fallbacks = plan, fallbacks

    def really(self, plan: Plan) -> Prediction:
        return predict_tree(self.workload, memory_of(plan), plan.tree, self.draft, plan.kind)

    def one_round(self) -> PassStats:
        took, num_nodes = self.really(self.plan), self.plan.tree.num_nodes
        drafted_s = took.draft_s + took.hidden_draft_s
        stall_s = max(took.round_s - took.compute_s - took.draft_s - took.after_s, 0.0)
        factors = self.random.normal(1, 0.02, 3)
        return PassStats(
            num_rows=num_nodes,
            num_nodes=num_nodes,
            foreseen_nodes=round(num_nodes * took.hidden_draft_s / drafted_s) if drafted_s else 0,
            emitted_tokens=max(int(took.expected_tokens + self.random.random()), 1),
            bytes_streamed=0,
            draft_s=took.draft_s * factors[0],
            pass_s=(took.compute_s + stall_s) * factors[1],
            verify_s=took.after_s,
            round_s=took.round_s * factors[2],
            stall_s=stall_s * factors[1],
            stall_by_layer_s=(),
            copied_s=self.plan.bytes_per_pass / 25e9,
        )


@pytest.mark.parametrize("seed", [1, 5, 7, 8, 13])
def test_a_plan_made_busy_is_as_good_as_one_made_idle_within_20_rounds(seed: int) -> None:
    """Nothing is measured again: rounds alone say it. These are seeds at which the first plan is 8 % worse at least. Times of
    trees that never ran stay doubtful: of all seeds from 0 to 13, 10 end within 5 %, and all within 9 % (docs/log.md)."""
    run, replanner = Run(SLOW, seed), Replanner(None, 0.0)
    ideal_s, at_first_s = run.really(run.best).s_per_token, run.really(run.plan).s_per_token
    for _ in range(ROUNDS):
        replanner.consider(run)
        replanner.saw(run.plan, run.one_round())
    assert at_first_s > 1.08 * ideal_s, "a plan that nobody changes fails"
    assert run.really(run.plan).s_per_token <= 1.05 * ideal_s
    assert run.plan.prediction.s_per_token == pytest.approx(run.really(run.plan).s_per_token, rel=0.1)


def test_what_hides_under_the_stream_proves_a_plan_wrong_too() -> None:
    """A round takes what was predicted, as the link sets the pace; a larger tree would have been free."""
    run, replanner = Run(SLOW, 1), Replanner(None, 0.0)
    assert run.really(run.plan).round_s == pytest.approx(run.plan.prediction.round_s, rel=0.14)
    while not replanner.consider(run):
        replanner.saw(run.plan, run.one_round())
    assert re.match(
        r"planned again after 7 rounds, as (computing|drafting) took [\d.]+ s, expected [\d.]+: ", run.plan.notes[-1]
    )


# -- what is accepted ----------------------------------------------------------------------------------------------------


def counted(probabilities: tuple[float, ...], num_rounds: int, seed: int = 3) -> tuple[AcceptanceCounter, int]:
    """Verdicts over a node with four children."""
    shape, counter = TreeShape((-1, 0, 0, 0, 0)), AcceptanceCounter()
    chances = [1 - sum(probabilities), *probabilities]
    paths = np.random.default_rng(seed).choice(len(chances), num_rounds, p=chances)
    for child in paths.tolist():
        counter.add(shape, (0, child) if child else (0,), [0.6] * 5)
    return counter, num_rounds


def test_what_is_counted_takes_the_place_of_what_was_believed() -> None:
    believed, real = Acceptance(((0.8, 0.1, 0.05, 0.02),)), (0.4, 0.2, 0.1, 0.05)
    few, many = learned(believed, *counted(real, 4)), learned(believed, *counted(real, 40 * BELIEVED_NODES))
    assert few.levels[0][0] > 0.7 and many.levels[0] == pytest.approx(real, abs=0.03)
    assert learned(believed, AcceptanceCounter(), 0) is believed


def test_ranks_that_nobody_tried_have_their_share_of_what_is_left() -> None:
    counter = AcceptanceCounter()
    for _ in range(100 * BELIEVED_NODES):
        counter.add(TreeShape((-1, 0)), (0, 1))
    found = learned(PUBLISHED, counter, 100 * BELIEVED_NODES).levels[0]
    assert found[0] > 0.99 and sum(found) <= 1 + 1e-9 and found[1] < 0.01


def test_contexts_are_believed_when_there_are_enough_verdicts() -> None:
    believed = Acceptance(((0.8, 0.1),))
    assert learned(believed, *counted((0.5, 0.2), ENOUGH_NODES - 1)).contexts == ()
    contexts = learned(believed, *counted((0.5, 0.2), ENOUGH_NODES)).contexts
    assert contexts and contexts[-1].acceptance[0] == pytest.approx(0.5, abs=0.1)


def test_a_plan_that_holds_is_looked_at_again_for_what_the_text_accepts() -> None:
    """Verdicts that know but first children make its tree smaller, as soon as they are looked at."""
    run, quiet, replanner = Run(SLOW, 2), Replanner(None, 0.0), Replanner(None, 0.0)
    run.follow(*run.planned(run.workload, run.draft))
    for _ in range(REGULAR + 6):
        assert not quiet.consider(run)
        quiet.saw(run.plan, run.one_round())
    num_nodes, changes = run.plan.tree.num_nodes, list[int]()
    for number in range(REGULAR + 1):
        if replanner.consider(run):
            changes.append(number)
        taken = run.one_round()
        replanner.saw(run.plan, taken, Counted(run.plan.tree, first_children(run.plan.tree, taken.emitted_tokens)))
    assert changes == [REGULAR] and run.plan.tree.num_nodes < num_nodes


def first_children(shape: TreeShape, num_nodes: int) -> tuple[int, ...]:
    """So many nodes from the root on, each the first child of the one before, or as many as there are."""
    path = [0]
    while len(path) < num_nodes and shape.children(path[-1]):
        path.append(shape.children(path[-1])[0])
    return tuple(path)
