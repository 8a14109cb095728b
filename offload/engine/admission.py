"""What a planned model will take: prompts become token ids, and requests that could not be finished are refused before they
cost anything, on the command line even before the weights are read."""

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tree.logprobs import Scoring
from tree.sampling import SamplingParams

from ..errors import FitError, UsageError
from ..planner.plan import Plan
from ..text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to generate. `stop` strings and `stop_token_ids` end the text before them; every EOS id ends it unless `ignore_eos`.
    `scoring` asks for log-probabilities, None for none. `keeps_plan`: what is sampled with a seed that somebody named depends
    on the tree, which stays as it is while this is answered."""

    prompt: tuple[int, ...]
    max_new_tokens: int = 128
    params: SamplingParams = field(default_factory=SamplingParams)
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    scoring: Scoring | None = None
    keeps_plan: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """`seed` is that of requests which name none."""

    plan: Plan
    tokenizer: Tokenizer | None
    vocab_size: int
    seed: int

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text. UsageError when the model has no tokenizer."""
        if self.tokenizer is None:
            raise UsageError(
                "the model folder has no tokenizer", where="--prompt", cure="give token ids with --prompt-ids 1,2,3"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"the prompt is not Unicode: {error}", where="--prompt", cure="leave lone surrogates out"
            ) from error
        return self.tokenizer.encode(text)

    def request(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        ignore_eos: bool = False,
        scoring: Scoring | None = None,
        seed_is_chance: bool = False,
    ) -> Request:
        """A request that can be finished. UsageError for values that make no sense, FitError with the counts for a prompt
        and an answer that do not fit into the context. One `stop` string need not be in a list, and an empty one stops
        nothing, as a `top_k` of 0 or -1, which other programs have for None, leaves no token out. A `seed` of nobody's choice
        is chance."""
        top_k = None if top_k is None else _whole_numbers([top_k], "--top-k")[0]
        try:
            params = SamplingParams(
                temperature=_number(temperature, "--temperature"),
                top_k=None if top_k in (0, -1) else top_k,
                top_p=_number(top_p, "--top-p"),
            )
        except ValueError as error:
            raise UsageError(str(error), where="--temperature, --top-k, --top-p", cure="see `generate --help`") from error
        request = Request(
            prompt=tuple(self.encode(prompt)) if isinstance(prompt, str) else _token_ids(prompt),
            max_new_tokens=_whole_numbers([max_new_tokens], "--max-new-tokens")[0],
            params=params,
            seed=self.seed if seed is None else _whole_numbers([seed], "--seed")[0],
            stop=_stop_strings(stop),
            stop_token_ids=frozenset(stop_token_ids),
            ignore_eos=ignore_eos,
            scoring=scoring,
            keeps_plan=not params.greedy and seed is not None and not seed_is_chance,
        )
        self._check_values(request)
        self._check_room(request)
        return request

    def _check_values(self, request: Request) -> None:
        if not request.prompt:
            raise UsageError("the prompt has no tokens", where="--prompt", cure="give at least one token")
        outside = [token_id for token_id in request.prompt if not 0 <= token_id < self.vocab_size]
        if outside:
            raise UsageError(
                f"token id {outside[0]} is outside the vocabulary of {self.vocab_size} tokens",
                where="--prompt-ids",
                cure=f"give ids from 0 to {self.vocab_size - 1}",
            )
        if request.max_new_tokens < 1:
            raise UsageError(f"{request.max_new_tokens} is too few", where="--max-new-tokens", cure="give at least 1")
        if not 0 <= request.seed < 2**63:
            raise UsageError(f"{request.seed} is not a seed", where="--seed", cure="give a number from 0 to 2**63 - 1")
        if request.stop and self.tokenizer is None:
            raise UsageError("stop strings need a tokenizer", where="--stop", cure="leave --stop out")

    def _check_room(self, request: Request) -> None:
        plan, num_prompt = self.plan, len(request.prompt)
        if num_prompt + request.max_new_tokens > plan.text_tokens:
            raise FitError(
                f"prompt {num_prompt} + new {request.max_new_tokens} + tree {plan.room_nodes - 1} tokens > "
                f"{min(plan.context_rows, plan.max_positions + plan.room_nodes - 1)} rows of context",
                where="--max-new-tokens, --max-context",
                cure=", or ".join(_ways_out(plan, num_prompt)),
            )


def check_positions(num_prompt: int, num_new: int, max_positions: int) -> None:
    """FitError for a text that no plan makes room for, as the model knows fewer positions: before anything is measured for
    a text of that length."""
    if num_prompt + num_new > max_positions:
        fewer = f"ask for at most {max_positions - num_prompt} new tokens, or " if num_prompt < max_positions else ""
        raise FitError(
            f"prompt {num_prompt} + new {num_new} tokens > {max_positions} positions",
            where="--prompt, --max-new-tokens",
            cure=f"{fewer}shorten the prompt: the model itself knows {max_positions} positions",
        )


def _ways_out(plan: Plan, num_prompt: int) -> Iterator[str]:
    """Of a context that is too short for what was asked."""
    if num_prompt < plan.text_tokens:
        yield f"ask for at most {plan.text_tokens - num_prompt} new tokens"
    knows = f"the model itself knows {plan.max_positions} positions"
    if plan.text_tokens < plan.max_positions:
        yield "shorten the prompt"
        yield f"raise --max-context ({knows})"
    else:
        yield f"shorten the prompt: {knows}"


def _whole_numbers(values: Sequence[int], flag: str) -> tuple[int, ...]:
    """As Python's own: numbers of numpy and torch count, and would not go into JSON."""
    for value in values:
        if not hasattr(value, "__index__"):
            raise UsageError(f"not a whole number: {_shown(value)}", where=flag, cure="give whole numbers")
    try:
        return tuple(operator.index(value) for value in values)
    except TypeError as error:  # a tensor of floats, or of more than one number
        raise UsageError(f"not a whole number: {error}", where=flag, cure="give whole numbers") from error


def _token_ids(prompt: object) -> tuple[int, ...]:
    if not isinstance(prompt, Iterable) or isinstance(prompt, bytes | bytearray | Mapping):
        raise UsageError(
            f"a prompt is text or token ids, not {type(prompt).__name__}",
            where="--prompt, --prompt-ids",
            cure="give a str, or a list of whole numbers",
        )
    values = list(prompt)
    if any(isinstance(value, Mapping) for value in values):
        raise UsageError(
            "a prompt is text or token ids, not a list of messages",
            where="--prompt, --prompt-ids",
            cure="lay messages out with the tokenizer's chat template, or ask through `serve`",
        )
    return _whole_numbers(values, "--prompt-ids")


def _number(value: object, flag: str) -> float:
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise UsageError(f"not a number: {_shown(value)}", where=flag, cure="give a number") from None


def _stop_strings(stop: object) -> tuple[str, ...]:
    values = list(stop) if isinstance(stop, Iterable) and not isinstance(stop, str) else [stop]
    texts = [value for value in values if isinstance(value, str)]
    for value in values:
        if not isinstance(value, str) and value is not None:
            raise UsageError(f"not a text: {_shown(value)}", where="--stop", cure="give a str, or a list of them")
    return tuple(text for text in texts if text)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
