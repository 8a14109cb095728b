"""The planner's choice against brute force, against Sequoia's own, and the timeline that both rest on."""

import math
import re
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from offload.errors import FitError
from offload.planner import search
from offload.planner.advice import compare_drafts
from offload.planner.cost import ModelCost
from offload.planner.hardware import ModelTimes, TaskTimes
from offload.planner.memory import MemoryPlan, plan_memory
from offload.planner.prediction import Drafting, DraftOption, Offer, Workload, expanded_per_level, predict
from offload.planner.residency import MAX_AUTO_SLOTS, MIN_SLOTS
from offload.planner.search import MAX_LEVELS, best_choice
from offload.planner.timeline import PartTimes, steady_round
from offload.planner.workload import make_workload
from offload.weights.placement import Placement, spread_evenly
from planning import GIB, L40, LLAMA_2_7B, LLAMA_2_70B, SETTINGS, budgets, constant_times, draft_option, equal_layers, plan
from tree.acceptance import Acceptance
from tree.optimizer import best_tree, expected_tokens

NO_VERIFY = TaskTimes(task="verify", sampling="greedy", vocab_size=32000, rows=(1, 2), task_s=(0.0, 0.0))
# Acceptance that the Sequoia repository ships, and the times of its demo configuration (arXiv 2402.12374, section 4.3).
SEQUOIA = Acceptance(((0.634183, 0.107946, 0.056972, 0.022489, 0.01949),))


def one_round(
    resident: int,
    slots: int,
    *,
    copy_s: float,
    before_s: float,
    layer_s: float,
    after_s: float,
    disk: int = 0,
    pageable: int = 0,
    move_s: float = 0.0,
) -> float:
    streamed = [layer for layer in range(8) if layer not in spread_evenly(resident, 8)]
    moved = frozenset(streamed[disk : disk + pageable])
    placement = Placement(num_layers=8, resident=spread_evenly(resident, 8), disk=frozenset(streamed[:disk]), pageable=moved)
    parts = PartTimes(
        copy_s=[copy_s] * 8,
        read_s=[1.0] * 8,
        move_s=[move_s] * 8,
        before_s=before_s,
        layer_s=[layer_s] * 8,
        after_s=after_s,
    )
    return float(steady_round(placement, slots, parts).round_s)


def test_what_the_link_hides_costs_nothing() -> None:
    assert one_round(0, 3, copy_s=1.0, before_s=0.5, layer_s=0.1, after_s=0.5) == pytest.approx(8.0)
    assert one_round(4, 3, copy_s=1.0, before_s=0.5, layer_s=0.1, after_s=0.5) == pytest.approx(4.0)


def test_what_computing_hides_costs_nothing() -> None:
    assert one_round(0, 2, copy_s=0.1, before_s=3.0, layer_s=1.0, after_s=2.0) == pytest.approx(13.0)


def test_drafting_beyond_what_the_slots_hide_is_paid_for() -> None:
    """With all slots full the link waits: 2 of 8 copies run while 5 s are drafted and verified, 6 after."""
    assert one_round(0, 2, copy_s=1.0, before_s=4.0, layer_s=0.01, after_s=1.0) == pytest.approx(5.0 + 6.0, abs=0.1)


def test_a_disk_that_feeds_the_pass_sets_its_pace() -> None:
    assert one_round(0, 3, copy_s=0.1, before_s=0.0, layer_s=0.01, after_s=0.0, disk=8) == pytest.approx(8.0)


def test_memory_that_is_not_pinned_is_a_disk_of_its_own_rate() -> None:
    """Hidden under the link while there is time, all of the pass where there is not, and one after another with reads."""
    times = {"copy_s": 0.5, "before_s": 0.0, "layer_s": 0.01, "after_s": 0.0}
    assert one_round(0, 3, **times, pageable=3, move_s=0.5) == pytest.approx(4.0)
    assert one_round(0, 3, **times, pageable=8, move_s=0.4) == pytest.approx(4.0)
    assert one_round(0, 3, **times, pageable=8, move_s=0.8) == pytest.approx(6.4)
    assert one_round(0, 3, **times, pageable=8, move_s=1.0) == one_round(0, 3, **times, disk=8)
    assert one_round(0, 3, **times, disk=4, pageable=4, move_s=0.6) == pytest.approx(4 * 1.0 + 4 * 0.6)


@given(
    st.integers(0, 8),
    st.integers(1, 4),
    st.integers(0, 8),
    st.tuples(st.floats(0.01, 2), st.floats(0, 5), st.floats(0.001, 2), st.floats(0, 3)),
)
def test_a_round_takes_at_least_its_longest_part_and_at_most_their_sum(
    resident: int, slots: int, disk: int, times: tuple[float, float, float, float]
) -> None:
    copy_s, before_s, layer_s, after_s = times
    found = one_round(resident, slots, copy_s=copy_s, before_s=before_s, layer_s=layer_s, after_s=after_s, disk=disk)
    copies_s, computes_s, reads_s = (8 - resident) * copy_s, before_s + 8 * layer_s + after_s, min(disk, 8 - resident) * 1.0
    assert max(copies_s, computes_s, reads_s) - 1e-9 <= found <= copies_s + computes_s + reads_s + 1e-9


