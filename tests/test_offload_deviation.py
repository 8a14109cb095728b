"""After a run: which term of the prediction was off."""

from dataclasses import replace

import pytest

from offload.planner.prediction import Prediction
from offload.report.deviation import deviation
from offload.report.stats import PassStats

EXPECTED = Prediction(
    expected_tokens=5.0, pass_s=1.0, exposed_pass_s=0.9, compute_s=0.4, draft_s=0.1, after_s=0.05, round_s=1.0
)


def rounds(
    *, tokens: int = 5, round_s: float = 1.0, draft_s: float = 0.1, compute_s: float = 0.4, copied_s: float = 1.0
) -> list[PassStats]:
    one = PassStats(
        num_rows=8,
        num_nodes=8,
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


def test_a_run_without_a_draft_does_not_blame_it() -> None:
    """What the host does between two passes was called the draft's time."""
    plain = replace(EXPECTED, draft_s=0.0)
    found = deviation(plain, rounds(round_s=1.4, draft_s=0.4, compute_s=0.3), 10**9, 1e9)
    assert found is not None and found.term is None and found.advice is None


@pytest.mark.parametrize(("tokens", "how"), [(3, "less well"), (8, "better")])
def test_what_the_draft_guessed_otherwise_is_told_in_tokens_a_pass(tokens: int, how: str) -> None:
    """Not the machine's doing: whoever runs the bundled pair first reads this."""
    found = deviation(EXPECTED, rounds(tokens=tokens), 10**9, 1e9)
    assert (
        found is not None
        and f"guessed {how} than where its acceptance was measured: {tokens} tokens a pass, expected 5" in found.text()
    )


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
    assert ("--acceptance FILE" if term == "acceptance" else "profile hardware") in (found.advice or "")
