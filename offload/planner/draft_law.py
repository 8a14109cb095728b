"""Pure: why one draft beats another: seconds per token as the terms that a plan predicts for each.

The law is that of Decoding Speculative Decoding (arXiv 2402.01528): a draft is worth its latency times its acceptance, not its
quality as a model. s/token = (levels x seconds of a level + seconds of a pass) / tokens per pass; what hides under the stream
is taken off.
"""

from dataclasses import dataclass
from typing import Literal

from .plan import Plan

Limit = Literal["link", "compute", "drafting"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftTerms:
    """One draft with the tree that is best for it, in seconds. `levels` are passes of the draft in a round, `level_s` of one of
    them; `hidden_s` of drafting takes no time, as layers arrive meanwhile. `pass_s` is the target's pass and the
    verification. `limit` is what the round would have to lose for the greatest gain."""

    name: str
    num_nodes: int
    levels: int
    tokens_per_pass: float
    level_s: float
    hidden_s: float
    pass_s: float
    s_per_token: float
    limit: Limit

    @property
    def draft_s(self) -> float:
        return self.levels * self.level_s

    @property
    def law_s_per_token(self) -> float:
        """As if nothing hid under anything."""
        return (self.draft_s + self.pass_s) / self.tokens_per_pass


def terms_of(name: str, plan: Plan) -> DraftTerms:
    """Of a plan that was made for the draft `name` alone, or for n-grams, whose look-ups count as no level."""
    predicted = plan.prediction
    draft_s, pass_s = predicted.draft_s, predicted.pass_s + predicted.after_s
    hidden_s = min(max(draft_s + pass_s - predicted.round_s, 0.0), draft_s)
    levels = plan.tree.num_levels - 1 if plan.draft is not None else 0
    link_s = plan.bytes_per_pass / plan.link_bytes_per_s if plan.link_bytes_per_s else 0.0
    streaming: Limit = "link" if link_s > predicted.compute_s else "compute"
    return DraftTerms(
        name=name,
        num_nodes=plan.tree.num_nodes,
        levels=levels,
        tokens_per_pass=predicted.expected_tokens,
        level_s=draft_s / levels if levels else 0.0,
        hidden_s=hidden_s,
        pass_s=pass_s,
        s_per_token=predicted.s_per_token,
        limit="drafting" if draft_s - hidden_s > pass_s else streaming,
    )
