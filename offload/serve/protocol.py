"""The bodies that clients send, with their bounds. Strict: "2" is no number. Answers are written in answer_format.py.

No field names a file, a template or a model to load.
"""

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

from .fields import CHAT, COMPLETION, MESSAGE, Neutral, without_effect
from .problems import NOT_UNICODE
from .settings import (
    MAX_BODY_BYTES,
    MAX_CHOICES,
    MAX_LOGPROBS,
    MAX_MESSAGES,
    MAX_PROMPTS,
    MAX_STOP_CHARACTERS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKENS,
)

# What a template has from elsewhere, and what transformers' own `apply_chat_template` would take for itself.
TEMPLATE_NAMES = {
    *("messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"),
}


def _unicode(text: str) -> str:
    """JSON can spell half a character, which no tokenizer takes."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise PydanticCustomError("not_unicode", NOT_UNICODE)
    return text


def _in_words(words: str) -> WrapValidator:
    """For a field of several types: one error that says what it may be, in place of one for each type that it is not."""

    def check(value: object, handler: ValidatorFunctionWrapHandler) -> object:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("none_of_its_types", words) from None

    return WrapValidator(check)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Refuses values that cannot go to the template's process as JSON, and names that are taken there."""
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        raise PydanticCustomError("not_plain", "half a character (a lone surrogate), or nested too deeply") from None
    taken = sorted(values.keys() & TEMPLATE_NAMES)
    if taken:
        raise PydanticCustomError("reserved", "the template has it from the rest of the request: {name}", {"name": taken[0]})
    return values


Text = Annotated[str, AfterValidator(_unicode)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(max_length=MAX_BODY_BYTES)]
StopString = Annotated[Text, Field(max_length=MAX_STOP_CHARACTERS)]
NumTokens = Annotated[int, Field(ge=-1, lt=2**31)]


class Wire(BaseModel):
    """Unknown fields are kept aside (`model_extra`), so that they can be refused, or named in the answer's headers."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    def unknown(self, unsupported: Neutral, place: str = "") -> tuple[str, ...]:
        """Names of fields that have no effect. Problem for one that would change the answer. `place` is where they stand,
        such as "messages.0."."""
        return without_effect(self.model_extra or {}, unsupported, place)


class StreamOptions(Wire):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Sampling(Wire):
    """The fields that both ways of asking have. None is the default. So are the values that other servers have for it: a
    `top_k` of 0 or -1, a `seed` or a number of tokens of -1, an empty `stop`. `top_k`, `ignore_eos`, `stop_token_ids` and
    `continuous_usage_stats` are not in OpenAI's interface."""

    unsupported: ClassVar[Neutral]

    model: Annotated[str, Field(max_length=512)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    max_tokens: NumTokens | None = None
    max_completion_tokens: NumTokens | None = None
    stop: (
        Annotated[
            StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)],
            _in_words(f"a text, or {MAX_STOP_STRINGS} texts at most, of {MAX_STOP_CHARACTERS} characters at most"),
        ]
        | None
    ) = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def limit(self) -> tuple[str, int | None]:
        """Name and value of the field that says how many tokens at most. The newer of the two fields counts."""
        name = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        return name, getattr(self, name)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def wants_usage_so_far(self) -> bool:
        return self.wants_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def ignored(self) -> tuple[str, ...]:
        """Names of fields that have no effect, wherever they stand. Problem for one that would change the answer."""
        options = self.stream_options.unknown({}) if self.stream_options else ()
        return (*self.unknown(self.unsupported), *(f"stream_options.{name}" for name in options))


class TextPart(Wire):
    type: Literal["text"]
    text: Text


class Message(Wire):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Text | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES)],
        _in_words('text only, a string or parts {"type": "text", "text": ...}: no images, audio, files or tool calls'),
    ]

    def plain(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Sampling):
    unsupported = CHAT

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(_plain)] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None

    def ignored(self) -> tuple[str, ...]:
        of_messages = [
            f"messages.{name}"
            for number, message in enumerate(self.messages)
            for name in message.unknown(MESSAGE, f"messages.{number}.")
        ]
        return (*super().ignored(), *dict.fromkeys(of_messages))


class CompletionRequest(Sampling):
    unsupported = COMPLETION

    prompt: Annotated[
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)],
        _in_words(f"a text, token ids, or a list of up to {MAX_PROMPTS} texts or of up to {MAX_PROMPTS} lists of token ids"),
    ]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_special_tokens: bool | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if all(isinstance(part, int) for part in self.prompt):
            return [[part for part in self.prompt if isinstance(part, int)]]
        return [part for part in self.prompt if not isinstance(part, int)]


class TokenizeRequest(Wire):
    prompt: Text
    add_special_tokens: bool | None = None


class DetokenizeRequest(Wire):
    tokens: TokenIds