def fits(workload: Workload, draft: DraftOption) -> bool:
    try:
        workload.memory(draft, 16, MAX_AUTO_SLOTS, False)
    except FitError:
        return False
    return True


def brute_force(workload: Workload, drafts: list[DraftOption], max_nodes: int, max_levels: int) -> list[float]:
    """The least seconds per token over every draft, slots and levels, by nodes, each tree made and timed on its own."""
    found = [math.inf] * (max_nodes + 1)
    for slots in (MIN_SLOTS, MAX_AUTO_SLOTS):
        memory = workload.memory(None, 1, slots, False)
        found[1] = min(found[1], predict(workload, memory, 1, Drafting()).s_per_token)
        for draft in drafts:
            for nodes in range(2, max_nodes + 1):
                for levels in range(2, max_levels + 1):
                    shape = best_tree(draft.acceptance, nodes, levels)
                    memory = workload.memory(draft, shape.num_nodes, slots, False)
                    draft_s = float(draft.draft_s(expanded_per_level(shape)))
                    tokens = expected_tokens(shape, draft.acceptance)
                    drafting = Drafting(tokens=tokens, draft_s=draft_s)
                    s_per_token = predict(workload, memory, shape.num_nodes, drafting).s_per_token
                    found[shape.num_nodes] = min(found[shape.num_nodes], s_per_token)
    return found


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    st.floats(16.5, 60),
    st.sampled_from([1e9, 25e9, 400e9]),
    st.lists(st.floats(0.01, 1.0), min_size=1, max_size=3),
    st.floats(1e-4, 1.0),
)
def test_the_choice_is_the_best_of_all(device_gib: float, link: float, weights: list[float], level_s: float) -> None:
    """Levels of one length whatever their width, so that bounds on the width cannot help."""
    ranks = sorted((weight / sum(weights) * 0.9 for weight in weights), reverse=True)
    hardware = replace(L40, link_bytes_per_s=link)
    draft = draft_option(
        acceptance=Acceptance((tuple(ranks),)), times=constant_times((1, 64), (level_s / 32,) * 2), cost=LLAMA_2_7B
    )
    limits = budgets(device_gib)
    workload = make_workload(SETTINGS, LLAMA_2_70B, hardware, limits, max_positions=4096)
    assume(fits(workload, draft))  # all sixteen sizes, so that both look at the same space
    by_nodes, slots = brute_force(workload, [draft], 16, 6), (MIN_SLOTS, MAX_AUTO_SLOTS)
    bounds = {"max_nodes": 16, "max_levels": 6, "kinds": [False]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "NEAR", 0.0)
        choice = best_choice(workload, [None, draft], slots, **bounds)
    assert choice is not None and choice.s_per_token == pytest.approx(min(by_nodes), rel=1e-9)


def test_the_smallest_tree_is_taken_of_those_that_are_nearly_as_quick() -> None:
    draft = draft_option()
    workload = make_workload(SETTINGS, LLAMA_2_70B, L40, budgets(48), max_positions=4096)
    best = best_choice(workload, [draft], (2,), max_nodes=91)
    assert best is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "NEAR", 0.0)
        by_size = [best_choice(workload, [draft], (2,), max_nodes=size, sizes=[size]) for size in range(1, 92)]
    seconds = [one.s_per_token for one in by_size if one is not None]
    enough = [size for size, s_per_token in enumerate(seconds, start=1) if s_per_token <= min(seconds) * (1 + search.NEAR)]
    assert best.num_nodes in enough and best.num_nodes <= 1.02 * min(enough)


@pytest.mark.parametrize(("first", "overhead_s"), [(0.6, 1e-3), (0.9, 1e-4), (0.95, 1e-4), (0.97, 1e-3), (0.99, 1e-4)])
def test_trees_of_dozens_of_levels_are_found_without_trying_all(
    monkeypatch: pytest.MonkeyPatch, first: float, overhead_s: float
) -> None:
    """As if all numbers of levels up to the bound had been tried, to a thousandth."""
    monkeypatch.setattr(search, "NEAR", 0.0)
    hardware = replace(L40, layer_overhead_s=overhead_s)
    draft = draft_option(acceptance=Acceptance(((first, (1 - first) * 0.4, (1 - first) * 0.2),)), hardware=hardware)
    workload = make_workload(SETTINGS, LLAMA_2_70B, hardware, budgets(60), max_positions=4096)
    found = best_choice(workload, [draft], (2,))
    monkeypatch.setattr(search, "LEVELS", tuple(range(1, MAX_LEVELS + 1)))
    best = best_choice(workload, [draft], (2,))
    assert found is not None and best is not None
    assert best.s_per_token <= found.s_per_token <= best.s_per_token * 1.001
    assert best.num_levels > 32 or first < 0.97


