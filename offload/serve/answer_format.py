"""From the engine's steps to the JSON of OpenAI's two interfaces, whole or in chunks. Pure: no clock, no network.

Log-probabilities are the model's own, before temperature, top-k and top-p.
"""

import codecs
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tree.logprobs import ScoredToken

    from ..engine.admission import Request
    from ..engine.generation import Step
    from ..text.tokenizer import Tokenizer

Json = dict[str, Any]

FINISH_REASONS = {"eos": "stop", "stop": "stop", "length": "length"}
LEAST_LOGPROB = -9999.0  # JSON has no infinity


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What every object of one answer carries."""

    id: str
    created: int
    model: str

    def document(self, kind: str, choices: list[Json]) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


@dataclass(slots=True, kw_only=True)
class Choice:
    """One request's answer as it grows."""

    request: "Request"
    text: str = ""
    finish_reason: str | None = None
    scores: "list[ScoredToken]" = field(default_factory=list)
    prompt_scores: "tuple[ScoredToken, ...]" = ()
    num_tokens: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    num_reused: int = 0

    def add(self, step: "Step", num_reused: int) -> None:
        self.text += step.text
        self.finish_reason = FINISH_REASONS[step.finish_reason] if step.finish_reason else None
        self.scores += step.scores
        self.prompt_scores += step.prompt_scores
        self.num_reused = num_reused
        self.num_tokens += len(step.token_ids)
        self.num_drafted += step.shape.num_nodes - 1
        self.num_accepted += min(len(step.verdict.path) - 1, len(step.token_ids))


def usage(choices: Sequence[Choice], choices_per_prompt: int) -> Json:
    """Counts of tokens. A prompt with several answers is counted once."""
    prompt = sum(len(choice.request.prompt) for choice in choices[::choices_per_prompt])
    completion = sum(choice.num_tokens for choice in choices)
    accepted, drafted = (sum(getattr(choice, name) for choice in choices) for name in ("num_accepted", "num_drafted"))
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(choice.num_reused for choice in choices[::choices_per_prompt])},
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": drafted - accepted,
        },
    }


def spelling(tokenizer: "Tokenizer", token_id: int, prefix: str = "") -> str:
    """One token as OpenAI writes it: its text, or, for a part of a character, `prefix` and its bytes, \\xe2\\x80. So tokens
    that differ read differently."""
    if tokenizer.is_special(token_id):
        return tokenizer.token_text(token_id)
    spelt = tokenizer.token_bytes(token_id)
    try:
        return spelt.decode()
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in spelt)


class Offsets:
    """Where tokens begin in their text, in characters, as they come. A character belongs to the token that completes it."""

    def __init__(self, begin: int = 0) -> None:
        self._decoder, self._at = codecs.getincrementaldecoder("utf-8")("replace"), begin

    def of(self, tokens: Sequence[bytes]) -> list[int]:
        return [self._step(token) for token in tokens]

    def _step(self, token: bytes) -> int:
        goes_on = not token or 0x80 <= token[0] < 0xC0  # else what was begun before stays a broken character
        self._at += 0 if goes_on else len(self._decoder.decode(b"", final=True))
        begun = max(self._at, 0)
        self._at += len(self._decoder.decode(token))
        return begun


# -- chat -----------------------------------------------------------------------------------------------------------------


class ChatFormat:
    """Chunks and answer of /v1/chat/completions."""

    def __init__(self, header: Header, tokenizer: "Tokenizer", *, with_logprobs: bool) -> None:
        self.header, self._tokenizer, self._with_logprobs = header, tokenizer, with_logprobs

    def opening(self, choices: Sequence[Choice]) -> Iterator[Json]:
        for index in range(len(choices)):
            yield self._chunk(index, {"role": "assistant", "content": ""}, None, None)

    def chunk(self, index: int, choice: Choice, step: "Step") -> Json:
        logprobs = self._logprobs(step.scores) if self._with_logprobs else None
        return self._chunk(index, {"content": step.text} if step.text else {}, logprobs, choice.finish_reason)

    def closing(self, counts: Json) -> Json:
        return {**self.header.document("chat.completion.chunk", []), "usage": counts}

    def whole(self, choices: Sequence[Choice], counts: Json) -> Json:
        documents = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": self._logprobs(choice.scores) if self._with_logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(choices)
        ]
        return {**self.header.document("chat.completion", documents), "usage": counts}

    def _chunk(self, index: int, delta: Json, logprobs: Json | None, reason: str | None) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self.header.document("chat.completion.chunk", [choice])

    def _logprobs(self, scores: "Sequence[ScoredToken]") -> Json:
        return {
            "content": [
                {
                    **self._token(score.token_id, score.logprob),
                    "top_logprobs": [self._token(token_id, logprob) for token_id, logprob in score.top],
                }
                for score in scores
            ]
        }

    def _token(self, token_id: int, logprob: float) -> Json:
        spelt = None if self._tokenizer.is_special(token_id) else list(self._tokenizer.token_bytes(token_id))
        return {"token": spelling(self._tokenizer, token_id), "logprob": max(logprob, LEAST_LOGPROB), "bytes": spelt}


