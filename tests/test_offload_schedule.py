"""The schedule by its invariants, for every small (layers, resident, slots)."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.streaming.schedule import Compute, Decode, Fetch, first_fetches, pass_steps
from offload.weights.placement import shared_out, spread_evenly, spread_order

# Layers, those that are streamed, slots, those that are decoded.
shapes = st.integers(1, 12).flatmap(
    lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)), st.integers(1, 5), st.sets(st.integers(0, n - 1)))
)
Shape = tuple[int, set[int], int, set[int]]


@given(shapes)
def test_every_pass_computes_every_layer_in_order_from_the_slot_that_holds_it(shape: Shape) -> None:
    """Or out of the scratch, if the layer was decoded there since the last one was used, out of a slot or where it is kept."""
    num_layers, streamed_set, num_slots, decoded = shape
    streamed = tuple(sorted(streamed_set))
    slots: dict[int, int | None] = dict.fromkeys(range(num_slots))
    for fetch in first_fetches(streamed, num_slots):
        slots[fetch.slot] = fetch.layer
    for number in range(4):
        steps, scratch = pass_steps(num_layers, streamed, num_slots, number, decoded), None
        assert [step.layer for step in steps if isinstance(step, Compute)] == list(range(num_layers))
        for step in steps:
            if isinstance(step, Fetch):
                slots[step.slot] = step.layer
            elif isinstance(step, Decode):
                assert (step.slot is None) == (step.layer not in streamed_set) and scratch is None
                assert step.slot is None or slots[step.slot] == step.layer
                scratch = step.layer
            elif step.slot is None:
                assert (scratch == step.layer) if step.layer in decoded else step.layer not in streamed
                scratch = None
            else:
                assert slots[step.slot] == step.layer not in decoded


@given(shapes)
def test_a_fetch_goes_only_into_the_slot_that_was_just_used_and_at_once(shape: Shape) -> None:
    """Behind a layer that is decoded out of it, before that is computed."""
    num_layers, streamed_set, num_slots, decoded = shape
    for number in range(3):
        steps = pass_steps(num_layers, tuple(sorted(streamed_set)), num_slots, number, decoded)
        for before, step in pairwise(steps):
            frees_slot = isinstance(before, Decode | Compute) and before.slot is not None
            assert frees_slot == isinstance(step, Fetch)
            if isinstance(step, Fetch) and isinstance(before, Decode | Compute):
                assert before.slot == step.slot
        assert not steps or not isinstance(steps[-1], Decode)
        assert sum(isinstance(step, Fetch) for step in steps) == len(streamed_set)


def test_the_link_is_never_asked_for_less_than_it_can_hold() -> None:
    """Between passes as many fetches are under way as there are slots: the wrap-around."""
    streamed, num_slots = (0, 2, 3, 5), 2
    issued = len(first_fetches(streamed, num_slots))
    used = 0
    for number in range(3):
        for step in pass_steps(6, streamed, num_slots, number):
            issued += isinstance(step, Fetch)
            used += isinstance(step, Compute) and step.slot is not None
            assert issued - used in (num_slots - 1, num_slots)
    assert issued - used == num_slots


@pytest.mark.parametrize("num_layers", [1, 2, 7, 80])
def test_resident_layers_are_spread_as_evenly_as_can_be(num_layers: int) -> None:
    for num_chosen in range(num_layers + 1):
        chosen = sorted(spread_evenly(num_chosen, num_layers))
        assert len(chosen) == num_chosen
        gaps = {after - before for before, after in pairwise(chosen)}
        assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("num_layers", [0, 1, 2, 7, 12, 80])
def test_every_end_of_the_order_of_pinning_is_spread_about_evenly(num_layers: int) -> None:
    """Gaps differ by a factor of two at most, and no layer is left out."""
    order = spread_order(num_layers)
    assert sorted(order) == list(range(num_layers))
    for num_chosen in range(2, num_layers + 1):
        for chosen in (sorted(order[:num_chosen]), sorted(order[-num_chosen:])):
            gaps = [after - before for before, after in pairwise(chosen)]
            assert max(gaps) <= 2 * min(gaps)


@given(st.integers(0, 200), st.sets(st.integers(0, 79)))
def test_other_work_is_shared_out_to_the_layers_as_evenly_as_can_be(num_steps: int, layers: set[int]) -> None:
    found = shared_out(num_steps, sorted(layers))
    assert set(found) == layers and sum(found.values()) == (num_steps if layers else 0)
    assert not found or max(found.values()) - min(found.values()) <= 1
