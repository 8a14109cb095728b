"""A base among all that memory may hold: what it takes and saves, the draft that it is, and offers that are priced together."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from command_line import run_command
from offload.demo import TARGET
from offload.errors import FitError
from offload.planner.cost import ModelCost, base_draft
from offload.planner.fallback import Fallbacks
from offload.planner.plan import plan_run
from offload.planner.prediction import Offer, expanded_per_level, predict_tree
from offload.planner.refit import Seen, memory_of, refit
from offload.planner.residency import layers_ledger, residency
from offload.planner.tree_flag import default_acceptance, read_acceptance
from offload.weights.placement import Placement
from planning import (
    BASE_BITS,
    CHAINS,
    GIB,
    L40,
    LLAMA_2_70B,
    LOSSLESS_BITS,
    REMAINDER_BITS,
    SETTINGS,
    TWO_KINDS,
    budgets,
    coded_layers,
    draft_option,
    offer,
    plan,
)
from tree.acceptance import Acceptance
from tree.shape import TreeShape

ROOT = TreeShape.root_only()
BESIDE_BASE = coded_layers(LLAMA_2_70B, REMAINDER_BITS, BASE_BITS)
CODED = coded_layers(LLAMA_2_70B, LOSSLESS_BITS)
SURE = Acceptance(((0.95, 0.02),))


def test_one_gigabyte_saves_as_much_as_the_law_says() -> None:
    """Bytes that a pass does not send for each byte of memory, of whole plans: raw residents among raw layers 1.00, coded ones
    among coded layers 1.00, a base with its remainder 1.97 against raw streaming and 0.88 against coded; here 7.5 bits are
    streamed, not 7.4, and 11.28 are coded, not 11.2."""

    def grown(target: ModelCost) -> float:
        less, more = (plan(SETTINGS, ROOT, device_gib=device_gib, target=target, drafts=()) for device_gib in (40, 60))
        taken = sum(more.device_ledger.values()) - sum(less.device_ledger.values())
        return (less.bytes_per_pass - more.bytes_per_pass) / taken

    assert grown(LLAMA_2_70B) == pytest.approx(1.0)
    assert grown(CODED) == pytest.approx(1.0)
    nothing_resident = replace(SETTINGS, resident_layers=0)
    raw, coded, residual = (
        plan(nothing_resident, ROOT, device_gib=60, target=target, drafts=()) for target in (LLAMA_2_70B, CODED, BESIDE_BASE)
    )
    base_bytes = residual.device_ledger["base of 80 layers"]
    assert (raw.bytes_per_pass - residual.bytes_per_pass) / base_bytes == pytest.approx(1.97, rel=0.02)
    assert (coded.bytes_per_pass - residual.bytes_per_pass) / base_bytes == pytest.approx(0.88, rel=0.03)


def test_the_base_is_there_of_every_layer_that_is_not_resident_raw() -> None:
    target = replace(
        TWO_KINDS, layers=tuple(replace(layer, base_bytes=3 + number) for number, layer in enumerate(TWO_KINDS.layers))
    )
    ledger = layers_ledger(target, {0, 1, 4}, 2, coded={4})
    assert ledger["2 resident layers"] == target.layers[0].computed_bytes + target.layers[1].computed_bytes
    assert ledger["1 coded resident layers"] == target.layers[4].stored_bytes
    assert ledger["base of 7 layers"] == sum(3 + number for number in range(2, 9))
    assert not any(name.startswith("base") for name in layers_ledger(TWO_KINDS, {0}, 2))
    everything = layers_ledger(target, range(9), 0)
    assert sum(everything.values()) == target.computed_bytes  # then nobody needs it


@pytest.mark.parametrize("coded", [False, True])
def test_residents_fill_what_the_base_leaves_and_no_more(coded: bool) -> None:
    target = BESIDE_BASE
    layer = target.common_layer
    for room_gib in range(40, 140, 3):
        room = room_gib * GIB
        kept = residency(SETTINGS, target, room, 2, shared=False, coded=coded)
        ledger = layers_ledger(target, kept.resident, kept.num_slots, kept.coded)
        assert sum(ledger.values()) <= room
        if 0 < len(kept.resident) < target.num_layers:
            next_bytes = layer.stored_bytes if coded else layer.computed_bytes - layer.base_bytes
            assert sum(ledger.values()) > room - next_bytes
    assert residency(SETTINGS, target, target.computed_bytes, 2, shared=False, coded=coded).num_slots == 0


def test_a_base_that_does_not_fit_is_refused_with_its_name() -> None:
    with pytest.raises(FitError, match="base of 80 layers"):
        plan(SETTINGS, ROOT, device_gib=30, target=BESIDE_BASE, drafts=())


def test_the_draft_of_a_base_takes_keys_and_values_and_no_weights() -> None:
    self_draft = draft_option(base_draft(BESIDE_BASE), name="self")
    without = plan(SETTINGS, ROOT, device_gib=48, target=BESIDE_BASE, drafts=()).device_ledger
    made = plan(SETTINGS, CHAINS, device_gib=48, target=BESIDE_BASE, drafts=(self_draft,))
    ledger = made.device_ledger
    assert ledger["draft model"] == 0
    rows = made.context_rows + made.ahead_rows
    assert ledger["draft key/value cache"] * made.context_rows == ledger["key/value cache"] * rows > 0
    assert ledger["base of 80 layers"] == without["base of 80 layers"] == BESIDE_BASE.base_bytes


def test_a_level_reads_the_base_once_and_raw_residents_as_they_are() -> None:
    """By the roofline of one row: bytes by the memory's rate. Coded residents draft by their base."""
    limits = budgets(None)
    workload = offer(BESIDE_BASE, limits=limits).workload
    self_draft = draft_option(base_draft(BESIDE_BASE))
    placed = {
        num_raw: self_draft.beside(
            workload, Placement(num_layers=80, resident=frozenset(range(num_raw + 10)), coded=frozenset(range(10)))
        )
        for num_raw in (0, 20, 60)
    }
    base_s, raw_s = float(self_draft.times.layer(1)), float(workload.times.layer(1))
    assert base_s < raw_s / 2.5
    rest_s = float(self_draft.times.rest(1))
    for num_raw, one in placed.items():
        assert float(one.level_s(1)) == pytest.approx((80 - num_raw) * base_s + num_raw * raw_s + rest_s)
    separate = draft_option()
    assert separate.beside(workload, Placement(num_layers=80, resident=frozenset(range(20)))) is separate


