"""Plans of models whose layers are decoded in passes: what decoding takes, and what resident layers stay as."""

import itertools
import json
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from offload.errors import FitError
from offload.planner.cost import LayerCost, ModelCost
from offload.planner.fallback import Fallbacks
from offload.planner.hardware import DECODE_SWEEPS, DecodeTime, HardwareProfile
from offload.planner.hardware_file import from_json, to_json
from offload.planner.memory import plan_memory
from offload.planner.plan import Plan
from offload.planner.refit import Seen, measured_anew, refit
from offload.planner.timeline import PartTimes, steady_round
from offload.planner.workload import make_workload
from offload.streaming.schedule import Compute, Decode, Fetch, first_fetches, pass_steps
from offload.weights.placement import Placement
from planning import GIB, L40, LLAMA_2_70B, SETTINGS, TWO_KINDS, budgets, plan
from tree.shape import TreeShape

ROOT = TreeShape.root_only()
_RAW = LLAMA_2_70B.layers[0]
LINK_BYTES_PER_S = 25e9


def stored_as(share: float, weights: str = "FP8", layers: int = 80) -> ModelCost:
    """Llama-2-70B of so many layers that are stored in a share of what they compute with."""
    layer = replace(_RAW, stored_bytes=round(share * _RAW.computed_bytes), scratch_bytes=_RAW.computed_bytes)
    return replace(LLAMA_2_70B, layers=(layer,) * layers, weights=weights)


def decoding_in(layer_s: float, weights: str = "FP8") -> HardwareProfile:
    """A machine that decodes one of its layers in so many seconds."""
    decoder = DecodeTime(weights=weights, dtype_bytes=2, computed_bytes=_RAW.computed_bytes, layer_s=layer_s)
    return replace(L40, decoders=(decoder,))


def planned(target: ModelCost, hardware: HardwareProfile, device_gib: float | None, **changes: object) -> Plan:
    settings = replace(SETTINGS, max_context=512, **changes)
    return plan(settings, ROOT, device_gib=device_gib, drafts=(), target=target, hardware=hardware)


def played(placement: Placement, num_slots: int, parts: PartTimes, num_passes: int) -> float:
    """Seconds of the last of so many passes back to back, by the very steps that a stream takes. All is in host memory."""
    decoded = {layer for layer in placement.decoded if parts.decode_s[layer]}
    now, link_free, slot_free = 0.0, 0.0, [0.0] * max(num_slots, 1)
    landed: dict[int, float] = {}

    def fetch(step: Fetch) -> None:
        nonlocal link_free
        link_free = max(link_free, slot_free[step.slot]) + parts.copy_s[step.layer]
        landed[step.slot] = link_free

    for step in first_fetches(placement.streamed, num_slots):
        fetch(step)
    for number in range(num_passes):
        began = now
        for step in pass_steps(placement.num_layers, placement.streamed, num_slots, number, decoded):
            if isinstance(step, Fetch):
                fetch(step)
                continue
            if step.slot is not None:
                now = max(now, landed.pop(step.slot))
            now += parts.decode_s[step.layer] if isinstance(step, Decode) else float(parts.layer_s[step.layer])
            if step.slot is not None:
                slot_free[step.slot] = now
            assert isinstance(step, Compute | Decode)
    return now - began


SECONDS = st.floats(0.01, 2.0)


@given(st.data(), st.integers(1, 7), st.integers(1, 3))
def test_the_timeline_is_that_of_the_steps_which_a_stream_takes(data: st.DataObject, num_layers: int, num_slots: int) -> None:
    def by_layer(values: st.SearchStrategy[float]) -> list[float]:
        return data.draw(st.lists(values, min_size=num_layers, max_size=num_layers))

    decode_s = by_layer(st.just(0.0) | SECONDS)
    numbers = st.frozensets(st.integers(0, num_layers - 1))
    resident = data.draw(numbers)
    coded = frozenset(layer for layer in data.draw(numbers) & resident if decode_s[layer])
    placement = Placement(num_layers=num_layers, resident=resident, coded=coded)
    slots = num_slots if placement.streamed else 0
    parts = PartTimes(
        copy_s=by_layer(SECONDS),
        read_s=[1.0] * num_layers,
        move_s=[1.0] * num_layers,
        before_s=0.0,
        layer_s=by_layer(SECONDS),
        decode_s=decode_s,
        after_s=0.0,
    )
    assert float(steady_round(placement, slots, parts).round_s) == pytest.approx(played(placement, slots, parts, 3))


def test_a_slot_is_free_as_soon_as_its_layer_is_decoded() -> None:
    """With one slot a copy hides under computing, and under nothing where layers are used where they arrive."""
    placement = Placement(num_layers=4, resident=frozenset())
    parts = PartTimes(
        copy_s=[1.0] * 4, read_s=[0.0] * 4, move_s=[0.0] * 4, before_s=0.0, layer_s=[0.8] * 4, decode_s=[0.1] * 4, after_s=0.0
    )
    assert float(steady_round(placement, 1, parts).round_s) == pytest.approx(4 * 1.1)
    assert float(steady_round(placement, 1, replace(parts, decode_s=())).round_s) == pytest.approx(4 * 1.8)


