"""Texts out of files and folders, a piece at a time: UTF-8, or JSON lines whose "text" they are."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from ..errors import ModelError, reason

PIECE_CHARACTERS = 2**20  # a longer text is parted there, behind a line's end where there is one
MOST_LINE_CHARACTERS = 2**26
LOOKED_AT_BYTES = 2**13  # a zero byte among the first of them: this is no text

Read = Callable[[int], None]  # is told how many bytes were read


def files_of(names: Sequence[str]) -> list[Path]:
    """Files as they are named; of folders all that is in them, at any depth, in order, but what is hidden or no text.
    ModelError for a name of nothing."""
    files: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            files += sorted(found for found in path.rglob("*") if _is_text_of(path, found))
        elif path.is_file():
            files.append(path)
        else:
            raise ModelError("there is no such file or folder", where=name, cure="name text files, .jsonl files or folders")
    if not files:
        raise ModelError("there are no texts in it", where=" ".join(names), cure="name text files, .jsonl files or folders")
    return files


def read_texts(path: Path, read: Read) -> Iterator[str]:
    """The texts of a file, in pieces of PIECE_CHARACTERS at most. ModelError for one that is not UTF-8, or has a line that is
    not JSON with a "text"."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from _json_lines(file, read) if path.suffix == ".jsonl" else _pieces(file, read)
    except (OSError, ValueError) as error:
        cure = 'name files in UTF-8; a .jsonl file has a JSON object in every line, with its text under "text"'
        raise ModelError(f"not a text: {reason(error)}", where=str(path), cure=cure) from error


def _is_text_of(folder: Path, path: Path) -> bool:
    if not path.is_file() or any(part.startswith(".") for part in path.relative_to(folder).parts):
        return False
    try:
        with path.open("rb") as file:
            return b"\0" not in file.read(LOOKED_AT_BYTES)
    except OSError as error:
        raise ModelError(f"not a text: {reason(error)}", where=str(path), cure="make it readable, or name others") from error


def _pieces(file: TextIO, read: Read) -> Iterator[str]:
    rest = ""
    while piece := file.read(PIECE_CHARACTERS - len(rest)):
        read(len(piece.encode()))
        rest += piece
        if len(rest) == PIECE_CHARACTERS:
            end = rest.rfind("\n") + 1 or len(rest)
            yield rest[:end]
            rest = rest[end:]
    if rest:
        yield rest


def _json_lines(file: TextIO, read: Read) -> Iterator[str]:
    number = 0
    while line := file.readline(MOST_LINE_CHARACTERS):
        number += 1
        read(len(line.encode()))
        if line.strip():
            yield from _text_of(line, number)


def _text_of(line: str, number: int) -> Iterator[str]:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number} is not JSON: {error}") from error
    text = document.get("text") if isinstance(document, dict) else None
    if not isinstance(text, str):
        raise ValueError(f'line {number} has no "text"')
    text.encode()  # a lone surrogate, as JSON may spell one, is no text: ValueError
    for begin in range(0, len(text), PIECE_CHARACTERS):
        yield text[begin : begin + PIECE_CHARACTERS]
