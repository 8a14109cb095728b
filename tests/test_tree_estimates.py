"""What children are worth: sharpened, counted, and never by the value of what was drawn."""

import numpy as np
import pytest

from tree.acceptance import Acceptance, Context
from tree.estimates import MAX_CHILDREN, Estimates, _sharpened

ROW = np.array([[0.3, 0.2, 0.1, 0.05]])


def test_sharpening_is_a_power_renormalised() -> None:
    assert _sharpened(ROW, (), 1.0)[0] == pytest.approx(ROW)
    rest = 0.35 / 0.05 * 0.05**2  # seven more tokens like the last
    assert _sharpened(ROW, (), 2.0)[0] == pytest.approx(ROW**2 / ((ROW**2).sum() + rest))
    shares, beside = _sharpened(ROW, [[0.25]], 2.0)
    whole = (ROW**2).sum() + 0.25**2 + 0.1 / 0.05 * 0.05**2
    assert shares == pytest.approx(ROW**2 / whole) and beside[0] == pytest.approx([0.25**2 / whole])


@pytest.mark.parametrize("row", [[1.0, 0.0, 0.0], [1e-30, 1e-40, 0.0], [0.5, 0.5, 0.0]])
def test_estimates_are_probabilities(row: list[float]) -> None:
    shares, beside = Estimates().chosen(np.array([row]), [[0.0, 1e-35]])
    assert np.isfinite(shares).all() and (shares >= 0).all() and (np.diff(shares) <= 0).all() and shares.max() <= 1
    assert all(0 <= share <= 1 for share in beside[0])


def test_a_target_that_takes_what_the_draft_thinks_likeliest_makes_it_surer() -> None:
    estimates = Estimates()
    before = estimates.chosen(ROW)[0][0, 0]
    for _ in range(60):
        estimates.count_chosen(ROW[0].tolist(), 0)
        estimates.end_verdict()
    assert estimates.chosen(ROW)[0][0, 0] > max(before, 0.9)
    assert estimates.best > 0.8


def test_a_target_that_samples_leaves_the_draft_as_sure_as_it_is() -> None:
    estimates = Estimates()
    for number in range(400):
        place = number * 7 % 20
        estimates.count_chosen(ROW[0].tolist(), 0 if place < 6 else 1 if place < 10 else 2 if place < 12 else None)
        estimates.end_verdict()
    assert estimates.chosen(ROW)[0][0, :3] == pytest.approx(ROW[0, :3], abs=0.05)


def test_what_is_drawn_goes_by_the_rank_and_by_how_sure_the_draft_is() -> None:
    estimates = Estimates(Acceptance(((0.5, 0.2),), contexts=(Context(0.5, 0.5, (0.3, 0.2)), Context(1.0, 0.5, (0.9, 0.05)))))
    low, high = estimates.drawn(np.array([0.2, 0.95]), MAX_CHILDREN)  # if those before were not accepted
    assert low[:2] == pytest.approx((0.3, 0.2 / 0.7)) and high[:2] == pytest.approx((0.9, 0.5))
    for _ in range(200):
        estimates.count_drawn(0.2, [0.1, 0.1, 0.1], False)
        estimates.count_drawn(0.95, [0.9], True)
        estimates.end_verdict()
    low, high = estimates.drawn(np.array([0.2, 0.95]), MAX_CHILDREN)
    assert low[:3].max() < 0.1 and high[0] > 0.95


def test_what_was_drawn_goes_by_what_it_was_drawn_with() -> None:
    estimates = Estimates(Acceptance(((0.5, 0.2),)))
    assert estimates.taken(0, 0.1) == estimates.taken(0, 0.9) == pytest.approx(0.5)
    for number in range(200):
        estimates.count_drawn(0.5, [0.1], number % 5 == 0)
        estimates.count_drawn(0.5, [0.9], True)
        estimates.end_verdict()
    assert estimates.taken(0, 0.1) < 0.3 and estimates.taken(0, 0.9) > 0.9
    assert estimates.drawn(np.array([0.5]), 1)[0, 0] == pytest.approx(0.6, abs=0.05)  # before it is known which


def test_finds_of_a_bin_are_counted_together() -> None:
    estimates = Estimates()
    assert estimates.found(0, 3, 0.4) == pytest.approx(0.4)
    for _ in range(50):
        estimates.count_found(0, 3, 0.4, True)
    assert estimates.found(0, 3, 0.4) > 0.9
    assert estimates.found(1, 3, 0.4) == pytest.approx(0.4)


def test_a_find_goes_by_what_its_kind_is_worth_and_by_what_the_draft_thinks_of_it() -> None:
    estimates = Estimates()
    for least, most in (((0.1, 0.5), (0.9, 0.5)), ((0.5, 0.1), (0.5, 0.9))):
        assert 0 < estimates.mixed(*least) < estimates.mixed(*most) < 1
    for one in (0.0, 1.0):
        assert 0 < estimates.mixed(one, one) < 1
    for _ in range(400):  # the draft is always right, and finds of this kind half of the time
        estimates.count_mixed(0.5, 0.95, True)
        estimates.count_mixed(0.5, 0.05, False)
    assert estimates.mixed(0.5, 0.95) > 0.95 and estimates.mixed(0.5, 0.05) < 0.05


def test_what_a_tree_was_worth_is_expected_of_the_next() -> None:
    estimates = Estimates()
    for _ in range(20):
        estimates.count_worth(64, 0.003, sampled=True)
    assert estimates.worth(64, sampled=True) == pytest.approx(0.003)
    assert estimates.worth(64, sampled=False) == estimates.worth(256, sampled=True) > 0.01


def test_chosen_children_begin_with_what_the_acceptance_says_of_their_rank() -> None:
    """And verdicts outweigh it: a draft that is nearly always right goes deep from its first tree on, one that is not soon
    stops doing so."""
    rows = np.array([[0.3, 0.2, 0.1]])
    sure, unsure = (Estimates(Acceptance((vector,))) for vector in ((0.998, 0.001), (0.4, 0.2, 0.1)))
    assert sure.chosen(rows)[0][0, 0] == pytest.approx(0.998, abs=1e-3) and unsure.chosen(rows)[0][0, 0] < 0.5
    assert sure.best > 0.99
    by_context = Acceptance(((0.4,),), contexts=(Context(0.5, 0.5, (0.2, 0.1)), Context(1.0, 0.5, (0.9, 0.05))))
    assert Estimates(by_context).chosen(rows)[0][0, 0] < 0.3
    for _ in range(200):
        sure.count_chosen(rows[0].tolist(), None)
        sure.end_verdict()
    assert sure.chosen(rows)[0][0, 0] < 0.6