def test_decoding_hides_under_the_link_or_is_paid_for() -> None:
    copy_s = 0.5 * _RAW.computed_bytes / LINK_BYTES_PER_S
    quick = planned(stored_as(0.5), decoding_in(0.1 * copy_s), None)
    assert quick.prediction.pass_s == pytest.approx(80 * copy_s, rel=1e-3)
    slow = planned(stored_as(0.5), decoding_in(3 * copy_s), None)
    layer_s = (slow.prediction.compute_s - slow.prediction.decode_s) / 80
    assert slow.prediction.decode_s == pytest.approx(80 * 3 * copy_s)
    assert slow.prediction.pass_s == pytest.approx(80 * (3 * copy_s + layer_s), rel=1e-3)


def test_resident_layers_stay_coded_where_the_link_sets_the_pace() -> None:
    """Twice as many fit, and their decoding hides under the stream."""
    target, raw = stored_as(0.5), planned(LLAMA_2_70B, L40, 48)
    made = planned(target, decoding_in(1e-4), 48)
    resident = made.placement.resident
    assert made.placement.coded == resident and len(resident) > 1.9 * len(raw.placement.resident)
    ledger = made.device_ledger
    assert ledger[f"{len(resident)} coded resident layers"] == len(resident) * target.slot_bytes
    assert (ledger["0 resident layers"], ledger["decoded layer"]) == (0, _RAW.computed_bytes)
    assert ledger["decoder's workspace"] == 64 * 2**20
    assert 48 * GIB - target.slot_bytes < sum(ledger.values()) <= 48 * GIB
    assert made.bytes_per_pass == (80 - len(resident)) * target.slot_bytes
    assert made.raw_bytes_per_pass == 2 * made.bytes_per_pass


def test_resident_layers_are_decoded_for_good_where_decoding_is_slower_than_the_link() -> None:
    made = planned(stored_as(0.5), decoding_in(2.0), 48)
    assert made.placement.resident and not made.placement.coded


@given(st.floats(8.0, 160.0), st.floats(0.2, 0.9), st.floats(1e-4, 0.2))
def test_what_is_chosen_is_the_quicker_of_both_and_holds_its_budget(device_gib: float, share: float, layer_s: float) -> None:
    target, hardware = stored_as(share), decoding_in(layer_s)
    settings, limits = replace(SETTINGS, max_context=512, slots=2), budgets(device_gib)
    workload = make_workload(settings, target, hardware, limits, max_positions=4096)
    found = []
    for coding in (False, True):
        only = replace(workload, codings=(coding,))
        try:
            memory = plan_memory(settings, target, None, 1, 2, max_positions=4096, budgets=limits, coded=coding)
        except FitError:
            continue
        assert sum(memory.device_ledger.values()) <= device_gib * GIB and memory.placement.coded <= memory.placement.resident
        assert only.memory(None, 1, 2, coding) == memory
        found.append(memory)
    assume(found)
    made = planned(target, hardware, device_gib, slots=2)
    assert (made.placement, made.device_ledger) in [(memory.placement, memory.device_ledger) for memory in found]
    others = [plan_time(target, hardware, memory.placement, memory.num_slots) for memory in found]
    assert plan_time(target, hardware, made.placement, made.num_slots) == pytest.approx(min(others))


def plan_time(target: ModelCost, hardware: HardwareProfile, placement: Placement, num_slots: int) -> float:
    """Seconds of a pass over one row."""
    layer_s = float(hardware.times(target, "target", 256, "greedy").layer(1))
    parts = PartTimes(
        copy_s=[layer.stored_bytes / LINK_BYTES_PER_S for layer in target.layers],
        read_s=[0.0] * 80,
        move_s=[0.0] * 80,
        before_s=0.0,
        layer_s=[layer_s] * 80,
        decode_s=hardware.decode_s(target),
        after_s=0.0,
    )
    return float(steady_round(placement, num_slots, parts).round_s)


def test_layers_that_all_fit_as_they_compute_are_not_kept_coded() -> None:
    made = planned(stored_as(0.5), decoding_in(1e-4), 160)
    assert len(made.placement.resident) == 80 and not made.placement.coded
    assert "decoded layer" not in made.device_ledger


def test_where_all_fit_coded_as_many_as_there_is_room_for_are_decoded_for_good() -> None:
    """Nothing is streamed under which decoding could hide."""
    target = stored_as(0.25)
    made = planned(target, decoding_in(1e-3), 60)
    placement = made.placement
    assert len(placement.resident) == 80 and not placement.streamed and made.bytes_per_pass == 0
    assert 0 < len(placement.coded) < 80
    assert 60 * GIB - 0.75 * _RAW.computed_bytes < sum(made.device_ledger.values()) <= 60 * GIB, "one more would not fit"
    assert made.prediction.decode_s == pytest.approx(len(placement.coded) * 1e-3)
    assert made.prediction.pass_s == pytest.approx(made.prediction.compute_s)


