"""Reading what people say: a line is a turn; between triple quotes, several are. Line editing and history on a terminal."""

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass

QUOTES = '"""'


@dataclass(frozen=True, slots=True)
class Turn:
    """`quoted` text is never a command."""

    text: str
    quoted: bool

    @property
    def is_command(self) -> bool:
        return self.text.startswith("/") and not self.quoted


def line_reader() -> Callable[[str], str]:
    """A function from a prompt to the next line of stdin without its end. It raises EOFError at the end. Nothing is written
    to a stdout that is no terminal. Bytes that are not UTF-8 arrive as surrogates, which no message may have."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        import readline  # noqa: F401 (input() edits lines and keeps a history once it is there)

        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")
        return input

    def read(prompt: str) -> str:
        if sys.stdin.isatty():
            print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.buffer.readline()
        if not line:
            raise EOFError
        return line.removesuffix(b"\n").removesuffix(b"\r").decode(errors="surrogateescape")

    return read


def read_turn(read: Callable[[str], str]) -> Turn | None:
    """The next turn; None when there is none. Input that ends within quotes ends the turn, too."""
    try:
        line = read("> ")
    except EOFError:
        return None
    if not line.lstrip().startswith(QUOTES):
        return Turn(line.strip(), False)
    line = line.lstrip().removeprefix(QUOTES)
    lines = []
    while not line.rstrip().endswith(QUOTES):
        lines.append(line)
        try:
            line = read(". ")
        except EOFError:
            return Turn("\n".join(lines).strip(), True)
    return Turn("\n".join([*lines, line.rstrip().removesuffix(QUOTES)]).strip(), True)
