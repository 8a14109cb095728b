"""Sets of prompts in the format of Spec-Bench and MT-Bench: question.jsonl, an object with `turns` a line. Cheap to import."""

import json
from dataclasses import dataclass
from pathlib import Path

from ..errors import ModelError, reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    text: str
    category: str


def read_prompts(path: Path) -> list[Prompt]:
    """The first turn of every line, with its category ("" where there is none). ModelError for a file without turns."""
    prompts: list[Prompt] = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.strip():
                row = json.loads(line)
                prompts.append(Prompt(text=_text(row["turns"][0]), category=str(row.get("category", ""))))
        if not prompts:
            raise ValueError("no line in it")
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ModelError(
            "not a set of prompts: " + (reason(error) if isinstance(error, OSError) else f"{type(error).__name__} {error}"),
            where=f"{path}, prompt {len(prompts) + 1}",
            cure='one JSON object a line, each with {"turns": ["the prompt"]}, as in Spec-Bench\'s question.jsonl',
        ) from error
    return prompts


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"a turn is {value!r}, not text")
    return value