def test_as_many_layers_as_were_asked_for_are_resident_coded_only_if_they_must_be() -> None:
    target, hardware = stored_as(0.5), decoding_in(1e-3)
    assert not planned(target, hardware, 48, resident_layers=10).placement.coded
    made = planned(target, hardware, 48, resident_layers=40)
    assert made.placement.coded == made.placement.resident and len(made.placement.resident) == 40
    with pytest.raises(FitError, match="60 coded resident layers"):
        planned(target, hardware, 48, resident_layers=60)


def test_only_layers_that_are_decoded_stay_coded() -> None:
    made = plan(SETTINGS, ROOT, device_gib=24, drafts=(), target=TWO_KINDS)
    assert {TWO_KINDS.layers[layer].is_decoded for layer in made.placement.coded} <= {True}


def test_coded_layers_leave_the_device_one_by_one() -> None:
    """Each frees what is stored of it; where all were there, what slots need."""
    target, hardware = stored_as(0.25), decoding_in(1e-3)
    settings, limits = replace(SETTINGS, max_context=512), budgets(60)
    made = planned(target, hardware, 60)
    workload = make_workload(settings, target, hardware, limits, max_positions=4096)
    fallbacks = Fallbacks(settings=settings, workload=workload, draft=None, budgets=limits)
    plans = [made]
    for _ in range(3):
        smaller = fallbacks.fewer_resident(plans[-1])
        assert smaller is not None
        plans.append(smaller)
    for before, after in itertools.pairwise(plans):
        assert after.placement.coded == before.placement.coded & after.placement.resident
        assert sum(after.device_ledger.values()) < sum(before.device_ledger.values())
    assert plans[1].num_slots > 0 and plans[1].bytes_per_pass == len(plans[1].placement.streamed) * target.slot_bytes


def test_a_decoder_that_was_measured_is_scaled_and_any_other_is_estimated() -> None:
    target = stored_as(0.5, layers=2)
    half = replace(target, layers=(replace(target.layers[0], computed_bytes=_RAW.computed_bytes // 2), _RAW))
    known = decoding_in(0.01)
    assert known.decode_s(target) == pytest.approx((0.01, 0.01)) and known.knows_decoder(target)
    assert known.decode_s(half) == pytest.approx((0.005, 0.0))
    other = replace(target, weights="GPTQ int4")
    moved_bytes = 1.5 * _RAW.computed_bytes
    assert known.decode_s(other) == pytest.approx([DECODE_SWEEPS["cuda"] * moved_bytes / 864e9] * 2)
    assert not known.knows_decoder(other) and not known.knows_decoder(replace(target, dtype_bytes=4))
    assert known.decode_s(LLAMA_2_70B) == () and L40.knows_decoder(LLAMA_2_70B)


def test_measured_decoders_are_kept_in_a_profile_and_one_without_them_is_read() -> None:
    document = to_json(decoding_in(0.01))
    assert from_json(json.loads(json.dumps(document))) == decoding_in(0.01)
    old = {name: value for name, value in document.items() if name != "decoders"}
    assert from_json(old).decoders == ()


@pytest.mark.parametrize(
    "entry", [{}, {"weights": 8}, {"layer_s": -1.0}, {"layer_s": "soon"}, {"computed_bytes": 0}, {"dtype_bytes": 2.0}, 7]
)
def test_a_profile_with_a_decoder_that_is_none_is_refused(entry: object) -> None:
    good = {"weights": "FP8", "dtype_bytes": 2, "computed_bytes": 100, "layer_s": 0.1}
    decoders = [{**good, **entry} if isinstance(entry, dict) and entry else entry]
    with pytest.raises(ValueError, match=r"decoder|layer_s|dtype_bytes"):
        from_json({**to_json(L40), "decoders": decoders})


def test_a_small_layers_decoder_takes_less_than_it_may() -> None:
    layer = LayerCost(stored_bytes=500, computed_bytes=1000, num_parameters=500, kv_bytes_per_row=4, scratch_bytes=1000)
    assert replace(LLAMA_2_70B, layers=(layer,)).workspace_bytes == 6000
    assert LLAMA_2_70B.workspace_bytes == 0


def test_rounds_that_were_slower_make_decoding_slower_and_a_new_look_takes_its_place() -> None:
    target, hardware, limits = stored_as(0.5), decoding_in(0.01), budgets(48)
    made = planned(target, hardware, 48)
    workload = make_workload(SETTINGS, target, hardware, limits, max_positions=4096)
    predicted = made.prediction
    seen = Seen(
        num_rounds=8,
        tokens=1.0,
        round_s=2 * predicted.round_s,
        compute_s=2 * predicted.compute_s,
        draft_s=0.0,
        after_s=predicted.after_s,
        copied_s=made.bytes_per_pass / 25e9,
    )
    corrected, _ = refit(seen, made, workload, None, 1.0)
    assert corrected.decode_s == pytest.approx([0.02] * 80, rel=1e-3)
    anew, _ = measured_anew(SETTINGS, workload, None, decoding_in(0.03))
    assert anew.decode_s == pytest.approx([0.03] * 80) and not anew.decode_is_assumed
    assert measured_anew(SETTINGS, workload, None, L40)[0].decode_is_assumed