# -- completions ----------------------------------------------------------------------------------------------------------


class CompletionFormat:
    """Chunks and answer of /v1/completions. `echo` puts the prompt in front; with `num_new` 0 nothing stands behind it."""

    def __init__(
        self,
        header: Header,
        tokenizer: "Tokenizer",
        *,
        with_logprobs: bool,
        echo: bool,
        num_new: int,
        prompt_texts: Sequence[str],
    ) -> None:
        self.header, self._tokenizer, self._with_logprobs = header, tokenizer, with_logprobs
        self._echo, self._num_new, self._prompt_texts = echo, num_new, prompt_texts
        self._offsets: dict[int, Offsets] = defaultdict(Offsets)

    def opening(self, choices: Sequence[Choice]) -> Iterator[Json]:
        return iter(())

    def chunk(self, index: int, choice: Choice, step: "Step") -> Json:
        first = choice.num_tokens == len(step.token_ids)
        fresh = Choice(request=choice.request, finish_reason=choice.finish_reason)
        fresh.text, fresh.scores, fresh.prompt_scores = step.text, list(step.scores), step.prompt_scores
        return self.header.document("text_completion", [self._choice(index, fresh, echo=self._echo and first)])

    def closing(self, counts: Json) -> Json:
        return {**self.header.document("text_completion", []), "usage": counts}

    def whole(self, choices: Sequence[Choice], counts: Json) -> Json:
        documents = [self._choice(index, choice, echo=self._echo) for index, choice in enumerate(choices)]
        return {**self.header.document("text_completion", documents), "usage": counts}

    def _choice(self, index: int, choice: Choice, *, echo: bool) -> Json:
        text = (self._prompt_texts[index] if echo else "") + (choice.text if self._num_new else "")
        logprobs = self._logprobs(index, choice, echo=echo) if self._with_logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": choice.finish_reason}

    def _logprobs(self, index: int, choice: Choice, *, echo: bool) -> Json:
        """Parallel lists. The prompt's first token has null, as nothing predicts it."""
        scores = [*(choice.prompt_scores if echo else ()), *(choice.scores if self._num_new else ())]
        token_ids = [*(choice.request.prompt[:1] if echo else ()), *(score.token_id for score in scores)]
        values: list[float | None] = [max(score.logprob, LEAST_LOGPROB) for score in scores]
        tops: list[dict[str, float] | None] = [self._top(score) for score in scores]
        if echo:
            values.insert(0, None)
            tops.insert(0, None)
        if echo:  # a text lacks the space that some tokenizers put before its first word
            prompt = b"".join(self._tokenizer.token_bytes(token_id) for token_id in choice.request.prompt)
            self._offsets[index] = Offsets(len(self._prompt_texts[index]) - len(prompt.decode(errors="replace")))
        offsets = self._offsets[index].of([self._tokenizer.token_bytes(token_id) for token_id in token_ids])
        return {
            "tokens": [self._spelling(token_id) for token_id in token_ids],
            "token_logprobs": values,
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def _top(self, score: "ScoredToken") -> dict[str, float]:
        """Log-probability by spelling. Tokens that are spelt alike are rare; of those the most probable counts."""
        top: dict[str, float] = {}
        for token_id, logprob in (*score.top, (score.token_id, score.logprob)):
            top.setdefault(self._spelling(token_id), max(logprob, LEAST_LOGPROB))
        return top

    def _spelling(self, token_id: int) -> str:
        return spelling(self._tokenizer, token_id, "bytes:")


Format = ChatFormat | CompletionFormat
