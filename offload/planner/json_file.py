"""Small files that people write or that travel: read whole, bounded in size, with errors that name the file."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ..errors import ModelError, reason

T = TypeVar("T")

MAX_FILE_BYTES = 16 * 2**20


def read_file(path: Path, parse: Callable[[object], T], what: str, cure: str) -> T:
    """parse(the JSON document in `path`). ModelError for a file that is too large, cannot be read, is no JSON, or for
    which `parse` raises a ValueError."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes is too large")
        return parse(_json(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ModelError(f"not {what}: {reason(error)}", where=str(path), cure=cure) from error


def _json(text: str) -> object:
    try:
        document: object = json.loads(text, parse_int=_whole)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it must be JSON: {error}") from error
    return document


def _whole(digits: str) -> int:
    number = int(digits)
    if abs(number) > sys.float_info.max:  # sums with floats would raise OverflowError, wherever they are made
        raise ValueError(f"a number of {len(digits)} digits is too large")
    return number
