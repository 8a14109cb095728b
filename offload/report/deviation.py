"""Pure: a run's seconds per token beside what was predicted, and the term of the prediction that is to blame."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .stats import PassStats

if TYPE_CHECKING:  # numpy, which commands that only name a commit need not wait for
    from ..planner.prediction import Prediction

TOLERANCE = 0.10  # of the predicted seconds per token
ACCEPTANCE, COMPUTE, DRAFT, LINK = "acceptance", "compute (s a pass)", "draft (s a pass)", "link (GB/s)"
_MACHINE = (
    "the machine was looked at for seconds, or had other work: `profile hardware` takes longer, --profile FILE plans with it"
)
ADVICE = {
    ACCEPTANCE: "which changes how fast a text comes, and not the text: --record-acceptance FILE with texts like this one, "
    "then --acceptance FILE, plans for them",
    COMPUTE: _MACHINE,
    DRAFT: _MACHINE,
    LINK: f"{_MACHINE}; `doctor` looks at the link",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Deviation:
    """`share` of the prediction by which the run was slower (positive) or quicker; `term` explains most of it, None when
    none of the terms went that way."""

    share: float
    term: str | None
    predicted: float
    measured: float

    def text(self) -> str:
        text = f"{abs(self.share) * 100:.0f} % {'slower' if self.share > 0 else 'quicker'} than predicted"
        if self.term is None:
            return text
        if self.term == ACCEPTANCE:
            how = "less well" if self.measured < self.predicted else "better"
            return (
                f"{text}, mostly as the draft guessed {how} than where its acceptance was measured: "
                f"{self.measured:.3g} tokens a pass, expected {self.predicted:.3g}"
            )
        return f"{text}, mostly by {self.term}: {self.measured:.3g}, expected {self.predicted:.3g}"

    @property
    def advice(self) -> str | None:
        """What it means for who reads it, and what would predict better."""
        return ADVICE[self.term] if self.term is not None else None


def deviation(
    prediction: "Prediction", rounds: Sequence[PassStats], bytes_per_pass: int, link: float | None
) -> Deviation | None:
    """None when steady `rounds` (the first one left out by the caller) took what was predicted, within TOLERANCE, or when
    there are none. Each term's share is what the seconds per token would change by, were it alone as measured."""
    if not rounds:
        return None
    tokens = sum(one.emitted_tokens for one in rounds) / len(rounds)
    round_s = _mean([one.round_s for one in rounds])
    share = round_s / tokens / prediction.s_per_token - 1.0
    if abs(share) <= TOLERANCE:
        return None
    expected = prediction.expected_tokens
    compute_s = _mean([one.compute_s for one in rounds])
    draft_s = _mean([one.draft_s for one in rounds])
    terms = {
        ACCEPTANCE: (expected, tokens, round_s / tokens - round_s / expected),
        COMPUTE: (prediction.compute_s, compute_s, (compute_s - prediction.compute_s) / expected),
    }
    if prediction.draft_s > 0:  # without a draft it is what the host does between two passes
        terms[DRAFT] = (prediction.draft_s, draft_s, (draft_s - prediction.draft_s) / expected)
    copied_s = _mean([one.copied_s for one in rounds])
    if link and bytes_per_pass and copied_s:
        rate = bytes_per_pass / copied_s
        terms[LINK] = (link / 1e9, rate / 1e9, (copied_s - bytes_per_pass / link) / expected)
    sign = 1.0 if share > 0 else -1.0
    term = max(terms, key=lambda name: sign * terms[name][2])
    predicted, measured, by = terms[term]
    return Deviation(share=share, term=term if sign * by > 0 else None, predicted=predicted, measured=measured)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
