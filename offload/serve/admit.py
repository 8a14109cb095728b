"""From a body to requests that the engine will surely finish. Runs on a pool's thread: tokenizers may take their time.

Problem for anything that the engine would refuse; nothing that is refused here reaches it.
"""

import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ModelError
from ..text.conversation import render
from .answer_format import ChatFormat, CompletionFormat, Format, Header
from .problems import Problem, engine_errors_as_problems
from .protocol import ChatRequest, CompletionRequest, Sampling

if TYPE_CHECKING:
    from tree.logprobs import Scoring

    from ..engine.admission import Request
    from ..engine.engine import Engine
    from ..text.tokenizer import Tokenizer

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Admitted requests, in the order of their choices, and how their answer is written."""

    requests: "tuple[Request, ...]"
    choices_per_prompt: int
    format: Format


def require_tokenizer(tokenizer: "Tokenizer | None") -> "Tokenizer":
    """ModelError for a model without a tokenizer: a server of text needs one."""
    if tokenizer is None:
        raise ModelError(
            "the model folder has no tokenizer", where="--model", cure="add tokenizer.json, or use generate --prompt-ids"
        )
    return tokenizer


def admit_chat(engine: "Engine", body: ChatRequest, model_name: str) -> Order:
    tokenizer = require_tokenizer(engine.tokenizer)
    if body.top_logprobs and not body.logprobs:
        raise Problem(400, "invalid_value", "top_logprobs needs logprobs true beside it", "top_logprobs")
    values = _template_values(tokenizer, body)
    with engine_errors_as_problems("messages"):
        try:
            prompt = render(tokenizer, [message.plain() for message in body.messages], values=values)
        except ModelError as error:  # most templates refuse some order of roles, so this is the client's, too
            raise Problem(400, "chat_template_error", error.what, "messages") from None
    token_ids = list(prompt.token_ids)
    scoring = _scoring(body.top_logprobs or 0) if body.logprobs else None
    field, wanted = body.limit
    if wanted == 0:
        raise Problem(400, "invalid_value", f"{field} 0 asks for nothing", field)
    num_new = _num_new(engine, len(token_ids), -1 if wanted is None else wanted)
    requests = _requests(engine, body, token_ids, num_new, (*body.stop_strings, *prompt.stop), scoring)
    header = Header(id=f"chatcmpl-{secrets.token_hex(12)}", created=int(time.time()), model=model_name)
    layout = ChatFormat(header, tokenizer, with_logprobs=bool(body.logprobs))
    return Order(requests=requests, choices_per_prompt=len(requests), format=layout)


def admit_completion(engine: "Engine", body: CompletionRequest, model_name: str) -> Order:
    tokenizer = require_tokenizer(engine.tokenizer)
    echo, num_choices = bool(body.echo), body.n or 1
    field, wanted = body.limit
    num_new = DEFAULT_COMPLETION_TOKENS if wanted is None else wanted
    if num_new == 0 and not echo:
        raise Problem(400, "invalid_value", f"{field} 0 asks for nothing without echo", field)
    scoring = None if body.logprobs is None else _scoring(body.logprobs, prompt=echo)
    requests: list[Request] = []
    texts: list[str] = []
    for prompt in body.prompts:
        special = body.add_special_tokens is not False
        token_ids = prompt if isinstance(prompt, list) else tokenizer.encode(prompt, add_special_tokens=special)
        made = _requests(engine, body, token_ids, _num_new(engine, len(token_ids), num_new), body.stop_strings, scoring)
        requests += made
        if echo:
            texts += [prompt if isinstance(prompt, str) else tokenizer.decode(token_ids)] * len(made)
    header = Header(id=f"cmpl-{secrets.token_hex(12)}", created=int(time.time()), model=model_name)
    with_logprobs = body.logprobs is not None
    layout = CompletionFormat(header, tokenizer, with_logprobs=with_logprobs, echo=echo, num_new=num_new, prompt_texts=texts)
    return Order(requests=tuple(requests), choices_per_prompt=num_choices, format=layout)


def _template_values(tokenizer: "Tokenizer", body: ChatRequest) -> dict[str, object]:
    """What the model's template is told beside the messages. Problem for an effort when the template knows none."""
    given = body.chat_template_kwargs or {}
    effort = body.reasoning_effort
    if effort is None:
        return given
    known = any(name in (tokenizer.chat_template or "") for name in ("reasoning_effort", "enable_thinking"))
    if not known and effort != "none":
        raise Problem(400, "unsupported_parameter", "the model's chat template knows no reasoning_effort", "reasoning_effort")
    return {"reasoning_effort": effort, "enable_thinking": effort != "none", **given}


def _num_new(engine: "Engine", num_prompt: int, wanted: int) -> int:
    """How many new tokens the engine is asked for: at least 1, as scoring alone takes a pass, too. A `wanted` of -1 means all
    that the context has room for."""
    return max(engine.plan.text_tokens - num_prompt if wanted == -1 else wanted, 1)


def _requests(
    engine: "Engine",
    body: Sampling,
    prompt: list[int],
    max_new_tokens: int,
    stop: tuple[str, ...],
    scoring: "Scoring | None",
) -> "tuple[Request, ...]":
    """One request per choice; they differ by their seeds. Where the body names no seed, it is drawn."""
    seed = secrets.randbelow(2**62) if body.seed in (None, -1) else body.seed % 2**62
    with engine_errors_as_problems("prompt" if isinstance(body, CompletionRequest) else "messages"):
        return tuple(
            engine.admission.request(
                prompt,
                max_new_tokens=max_new_tokens,
                temperature=1.0 if body.temperature is None else body.temperature,
                top_k=1 if body.top_p == 0 else max(body.top_k or 0, 0) or None,
                top_p=body.top_p or 1.0,
                seed=seed + number,
                stop=stop,
                stop_token_ids=body.stop_token_ids or (),
                ignore_eos=bool(body.ignore_eos),
                scoring=scoring,
                seed_is_chance=body.seed is None,
            )
            for number in range(body.n or 1)
        )


def _scoring(num_top: int, *, prompt: bool = False) -> "Scoring":
    from tree.logprobs import Scoring  # torch has long been imported by now

    return Scoring(num_top=num_top, prompt=prompt)
