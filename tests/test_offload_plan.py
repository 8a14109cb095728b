"""Plans: every byte has a name, budgets are kept, and what does not fit is refused with the sum."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.config import EngineSettings, parse_size
from offload.errors import FitError, ModelError, UsageError
from offload.planner.cost import ModelCost, activation_bytes
from offload.planner.memory import device_ledger
from offload.planner.tree_flag import read_tree, resolve_method
from offload.weights.placement import RING_BUFFERS
from planning import CHAINS, GIB, L40, LLAMA_2_70B, PUBLISHED, SETTINGS, TWO_KINDS, constant_times, draft_option, plan
from tree.blocks import block_bytes
from tree.optimizer import best_tree, expected_tokens
from tree.shape import TreeShape
from tree.spec import DynamicTree, OptimalTree, TreeRequest


def test_a_row_of_70b_keys_and_values_takes_327680_bytes() -> None:
    assert LLAMA_2_70B.kv_bytes_per_row == 327_680


def test_there_is_memory_to_draw_from_large_vocabularies_even_where_passes_take_little() -> None:
    large = replace(LLAMA_2_70B, vocab_size=128_256)

    def activations(target: ModelCost, tree_nodes: int) -> int:
        rows = {"tree_nodes": tree_nodes, "context_rows": 64, "pass_rows": 64}
        return device_ledger(target, None, max_sequences=1, **rows, replays=False)["activations"]

    assert activations(LLAMA_2_70B, 1) == activation_bytes(LLAMA_2_70B, 64, 64)
    assert activations(large, 256) == block_bytes(256, 128_256) > activations(large, 1)


def test_seconds_per_pass_follow_from_resident_layers_and_rate() -> None:
    """The table of reference figures: 5.48 s with nothing resident at 25 GB/s, 4.52 s with 14 resident layers."""
    for resident, seconds in ((0, 5.48), (14, 4.52), (40, 2.74)):
        made = plan(replace(SETTINGS, resident_layers=resident), device_gib=None)
        assert made.prediction.pass_s == pytest.approx(seconds, rel=0.01)


@given(st.floats(24, 200))
def test_auto_fills_the_device_without_exceeding_it(device_gib: float) -> None:
    made = plan(device_gib=device_gib)
    used = sum(made.device_ledger.values())
    assert used <= device_gib * GIB
    if made.placement.streamed and len(made.placement.streamed) > 1:
        assert used + LLAMA_2_70B.slot_bytes > device_gib * GIB or made.num_slots < 3


@given(st.floats(4, 140))
def test_layers_beyond_the_host_budget_go_to_disk(host_gib: float) -> None:
    made = plan(replace(SETTINGS, resident_layers=0), device_gib=None, host_gib=host_gib)
    assert sum(made.host_ledger.values()) <= host_gib * GIB
    on_disk = len(made.placement.disk)
    assert on_disk == 0 or made.host_ledger["bounce ring"] == RING_BUFFERS * LLAMA_2_70B.slot_bytes
    assert len(made.placement.host) + on_disk == 80


@given(st.floats(14, 60), st.floats(6, 20), st.integers(1, 4))
def test_layers_of_two_kinds_are_counted_one_by_one(device_gib: float, host_gib: float, slots: int) -> None:
    wanted = replace(SETTINGS, slots=slots)
    made = plan(wanted, TreeShape.root_only(), device_gib=device_gib, host_gib=host_gib, drafts=(), target=TWO_KINDS)
    placement, device, host = made.placement, made.device_ledger, made.host_ledger
    assert sum(device.values()) <= device_gib * GIB and sum(host.values()) <= host_gib * GIB
    resident = [TWO_KINDS.layers[layer].computed_bytes for layer in sorted(placement.resident)]
    assert device[f"{len(resident)} resident layers"] == sum(resident)
    slot_bytes = TWO_KINDS.layers[0].stored_bytes
    if placement.streamed:
        assert device[f"{slots} slots"] == slots * slot_bytes
        assert device["decoded layer"] == TWO_KINDS.layers[2].scratch_bytes
    streamed = [TWO_KINDS.layers[layer] for layer in placement.streamed]
    assert made.bytes_per_pass == sum(layer.stored_bytes for layer in streamed)
    assert made.raw_bytes_per_pass == sum(layer.computed_bytes for layer in streamed)
    assert made.disk_bytes_per_pass == sum(TWO_KINDS.layers[layer].stored_bytes for layer in placement.disk)
    in_memory = sorted(TWO_KINDS.layers[layer].stored_bytes for layer in placement.host)
    assert host["pinned layers"] == sum(in_memory)
    to_spare = [slot_bytes - size for size in in_memory[-RING_BUFFERS:]] if not placement.disk else []
    assert host.get("spare for a ring", 0) == sum(to_spare)
    assert host.get("bounce ring", 0) == (RING_BUFFERS * slot_bytes if placement.disk else 0)
    assert device["key/value cache"] == 9000 * made.context_rows


def test_a_pass_over_layers_of_two_kinds_copies_and_computes_each_for_its_own_time() -> None:
    """On a link so slow, or a processor so slow, that it is all that counts."""
    root, wanted = TreeShape.root_only(), replace(SETTINGS, resident_layers=0, context_tokens=1)
    slow_link = replace(L40, link_bytes_per_s=1e6)
    made = plan(wanted, root, device_gib=None, drafts=(), target=TWO_KINDS, hardware=slow_link)
    assert made.prediction.pass_s == pytest.approx(15e9 / 1e6, rel=1e-3)
    slow_processor = replace(L40, flops_per_s=1e9, layer_overhead_s=0.0)
    made = plan(wanted, root, device_gib=None, drafts=(), target=TWO_KINDS, hardware=slow_processor)
    computed_s = made.prediction.compute_s - made.prediction.decode_s
    assert computed_s == pytest.approx(2 * (3 * 25e8 + 6 * 5e8) / 1e9, rel=1e-3)
    assert made.prediction.pass_s == pytest.approx(made.prediction.compute_s, rel=1e-3)
    resident = replace(wanted, resident_layers=9)
    at_once = plan(resident, root, device_gib=None, drafts=(), target=TWO_KINDS, hardware=slow_processor)
    assert at_once.prediction.decode_s == 0 and at_once.prediction.pass_s == pytest.approx(computed_s)


@given(st.integers(1, 16), st.floats(48, 100), st.sampled_from([1, 25, 200]))
def test_there_is_memory_for_several_texts_at_once(max_sequences: int, device_gib: float, num_nodes: int) -> None:
    tree = TreeShape.chains(1, num_nodes - 1) if num_nodes > 1 else TreeShape.root_only()
    one = plan(replace(SETTINGS, max_context=512), tree, device_gib=device_gib)
    made = plan(replace(SETTINGS, max_context=512, max_sequences=max_sequences), tree, device_gib=device_gib)
    assert (made.max_sequences, one.max_sequences) == (max_sequences, 1)
    assert (made.context_rows, made.text_tokens) == (one.context_rows, one.text_tokens), "each text has as many rows"
    assert sum(made.device_ledger.values()) <= device_gib * GIB
    for name in ("key/value cache", "draft key/value cache"):
        assert made.device_ledger[name] == max_sequences * one.device_ledger[name]
    texts_bytes = tree.num_nodes * LLAMA_2_70B.vocab_size * (LLAMA_2_70B.dtype_bytes + 4)
    added_bytes = made.device_ledger["logits and laws"] - one.device_ledger["logits and laws"]
    assert added_bytes == (max_sequences - 1) * texts_bytes
    assert made.device_ledger["tree mask"] == (max_sequences + 1) * tree.num_nodes**2
    assert made.pass_rows >= max_sequences * (tree.num_nodes + 1)
    assert made.pass_rows <= max_sequences * made.context_rows


def test_less_than_one_text_at_once_is_refused() -> None:
    with pytest.raises(UsageError, match="0 is too small"):
        EngineSettings(model="m", max_sequences=0)


def test_a_budget_too_small_for_two_slots_is_refused_with_the_sum_that_shows_it() -> None:
    with pytest.raises(FitError, match=r"embedding, norm and head 0\.977 \+ .* \+ 2 slots 3\.188 = [\d.]+ GiB > 18\.000 GiB"):
        plan(device_gib=18)


def test_a_host_too_small_for_the_ring_is_refused_with_the_sum() -> None:
    with pytest.raises(FitError, match=r"ring of 2 layers .* 3\.188 GiB > 2\.000 GiB"):
        plan(device_gib=None, host_gib=2)


def test_everything_fits_so_nothing_streams() -> None:
    made = plan(device_gib=200)
    assert made.placement.streamed == () and made.num_slots == 0 and made.link_bytes_per_s is None
    assert made.notes == ("the model fits on the device entirely: nothing is streamed",)
    assert made.prediction.round_s == pytest.approx(
        made.prediction.draft_s + made.prediction.compute_s + made.prediction.after_s
    )


def test_more_resident_layers_than_layers_is_refused() -> None:
    with pytest.raises(FitError, match="81 resident layers"):
        plan(replace(SETTINGS, resident_layers=81), device_gib=None)


def test_a_tree_larger_than_the_context_is_refused() -> None:
    with pytest.raises(FitError, match="25 nodes"):
        plan(replace(SETTINGS, max_context=20), device_gib=None)


def test_tree_specs_are_read_and_what_needs_a_draft_says_so() -> None:
    assert read_tree("auto", has_draft=False) is None
    assert read_tree("none", has_draft=False) == TreeShape.root_only()
    assert read_tree("4x6:kary", has_draft=True) == CHAINS
    assert read_tree("64x8", has_draft=True) == OptimalTree(64, 8)
    assert read_tree("64:dynamic", has_draft=True) == DynamicTree(64)
    with pytest.raises(UsageError, match="25 nodes needs a draft"):
        read_tree("4x6:kary", has_draft=False)
    with pytest.raises(UsageError, match="64 nodes needs a draft"):
        read_tree("64:dynamic", has_draft=False)
    with pytest.raises(UsageError):
        read_tree("4by6", has_draft=True)
    with pytest.raises(ModelError):
        read_tree("missing.json", has_draft=True)


def test_a_requested_tree_is_the_best_one_for_the_draft_that_is_used() -> None:
    made = plan(tree=OptimalTree(64, 8), device_gib=48)
    assert made.tree == best_tree(PUBLISHED, 64, 8) and made.draft == 0
    assert made.prediction.expected_tokens == pytest.approx(expected_tokens(made.tree, PUBLISHED))


def test_trees_that_follow_the_text_have_the_nodes_that_were_asked_for_in_as_many_levels_as_pay() -> None:
    made = plan(tree=DynamicTree(64), device_gib=48)
    assert made.dynamic and made.draft == 0 and made.tree.num_nodes == 64 and made.aim.dynamic
    assert made.aim.acceptance == made.acceptance == PUBLISHED
    others = [plan(tree=OptimalTree(64, num_levels), device_gib=48) for num_levels in range(2, 20)]
    assert not any(other.dynamic for other in others)
    least_s = min(other.prediction.s_per_token for other in others)
    assert made.prediction.s_per_token <= least_s * 1.001
    slow = draft_option(times=constant_times((1, 64), (0.5, 0.5)))
    assert plan(tree=DynamicTree(64), device_gib=48, drafts=(slow,)).tree.num_levels < made.tree.num_levels


@pytest.mark.parametrize(
    "tree", [CHAINS, OptimalTree(64, 8), DynamicTree(64), None], ids=["shape", "request", "dynamic", "auto"]
)
def test_a_draft_that_does_not_fit_is_passed_over(tree: TreeRequest | None) -> None:
    """Wherever it stands among those offered. Where it is the only one, a tree that was asked for is refused."""
    large, small = draft_option(cost=LLAMA_2_70B), draft_option()
    assert plan(tree=tree, device_gib=30, drafts=(large, small)) == replace(
        plan(tree=tree, device_gib=30, drafts=(small, large)), draft=1
    )
    if tree is not None:
        with pytest.raises(FitError, match=r"draft model 128\.479 .* > 30\.000 GiB"):
            plan(tree=tree, device_gib=30, drafts=(large,))


def test_chosen_trees_respect_the_vocabulary_and_auto_the_context() -> None:
    few_tokens = replace(LLAMA_2_70B, vocab_size=3)
    assert plan(tree=OptimalTree(256, 4), target=few_tokens, device_gib=48).tree.max_branching == 3
    assert plan(replace(SETTINGS, max_context=40), None, device_gib=48).tree.num_nodes <= 10
    assert plan(replace(SETTINGS, max_context=3), None, device_gib=48).tree.num_nodes == 1


def test_the_default_verifier_is_traversal_and_unknown_ones_are_refused() -> None:
    assert resolve_method("auto") == "traversal"
    with pytest.raises(UsageError, match="unknown verifier 'best'"):
        EngineSettings(model="m", verifier="best")


@given(
    width=st.sampled_from([1, 8, 64]),
    max_context=st.sampled_from([None, 1000, 5000]),
    slots=st.sampled_from([None, 1, 4]),
    resident_layers=st.sampled_from([None, 0, 2]),
    budget_bytes=st.integers(0, 12 * GIB),
)
def test_the_budget_that_a_refusal_names_is_enough(
    width: int, max_context: int | None, slots: int | None, resident_layers: int | None, budget_bytes: int
) -> None:
    """More memory once meant larger chunks of the prompt, which then did not fit into what the refusal had asked for."""
    settings = replace(SETTINGS, max_context=max_context, slots=slots, resident_layers=resident_layers)

    def plan_within(device_bytes: int) -> None:
        plan(settings, TreeShape.chains(width, 6), device_gib=device_bytes / GIB)

    try:
        plan_within(budget_bytes)
    except FitError as error:
        enough = re.search(r"allow at least (\w+)", error.cure)
        assert enough is not None
        plan_within(parse_size(enough[1], flag="--gpu-memory"))
