"""Messages to a prompt: by the model's chat template, or as a plain transcript for a model that has none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import UsageError
from .tokenizer import Tokenizer

NAMES = {"system": "System", "user": "User", "assistant": "Assistant"}
# What a transcript's answer ends before: a base model goes on with everybody's lines.
TRANSCRIPT_STOPS = tuple(f"\n{name}:" for name in NAMES.values())

Message = dict[str, str]  # role and content


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """`token_ids` open an answer, which ends before any of `stop`. `templated` tells whether the model's own template made
    `text`."""

    text: str
    token_ids: tuple[int, ...]
    stop: tuple[str, ...]
    templated: bool


def render(
    tokenizer: Tokenizer, messages: Sequence[object], *, template: bool = True, values: Mapping[str, object] | None = None
) -> ChatPrompt:
    """The prompt for an answer to `messages`, [{"role": "system" | "user" | "assistant", "content": str}, ...]. With
    `template` False, or without a template, it is a transcript. `values` are what a template may know beside the messages,
    such as enable_thinking.

    Raises UsageError for messages that make no sense, ModelError for a template that fails or refuses them.
    """
    checked = [check_message(message, number) for number, message in enumerate(messages)]
    if not checked:
        raise UsageError("no messages", where="messages", cure="give at least one")
    if template and tokenizer.has_chat_template:
        text = tokenizer.lay_out(checked, values)
        return ChatPrompt(text=text, token_ids=tuple(tokenizer.encode_laid_out(text)), stop=(), templated=True)
    text = transcript(checked)
    return ChatPrompt(text=text, token_ids=tuple(tokenizer.encode(text)), stop=TRANSCRIPT_STOPS, templated=False)


def transcript(messages: Sequence[Message]) -> str:
    """A line "User: ..." or "Assistant: ..." a message, system messages as they are, and an open "Assistant:" at the end."""
    lines = []
    for message in messages:
        content = message["content"].strip()
        lines.append(f"{content}\n" if message["role"] == "system" else f"{NAMES[message['role']]}: {content}".rstrip())
    return "\n".join([*lines, f"{NAMES['assistant']}:"])


def check_message(message: object, number: int) -> Message:
    """Role and content of `message`, which is number `number` of a list. UsageError when it has not both."""
    if not isinstance(message, Mapping):
        raise UsageError(f"{type(message).__name__}, no object", where=f"message {number}", cure="give role and content")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in NAMES:
        raise UsageError(f"unknown role {role!r}", where=f"message {number}", cure=f"one of {', '.join(NAMES)}")
    if not isinstance(content, str):
        raise UsageError(f"the content is {type(content).__name__}, not text", where=f"message {number}", cure="give a string")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the content is not Unicode: {error}", where=f"message {number}", cure="leave lone surrogates out"
        ) from error
    return {"role": role, "content": content}