def test_a_bound_on_the_width_is_taken_when_wide_levels_are_slow() -> None:
    slow = draft_option(times=constant_times((1, 8, 9, 64), (1e-3, 1e-3, 0.1, 0.7)))
    workload = make_workload(SETTINGS, LLAMA_2_70B, L40, budgets(48), max_positions=4096)
    choice = best_choice(workload, [slow], (2, 3), kinds=[False])
    assert choice is not None and choice.max_level_width is not None and choice.max_level_width <= 8


def sequoia_workload() -> tuple[Workload, DraftOption]:
    """Nothing streamed, one layer: a round is what Sequoia's cost model has, levels x draft time + target time."""
    nodes, times = (1, 2, 4, 8, 16, 32), (10.0, 10.0, 10.0, 12.0, 14.0, 18.0)
    one_layer = replace(LLAMA_2_70B, layers=equal_layers(1, num_parameters=2**19, num_kv_heads=8), outside_bytes=2**20)
    memory = plan_memory(SETTINGS, one_layer, None, 1, 2, max_positions=4096, budgets=budgets(100))
    workload = Workload(
        target=one_layer,
        times=ModelTimes(context_rows=0, rows=nodes, layer_s=times, rest_s=(0.3,) * 6),  # it charges the root a level, too
        verify=NO_VERIFY,
        link_bytes_per_s=1e9,
        disk_bytes_per_s=1e9,
        memory=lambda draft, num_nodes, slots, coded: memory,
    )
    return workload, draft_option(cost=one_layer, acceptance=SEQUOIA, times=constant_times((1, 32), (0.3, 0.3)))


def test_sequoias_demo_configuration_gives_its_choice() -> None:
    """4 nodes in 4 levels, 4.8878 time units a token (the repository's tree_search.py on its demo-config.json)."""
    workload, draft = sequoia_workload()
    choice = best_choice(workload, [draft], (2,), max_levels=10, sizes=(1, 2, 4, 8, 16, 32))
    assert choice is not None
    exact = (4 * 0.3 + 10.0) / expected_tokens(best_tree(SEQUOIA, 4, 4), SEQUOIA)
    assert exact == pytest.approx(4.8878, abs=2e-4)
    assert choice.s_per_token <= exact + 1e-9


def test_a_draft_that_costs_more_than_it_brings_is_left_out() -> None:
    useless = draft_option(times=constant_times((1, 64), (10.0, 10.0)))
    made = plan(replace(SETTINGS, ngram=("off",)), None, device_gib=48, drafts=(useless,))
    assert made.draft is None and made.tree.num_nodes == 1
    assert re.match(r"one token a pass: [\d.]+ s/token are expected so, and [\d.]+ with the best tree", made.notes[0])


def test_of_two_drafts_the_better_is_used_and_the_comparison_says_so() -> None:
    slow, quick = draft_option(name="slow", times=constant_times((1, 64), (0.02, 0.02))), draft_option(name="quick")
    made = plan(tree=None, device_gib=48, drafts=(slow, quick))
    assert made.draft == 1
    workload = make_workload(SETTINGS, LLAMA_2_70B, L40, budgets(48), max_positions=4096)
    verdicts = compare_drafts([Offer(workload=workload, drafts=(slow, quick))], (2, 3))
    assert [verdict.name for verdict in verdicts] == ["quick", "slow"]
    assert verdicts[0].s_per_token == pytest.approx(made.prediction.s_per_token, rel=1e-3)
    by_formula = verdicts[0].expected_tokens / ((verdicts[0].num_levels - 1) * verdicts[0].level_s + verdicts[0].target_s)
    assert verdicts[0].formula_tokens_per_s == pytest.approx(by_formula)


@pytest.mark.parametrize(("device_gib", "draft"), [(47, LLAMA_2_7B), (23, LLAMA_2_7B), (11.5, None)])
def test_preset_cards_hold_their_plans(device_gib: float, draft: ModelCost | None) -> None:
    """The ledger sums to the budget, but for less than a layer, which is what is left where trees or layers end."""
    drafts = (draft_option(cost=draft),) if draft else ()
    made = plan(tree=None, device_gib=device_gib, drafts=drafts)
    used = sum(made.device_ledger.values())
    assert device_gib * GIB - LLAMA_2_70B.slot_bytes * 1.01 <= used <= device_gib * GIB


def test_on_a_machine_of_one_memory_nothing_is_counted_twice() -> None:
    made = plan(tree=None, device_gib=60, host_gib=60, shared=True)
    assert sum(made.device_ledger.values()) + sum(made.host_ledger.values()) <= 60 * GIB
    assert made.placement.disk


def memory_of(made: MemoryPlan) -> int:
    return sum(made.device_ledger.values())


def test_a_larger_tree_takes_no_less_memory() -> None:
    """What the search relies on when it stops at the first size that does not fit."""
    fixed = replace(SETTINGS, resident_layers=0)
    sizes = [
        memory_of(plan_memory(fixed, LLAMA_2_70B, LLAMA_2_7B, nodes, 2, max_positions=4096, budgets=budgets(None)))
        for nodes in (1, 2, 16, 64, 256, 1024, 4096)
    ]
    assert sizes == sorted(sizes)
