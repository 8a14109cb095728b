"""Where tokens of a tree come from besides a model: what a text has said before, or others have. A protocol, and its values."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Found:
    """A token that was found to follow, below `parent`, a place in the same list, or -1: right behind what was asked for. `bin`
    says how good the find is: finds of one bin are counted together."""

    parent: int
    token_id: int
    bin: int


class TokenSource(Protocol):
    """Continuations of one text. What it finds is a function of the text and of what it is asked, so its tokens are chosen."""

    @property
    def priors(self) -> tuple[float, ...]:
        """Of each bin, before any was counted: how probable a find is, if those above it are the text."""
        ...

    def find(self, path: Sequence[int], most: int) -> list[Found]:
        """What may follow the text with `path` behind it: at most `most` tokens, the most probable first, parents before their
        children, siblings of different tokens."""
        ...

    def follow(self, token_ids: Sequence[int]) -> None:
        """The text goes on."""
        ...


class TokenSources(Protocol):
    """For any number of texts."""

    def start(self, token_ids: Sequence[int]) -> TokenSource:
        """A text that begins with these tokens."""
        ...
