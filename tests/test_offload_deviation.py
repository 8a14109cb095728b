"""After a run: which term of the prediction was off."""

import pytest

from offload.deviation import deviation
from offload.planner.rounds import Prediction
from offload.stats import PassStats

EXPECTED = Prediction(
    expected_tokens=5.0, pass_s=1.0, exposed_pass_s=0.9, compute_s=0.4, draft_s=0.1, after_s=0.05, round_s=1.0
)


def rounds(
    *, tokens: int = 5, round_s: float = 1.0, draft_s: float = 0.1, compute_s: float = 0.4, copied_s: float = 1.0
) -> list[PassStats]:
    one = PassStats(
        num_rows=8,
        emitted_tokens=tokens,
        bytes_streamed=10**9,
        draft_s=draft_s,
        pass_s=0.9,
        verify_s=0.05,
        round_s=round_s,
        stall_s=0.9 - compute_s,
        stall_by_layer_s=(),
        copied_s=copied_s,
    )
    return [one] * 3


def test_within_a_tenth_there_is_nothing_to_say() -> None:
    assert deviation(EXPECTED, rounds(round_s=1.09), 10**9, 1e9) is None
    assert deviation(EXPECTED, [], 10**9, 1e9) is None


def test_no_term_is_blamed_that_went_the_other_way() -> None:
    """All terms as predicted, and yet the round was quicker."""
    found = deviation(EXPECTED, rounds(round_s=0.7), 10**9, 1e9)
    assert found is not None and found.term is None
    assert found.text() == "30 % quicker than predicted"


@pytest.mark.parametrize(
    ("changes", "term"),
    [
        ({"tokens": 3}, "acceptance"),
        ({"tokens": 8}, "acceptance"),
        ({"round_s": 1.4, "copied_s": 1.4}, "link"),
        ({"round_s": 1.3, "draft_s": 0.4}, "draft"),
        ({"round_s": 1.4, "compute_s": 0.8}, "compute"),
        ({"round_s": 0.7, "copied_s": 0.7}, "link"),
    ],
)
def test_the_term_that_explains_most_is_named(changes: dict[str, float], term: str) -> None:
    found = deviation(EXPECTED, rounds(**changes), 10**9, 1e9)  # type: ignore[arg-type]
    assert found is not None and found.term is not None and found.term.startswith(term)
    assert ("slower" if found.share > 0 else "quicker") in found.text()
