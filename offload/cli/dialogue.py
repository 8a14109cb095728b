"""What a chat is about: its messages and the settings of its answers, and both as a file. Prints nothing, knows no engine."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from ..errors import ModelError, UsageError, reason
from ..text.conversation import Message, check_message
from .acceptance import write_json
from .flag_groups import add_sampling_flags
from .parser import Parser

SCHEMA_VERSION = 1
LIMIT_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerSettings:
    """The sampling flags of the command line, under their names."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float
    seed: int

    def changed(self, name: str, value: str) -> "AnswerSettings":
        """A copy in which `name`, a flag or a field, has `value`, read as the command line reads it. "off" resets it.
        UsageError for anything else."""
        key = name.removeprefix("--").replace("-", "_")
        if key not in (names := [one.name for one in fields(self)]):
            shown = ", ".join(one.replace("_", "-") for one in names)
            raise UsageError(f"no such setting: {name}", where="/set NAME VALUE", cure=f"one of {shown}")
        parser = Parser(prog="/set", add_help=False, allow_abbrev=False)
        add_sampling_flags(parser.add_argument_group())
        flag = [] if value == "off" else [f"--{key.replace('_', '-')}={value}"]
        try:
            parsed = getattr(parser.parse_args(flag), key)
        except UsageError as error:
            raise UsageError(error.what, where="/set NAME VALUE", cure="/set alone shows the present values") from None
        return replace(self, **{key: parsed})


@dataclass(slots=True)
class Dialogue:
    """Messages, a system message first if there is one. The oldest `num_left_out` of the others no longer fit into the
    context."""

    settings: AnswerSettings
    messages: list[Message] = field(default_factory=list)
    num_left_out: int = 0

    @property
    def system(self) -> str | None:
        first = self.messages[:1]
        return first[0]["content"] if first and first[0]["role"] == "system" else None

    def set_system(self, text: str | None) -> None:
        rest = self.messages[self.system is not None :]
        self.messages = [{"role": "system", "content": text}, *rest] if text else rest

    def clear(self) -> None:
        """Forget everything but the system message."""
        self.messages, self.num_left_out = self.messages[: self.system is not None], 0

    def up_to_last_question(self) -> list[Message]:
        """Empty when nothing has been asked."""
        asked = [number for number, message in enumerate(self.messages) if message["role"] == "user"]
        return self.messages[: asked[-1] + 1] if asked else []

    def views(self, asked: list[Message]) -> Iterator[tuple[int, list[Message]]]:
        """(number left out, messages) for each part of `asked` that an answer may go by, the longest first. `asked` ends with a
        question. A part has the system message and goes on from a question; what was left out before stays out."""
        system = [message for message in asked[:1] if message["role"] == "system"]
        rest = asked[len(system) :]
        starts = [0, *[number for number, message in enumerate(rest) if message["role"] == "user"][1:]]
        for start in starts:
            if start >= self.num_left_out or start == starts[-1]:
                yield start, [*system, *rest[start:]]

    def save(self, path: Path, model: str) -> None:
        """UsageError when the file cannot be written."""
        document = {
            "schema_version": SCHEMA_VERSION,
            "model": model,
            "settings": asdict(self.settings),
            "messages": self.messages,
        }
        try:
            write_json(path, document)
        except (OSError, ValueError) as error:  # a name with a null byte is a ValueError
            raise UsageError(
                f"cannot write: {reason(error)}", where=str(path), cure="name a file in an existing folder"
            ) from error

    def load(self, path: Path) -> None:
        """Take over a file that `save` has written. UsageError when it cannot be read, ModelError when it is not one; then
        nothing has changed."""
        document = _read(path)
        settings, messages = document.get("settings"), document.get("messages")
        try:
            if document.get("schema_version") != SCHEMA_VERSION:
                raise ValueError(f"schema_version is {document.get('schema_version')!r}, not {SCHEMA_VERSION}")
            if not isinstance(settings, Mapping) or not isinstance(messages, list):
                raise ValueError("settings is no object, or messages is no list")
            loaded = self.settings
            for name, value in settings.items():
                loaded = loaded.changed(str(name), "off" if value is None else str(value))
            checked = [check_message(message, number) for number, message in enumerate(messages)]
        except (ValueError, UsageError) as error:
            raise _not_ours(path, error.what if isinstance(error, UsageError) else str(error)) from None
        self.settings, self.messages, self.num_left_out = loaded, checked, 0


def _not_ours(path: Path, why: str) -> ModelError:
    return ModelError(f"not a saved conversation: {why}", where=str(path), cure="name a file that /save has written")


def _read(path: Path) -> dict[str, object]:
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is not a file")
        with path.open("rb") as file:
            contents = file.read(LIMIT_BYTES + 1)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read: {reason(error)}", where=str(path), cure="name a file that /save has written") from error
    if len(contents) > LIMIT_BYTES:
        raise _not_ours(path, f"larger than {LIMIT_BYTES} bytes")
    try:
        document = json.loads(contents)
    except (ValueError, RecursionError) as error:
        raise _not_ours(path, f"no JSON: {error}") from None
    if not isinstance(document, dict):
        raise _not_ours(path, f"{type(document).__name__}, no object")
    return document
