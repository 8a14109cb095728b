"""What follows in a text, told by what followed before: earlier places where it ran as it does now, and the tokens behind them.

Knows tokens alone. The idea is prompt look-up's (PLD) and SuffixDecoding's: an edited copy, a quotation or a list repeats what
was there. Places weigh the more the longer they match, as in SSSD (arXiv 2411.05894). How often finds are right is not assumed:
it is counted, by the length of the match and by whether the places agree.
"""

from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import count
from typing import NamedTuple

from .sources import Found

ORDERS = (8, 4, 2, 1)  # lengths of the n-grams that are looked up, the longest first
LONGER = {8: 16, 4: 6, 2: 3, 1: 1}  # a match of an n-gram is looked at once more: is it as long as that?
MOST_MATCHES = 16  # places that one find looks at
LONGEST_MATCH = max(LONGER.values())
MOST_LEVELS = 32  # tokens that are taken behind a place

# Bins of finds. Rows: how many tokens match at least, those found above a token included. Columns: do the places agree?
# All of several, the only one, most of them by weight, a fifth or more, fewer.
MATCH_LENGTHS = (1, 2, 3, 4, 6, 8, 16)
_PRIORS = (  # as counted in documentation, programs and licences; copies have more
    (0.60, 0.21, 0.36, 0.10, 0.03),
    (0.73, 0.35, 0.45, 0.14, 0.04),
    (0.77, 0.45, 0.47, 0.16, 0.05),
    (0.84, 0.54, 0.47, 0.17, 0.06),
    (0.90, 0.66, 0.52, 0.20, 0.06),
    (0.92, 0.75, 0.53, 0.20, 0.06),
    (0.95, 0.88, 0.60, 0.25, 0.08),
)
PRIORS = tuple(prior for row in _PRIORS for prior in row)
_COLUMNS = len(_PRIORS[0])
_ALL, _ONLY, _MOST, _SOME, _FEW = range(_COLUMNS)
_FIRST_BIN = tuple(  # of a match of so many tokens
    _COLUMNS * sum(length >= least for least in MATCH_LENGTHS[1:]) for length in range(LONGEST_MATCH + MOST_LEVELS)
)


class Match(NamedTuple):
    """A place where a text ran as it does now, over `length` tokens or more, 1 to LONGEST_MATCH. Behind it came
    token_ids[begin:end], MOST_LEVELS at most."""

    length: int
    token_ids: Sequence[int]
    begin: int
    end: int


def merge(matches: Sequence[Match], most: int) -> list[Found]:
    """What came behind `matches`, as one trie: the `most` tokens of it that are most probable by PRIORS, as
    `TokenSource.find` has them."""
    found: list[Found] = []
    # Tokens that may come next: minus how probable, in which order they were thought of, their bin, how deep, who says so.
    waiting: list[tuple[float, int, int, int, int, Sequence[Match]]] = []
    value, level, parent, behind, number = 1.0, 0, -1, matches, count()
    while len(found) < most:
        if len(behind) == 1:
            if behind[0].begin + level < behind[0].end:
                bin = _FIRST_BIN[behind[0].length + level] + _ONLY
                heappush(waiting, (-value * PRIORS[bin], next(number), parent, bin, level, behind))
        else:
            for bin, agreeing in _next_tokens(behind, level):
                heappush(waiting, (-value * PRIORS[bin], next(number), parent, bin, level, agreeing))
        if not waiting:
            break
        value, _, parent, bin, level, behind = heappop(waiting)
        found.append(Found(parent, behind[0].token_ids[behind[0].begin + level], bin))
        value, level, parent = -value, level + 1, len(found) - 1
    return found


def _next_tokens(matches: Sequence[Match], level: int) -> list[tuple[int, Sequence[Match]]]:
    """What comes `level` tokens behind matches that agree up to there: of each token its bin, and the matches that say so."""
    by_token: dict[int, list[Match]] = {}
    total = 0
    for match in matches:
        if (place := match.begin + level) < match.end:
            total += match.length * match.length
            by_token.setdefault(match.token_ids[place], []).append(match)
    found: list[tuple[int, Sequence[Match]]] = []
    for agreeing in by_token.values():
        length = max([match.length for match in agreeing])
        if len(by_token) == 1:
            agreement = _ALL if len(agreeing) > 1 else _ONLY
        else:
            weight = sum([match.length * match.length for match in agreeing])
            agreement = _MOST if 2 * weight > total else _SOME if 5 * weight >= total else _FEW
        found.append((_FIRST_BIN[length + level] + agreement, agreeing))
    return found


class TextIndex:
    """Implements `tree.sources.TokenSource` for what a text says itself.

    The last places of every n-gram of ORDERS are chained through the text, the newest first: a token costs an entry for each
    order, a find looks at no more than MOST_MATCHES places.
    """

    priors = PRIORS

    def __init__(self, token_ids: Sequence[int] = ()) -> None:
        self._token_ids: list[int] = []
        self._last: dict[int, dict[int, int]] = {order: {} for order in ORDERS}  # of each n-gram's hash: where it last ended
        self._earlier: dict[int, list[int]] = {
            order: [0] for order in ORDERS
        }  # of each end: that of the n-gram before; 0: none
        self.follow(token_ids)

    def follow(self, token_ids: Sequence[int]) -> None:
        text, begin = self._token_ids, len(self._token_ids)
        text.extend(token_ids)
        for order in ORDERS:
            last, earlier = self._last[order], self._earlier[order]
            for end in range(begin + 1, len(text) + 1):
                if end < order:
                    earlier.append(0)
                    continue
                key = hash(tuple(text[end - order : end]))
                earlier.append(last.get(key, 0))
                last[key] = end

    def find(self, path: Sequence[int], most: int) -> list[Found]:
        return merge(self.matches(path), most)

    def matches(self, path: Sequence[int]) -> list[Match]:
        """The newest places behind the longest n-grams with which the text and `path` end, MOST_MATCHES at most."""
        text, path = self._token_ids, list(path)
        tail = [*text[-LONGEST_MATCH:], *path][-LONGEST_MATCH:]
        whole = len(text) - MOST_LEVELS  # up to here, enough of the text comes behind
        found: dict[int, Match] = {}
        for order in ORDERS:
            if order > len(tail):
                continue
            earlier, sought = self._earlier[order], tail[-order:]
            longer, sought_longer = LONGER[order], tail[-LONGER[order] :]
            end = self._last[order].get(hash(tuple(sought)), 0)
            if end == len(text) and not path:
                end = earlier[end]  # where the text itself ends
            while end and len(found) < MOST_MATCHES:
                if end not in found and text[end - order : end] == sought:  # two n-grams may have one hash
                    is_longer = end >= longer and text[end - longer : end] == sought_longer
                    behind = (text, end, end + MOST_LEVELS) if end <= whole else (self._near_end(path, end), 0, MOST_LEVELS)
                    found[end] = Match(longer if is_longer else order, *behind)
                end = earlier[end]
        return list(found.values())

    def _near_end(self, path: list[int], end: int) -> list[int]:
        """MOST_LEVELS tokens behind `end` of the text and `path`. As it is their end that matches, they have begun to repeat
        themselves: they are taken to go on so."""
        behind = self._token_ids[end : end + MOST_LEVELS] + path
        return (behind * (MOST_LEVELS // len(behind) + 1))[:MOST_LEVELS]


class TextIndexes:
    """Implements `tree.sources.TokenSources`: an index for each text."""

    def start(self, token_ids: Sequence[int]) -> TextIndex:
        return TextIndex(token_ids)
