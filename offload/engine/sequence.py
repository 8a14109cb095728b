"""One text in the loop: what is committed of it, where its rows lie, how it goes on. And which rows of it a pass takes."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from tree.draft import DraftContext
from tree.logprobs import ScoredToken, Scoring
from tree.sampling import SamplingParams

from ..model.kv_cache import Segment
from .sessions import Place


class Sequence:
    """The state of one text from the time it joins the loop until it leaves.

    The root of its next tree is the last committed token, whose target keys and values are not computed yet. So the target's
    segment holds all committed tokens but the last, or fewer before the first pass, which then reads the rest of the prompt
    together with the first tree: one stream of the weights saved.
    """

    def __init__(
        self,
        place: Place,
        draft: DraftContext | None,
        *,
        params: SamplingParams,
        generator: torch.Generator,
        scoring: Scoring | None,
        tokens_left: int,
        repeatable: bool = False,
    ) -> None:
        self.place, self.draft, self.repeatable = place, draft, repeatable
        self.params, self.generator, self.scoring = params, generator, scoring
        self.tokens_left = tokens_left  # at most, that the text may still get
        self.prompt_scores: tuple[ScoredToken, ...] = ()
        # Since its last result, where a prompt takes several passes.
        self.start_s: float | None = None
        self.bytes_read = 0
        self.ahead_nodes = 0  # that were grown in its last pass

    @property
    def token_ids(self) -> list[int]:
        """All committed tokens."""
        return self.place.token_ids

    @property
    def segment(self) -> Segment:
        """Of the target's cache."""
        return self.place.segments[0]

    @property
    def unread(self) -> int:
        """Committed tokens before the root that no pass has read yet."""
        return len(self.token_ids) - 1 - self.segment.length

    def leave(self) -> object:
        """What its trees go on from in another place."""
        return self.draft.leave() if self.draft is not None else None

    @property
    def scores_prompt(self) -> bool:
        return self.scoring is not None and self.scoring.prompt


@dataclass(frozen=True, slots=True)
class Share:
    """What a pass takes of a sequence: the next `unread` tokens, and behind them its tree, if those are all."""

    unread: int
    has_tree: bool


def share_rows(unread: Iterable[int], tree_rows: int, most_rows: int, limits: Iterable[int | None]) -> tuple[Share | None, ...]:
    """Share `most_rows` rows of a pass out among sequences with so many `unread` tokens and a tree of `tree_rows` rows each;
    `limits` bounds the rows of each, where it is not None. None for who has to wait.

    Who has read everything comes first: a text that is being written waits for no other's prompt. The others follow in their
    order; a prompt that finds no room for the tree behind it is read as far as there is room.
    """
    wanted = [(rows, most_rows if limit is None else min(limit, most_rows)) for rows, limit in zip(unread, limits, strict=True)]
    shares: list[Share | None] = [None] * len(wanted)
    left = most_rows
    for number in sorted(range(len(wanted)), key=lambda number: wanted[number][0] > 0):
        rows, limit = wanted[number]
        room = min(left, limit)
        if rows + tree_rows <= room:
            shares[number] = Share(rows, has_tree=True)
            left -= rows + tree_rows
        elif rows and room > 0:
            shares[number] = Share(min(rows, room), has_tree=False)
            left -= min(rows, room)
    return tuple(shares)