def test_what_is_predicted_of_a_self_draft_is_by_its_placement() -> None:
    """The search and the prediction agree on the seconds of drafting where some layers are raw."""
    self_draft = draft_option(base_draft(BESIDE_BASE), SURE)
    made = plan(SETTINGS, None, device_gib=70, target=BESIDE_BASE, drafts=(self_draft,))
    workload = offer(BESIDE_BASE, limits=budgets(70)).workload
    again = predict_tree(workload, memory_of(made), made.tree, self_draft)
    assert made.draft == 0 and again.s_per_token == pytest.approx(made.prediction.s_per_token)
    slow = self_draft.beside(workload, made.placement)
    assert again.draft_s == pytest.approx(float(slow.draft_s(expanded_per_level(made.tree))))


def test_of_several_offers_the_quickest_is_taken() -> None:
    """On a card that holds the base, self; on smaller ones the separate draft beside coded layers."""
    found = {}
    for device_gib in (12, 24, 48):
        limits = budgets(device_gib)
        offers = [
            offer(CODED, draft_option(), limits=limits),
            offer(BESIDE_BASE, draft_option(base_draft(BESIDE_BASE), SURE, name="self"), limits=limits),
        ]
        made = plan_run(SETTINGS, None, offers, max_positions=4096, budgets=limits)
        found[device_gib] = made.offer
        for place, alone in enumerate(offers):
            try:
                other = plan_run(SETTINGS, None, [alone], max_positions=4096, budgets=limits)
            except FitError:
                assert place == 1 and device_gib < 48
                continue
            assert made.prediction.s_per_token <= other.prediction.s_per_token * (1 + 0.011)  # room for other trees
        target = offers[made.offer].workload.target
        assert made.bytes_per_pass == sum(target.layers[layer].stored_bytes for layer in made.placement.streamed)
    assert found == {12: 0, 24: 0, 48: 1}


def test_a_tree_that_was_asked_for_takes_an_offer_that_has_a_draft() -> None:
    limits = budgets(48)
    offers = [offer(CODED, limits=limits), offer(BESIDE_BASE, draft_option(base_draft(BESIDE_BASE)), limits=limits)]
    made = plan_run(SETTINGS, CHAINS, offers, max_positions=4096, budgets=limits)
    assert (made.offer, made.draft, made.tree) == (1, 0, CHAINS)
    hopeless = draft_option(base_draft(BESIDE_BASE), Acceptance(((0.01,),)))
    offers = [offers[0], Offer(workload=offers[1].workload, drafts=(hopeless,))]
    needed = plan_run(replace(SETTINGS, needs_tree=True), None, offers, max_positions=4096, budgets=limits)
    assert (needed.offer, needed.draft) == (1, 0) and needed.tree.num_nodes > 1


def test_a_self_draft_that_does_not_fit_or_pay_is_told_of_as_any_draft_is() -> None:
    for device_gib, acceptance, said in (
        (20, SURE, "with a tree; a base of all layers takes 34.9 GiB"),
        (48, Acceptance(((0.01,),)), "to draft and"),
    ):
        limits = budgets(device_gib)
        self_draft = draft_option(base_draft(BESIDE_BASE), acceptance)
        offers = [offer(CODED, limits=limits), offer(BESIDE_BASE, self_draft, limits=limits)]
        made = plan_run(replace(SETTINGS, ngram=("off",)), None, offers, max_positions=4096, budgets=limits)
        assert made.tree == ROOT and said in (made.why_no_tree or "")


