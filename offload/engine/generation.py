"""One request being answered: it takes in what passes bring its text, token by token, to an exact end."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from time import monotonic
from typing import TYPE_CHECKING

import torch

from tree.logprobs import ScoredToken, Scoring
from tree.shape import TreeShape
from tree.verify import Verdict

from ..report.report import Report
from ..report.stats import PassStats, RunStats
from ..text.incremental import TextStream
from .admission import Request
from .decode import Outcome, StepResult

if TYPE_CHECKING:
    from .engine import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one pass over the tree `shape` added: tokens, and the text that has become final with them. `finish_reason` is
    None but at the end. Scores and `tops` as in StepResult, the scores of these tokens only."""

    shape: TreeShape
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str | None
    verdict: Verdict
    stats: PassStats
    scores: tuple[ScoredToken, ...]
    prompt_scores: tuple[ScoredToken, ...]
    tops: torch.Tensor | None = None


class Generation:
    """One request being answered: an iterator of Steps, one per pass. `result` may be asked for at any time.

    The engine is held for a pass and not between passes: other requests may be answered there, or beside this one, and this
    one goes on from the tokens that it has, with its own randomness. Any thread may ask for the next step.
    """

    def __init__(self, engine: "Engine", request: Request, generator: torch.Generator) -> None:
        self._engine, self.request, self.generator = engine, request, generator
        self._text = TextStream(engine.tokenizer, request.stop, request.prompt) if engine.tokenizer is not None else None
        self.token_ids: list[int] = []
        self.finish_reason = "interrupted"
        self.stats = RunStats(load_s=engine.load_s)
        self.outcome: Outcome = None  # of a pass, until the next step is asked for
        self.has_joined = False
        self.left: object = None  # by the drafter, for a text that has given its place up
        self._is_over = False
        self._previous_s: float | None = None

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        with self._engine.turn:
            if self._is_over:
                raise StopIteration
            self._is_over = True  # unless this step ends well, and is not the last
            try:
                step = self._next_step()
                self._is_over = step.finish_reason is not None
            finally:
                if self._is_over:
                    self._engine.leave(self)
            return step

    @property
    def text(self) -> str | None:
        """The text so far; None when the model has no tokenizer."""
        return self._text.text if self._text is not None else None

    @property
    def text_ids(self) -> tuple[int, ...]:
        """The prompt and the tokens so far."""
        return (*self.request.prompt, *self.token_ids)

    @property
    def tokens_left(self) -> int:
        """That the answer may still get."""
        return self.request.max_new_tokens - len(self.token_ids)

    @property
    def scoring(self) -> Scoring | None:
        """What is still to be scored: the prompt once."""
        scoring = self.request.scoring
        return replace(scoring, prompt=False) if scoring is not None and self.stats.passes else scoring

    def stop(self) -> str:
        """End here, as after an interruption; the text that was held back for want of certainty."""
        with self._engine.turn:
            self._is_over = True
            self._engine.leave(self)
            return self._text.finish() if self._text is not None else ""

    def result(self) -> Report:
        return Report(
            text=self.text,
            prompt_token_ids=self.request.prompt,
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason,
            stats=self.stats,
            plan=self._engine.plan,
            verifier="greedy" if self.request.params.greedy else self._engine.method,
            memory=self._engine.memory(),
            emulated_link=self._engine.emulated_link,
            device_name=self._engine.device_name,
            weights=self._engine.weights,
        )

    def _next_step(self) -> Step:
        start_s = monotonic() if self._previous_s is None else self._previous_s
        self._engine.advance(self)
        outcome, self.outcome = self.outcome, None
        if not isinstance(outcome, StepResult):
            assert outcome is not None
            raise outcome
        token_ids, text, reason = self._accept(outcome)
        if reason is not None:
            self.finish_reason = reason
            text += self._text.finish() if self._text is not None else ""
        self._previous_s = monotonic()
        self.stats.add(outcome.stats, len(token_ids), self._previous_s - start_s)
        return Step(
            shape=outcome.shape,
            token_ids=token_ids,
            text=text,
            finish_reason=reason,
            verdict=outcome.verdict,
            stats=outcome.stats,
            scores=outcome.scores[: len(token_ids)],
            prompt_scores=outcome.prompt_scores,
            tops=outcome.tops,
        )

    def _accept(self, result: StepResult) -> tuple[tuple[int, ...], str, str | None]:
        """Take tokens one by one until something ends the text, be it in the middle of the accepted path."""
        request, text, taken = self.request, "", 0
        reason = None
        for token_id in result.token_ids:
            self.token_ids.append(token_id)
            taken += 1
            if token_id in request.stop_token_ids:
                reason = "stop"
                break
            if self._text is not None:
                text += self._text.push(token_id)
                if self._text.stopped:
                    reason = "stop"
                    break
            if token_id in self._engine.eos_token_ids and not request.ignore_eos:
                reason = "eos"
                break
            if len(self.token_ids) == request.max_new_tokens:
                reason = "length"
                break
        return result.token_ids[:taken], text, reason
