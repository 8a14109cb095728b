"""The bodies that clients send, with their bounds. Strict: "2" is no number. Answers are written in answers.py.

No field names a file, a template or a model to load.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from .problems import Problem
from .settings import (
    MAX_BODY_BYTES,
    MAX_CHOICES,
    MAX_LOGPROBS,
    MAX_MESSAGES,
    MAX_PROMPTS,
    MAX_STOP_CHARACTERS,
    MAX_STOP_STRINGS,
)

# Fields that would change the answer and are not supported, with the values at which they change nothing.
UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "audio": (),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "min_p": (0,),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "web_search_options": (),
}


def _unicode(text: str) -> str:
    """JSON can spell half a character, which no tokenizer takes."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("not Unicode: lone surrogates")
    return text


Text = Annotated[str, AfterValidator(_unicode)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(max_length=MAX_BODY_BYTES)]
StopString = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class Wire(BaseModel):
    """Unknown fields are kept aside (`model_extra`), so that they can be named in the answer's headers."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    def ignored(self) -> tuple[str, ...]:
        """Names of fields that have no effect. Problem for one that would change the answer."""
        extra: dict[str, Any] = {name: value for name, value in (self.model_extra or {}).items() if value is not None}
        for name, value in extra.items():
            if name in UNSUPPORTED and value not in UNSUPPORTED[name]:
                raise Problem(400, "unsupported_parameter", f"{name} is not supported", name)
        return tuple(name for name in extra if name not in UNSUPPORTED)


class StreamOptions(Wire):
    include_usage: bool | None = None


class Sampling(Wire):
    """What both ways of asking share; None is the default. `top_k` and `ignore_eos` are not in OpenAI's interface."""

    model: Annotated[str, Field(max_length=512)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class TextPart(Wire):
    type: Literal["text"]
    text: Text


class Message(Wire):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES)]

    def plain(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Sampling):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None


class CompletionRequest(Sampling):
    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if all(isinstance(part, int) for part in self.prompt):
            return [[part for part in self.prompt if isinstance(part, int)]]
        return [part for part in self.prompt if not isinstance(part, int)]


class TokenizeRequest(Wire):
    prompt: Text
    add_special_tokens: bool = True


class DetokenizeRequest(Wire):
    tokens: TokenIds