def test_decoding_beside_a_base_reads_that_too() -> None:
    alone = replace(BESIDE_BASE, layers=tuple(replace(layer, base_bytes=0) for layer in BESIDE_BASE.layers))
    layer = BESIDE_BASE.common_layer
    slower = L40.decode_s(BESIDE_BASE)[0] / L40.decode_s(alone)[0]
    assert slower == pytest.approx(
        (layer.stored_bytes + layer.base_bytes + layer.computed_bytes) / (layer.stored_bytes + layer.computed_bytes)
    )


@settings(max_examples=20)
@given(st.floats(0.3, 1.0), st.floats(1.0, 4.0))
def test_a_plan_with_raw_layers_beside_a_base_predicts_what_was_seen_of_it(compute: float, drafting: float) -> None:
    """Raw layers serve the draft, too: the passes tell what they take, and the rest of drafting is the base's."""
    self_draft = draft_option(base_draft(BESIDE_BASE), SURE)
    workload = offer(BESIDE_BASE, limits=budgets(100)).workload
    made = plan(replace(SETTINGS, resident_layers=20), CHAINS, device_gib=100, target=BESIDE_BASE, drafts=(self_draft,))
    made = replace(made, placement=replace(made.placement, coded=frozenset()))
    predicted = predict_tree(workload, memory_of(made), made.tree, self_draft)
    seen = Seen(
        num_rounds=10**9,
        tokens=predicted.expected_tokens,
        round_s=predicted.round_s,
        compute_s=compute * predicted.compute_s,
        draft_s=drafting * predicted.draft_s,
        after_s=predicted.after_s,
        copied_s=made.bytes_per_pass / 25e9,
    )
    refitted = refit(seen, made, workload, self_draft, seen.tokens)
    again = predict_tree(refitted[0], memory_of(made), made.tree, refitted[1])
    assert again.compute_s == pytest.approx(seen.compute_s) and again.draft_s == pytest.approx(seen.draft_s)


def test_a_resident_layer_that_leaves_a_full_device_gets_its_base_back() -> None:
    self_draft = draft_option(base_draft(BESIDE_BASE), SURE)
    limits = budgets(100)
    workload = offer(BESIDE_BASE, limits=limits).workload
    made = plan(replace(SETTINGS, resident_layers=20), CHAINS, device_gib=100, target=BESIDE_BASE, drafts=(self_draft,))
    made = replace(made, placement=replace(made.placement, coded=frozenset()))
    fallbacks = Fallbacks(settings=SETTINGS, workload=workload, draft=self_draft, budgets=limits)
    smaller = fallbacks.fewer_resident(made)
    assert smaller is not None and len(smaller.placement.resident) == 19
    assert smaller.device_ledger["base of 61 layers"] == 61 * BESIDE_BASE.common_layer.base_bytes
    raw = BESIDE_BASE.common_layer.computed_bytes
    assert smaller.device_ledger["19 resident layers"] == 19 * raw and smaller.device_ledger["draft model"] == 0


def test_a_plan_says_that_the_acceptance_of_its_base_is_of_others() -> None:
    """Of a run, too, not only of the command `plan`; and nothing where somebody said what it is."""
    for acceptance, is_said in ((read_acceptance(default_acceptance("self:int8")), True), (SURE, False)):
        self_draft = draft_option(base_draft(BESIDE_BASE), acceptance, name="self:int8")
        made = plan(SETTINGS, CHAINS, device_gib=48, target=BESIDE_BASE, drafts=(self_draft,))
        assert is_said == any("acceptance is assumed" in note and "int8 has more" in note for note in made.notes)


def test_a_run_whose_base_finds_no_room_is_one_without(capsys: pytest.CaptureFixture[str]) -> None:
    """As the command `plan` has it: nobody has to know beforehand."""
    said = {}
    for memory in ("12MiB", "30MiB"):
        flags = (
            "--model",
            TARGET,
            "--draft-model",
            "self",
            "--gpu-memory",
            memory,
            "--max-new-tokens",
            4,
            "--profile",
            "l40",
            "-q",
        )
        finished = run_command(capsys, "generate", "--prompt", "Once", "--device", "cpu", "--json", *flags)
        assert finished.code == 0, finished.stderr
        said[memory] = json.loads(finished.stdout)
    assert "a base of all layers takes 2.32 MiB" in str(said["12MiB"]["plan"]["notes"])
    assert not [name for name in said["12MiB"]["plan"]["device_bytes"] if name.startswith("base of")]
    assert said["12MiB"]["text"] == said["30MiB"]["text"]
