"""What a text says of its own continuation, against a search through all of it."""

import random
from collections.abc import Sequence
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tree.ngram import LONGER, LONGEST_MATCH, MOST_LEVELS, MOST_MATCHES, ORDERS, PRIORS, Match, TextIndex, merge
from tree.sources import Found

TOKENS = st.lists(st.integers(0, 3), max_size=80)
PATHS = st.lists(st.integers(0, 3), max_size=6)


def matches_by_search(text: Sequence[int], path: Sequence[int]) -> dict[int, tuple[int, list[int]]]:
    """End of each match -> its length, and what is behind it: by reading the text over and over."""
    whole = [*text, *path]
    found: dict[int, tuple[int, list[int]]] = {}
    for order in ORDERS:
        for end in range(len(text), order - 1, -1):
            is_itself = end == len(whole)
            if is_itself or order > len(whole) or len(found) == MOST_MATCHES or text[end - order : end] != whole[-order:]:
                continue
            longer = LONGER[order]
            length = longer if end >= longer and text[end - longer : end] == whole[-longer:] else order
            behind = whole[end:]
            while len(behind) < MOST_LEVELS:
                behind += whole[end:]
            found.setdefault(end, (length, behind[:MOST_LEVELS]))
    return found


def laid_out(matches: Sequence[Match]) -> list[tuple[int, list[int]]]:
    return [(match.length, list(match.token_ids[match.begin : match.end])) for match in matches]


def texts_of(found: Sequence[Found]) -> list[tuple[int, ...]]:
    """Of each find, the tokens from the text on."""
    texts: list[tuple[int, ...]] = []
    for one in found:
        texts.append(((*texts[one.parent], one.token_id)) if one.parent >= 0 else (one.token_id,))
    return texts


@settings(deadline=None)
@given(TOKENS, PATHS)
def test_matches_are_those_that_a_search_through_the_text_finds(text: list[int], path: list[int]) -> None:
    assert laid_out(TextIndex(text).matches(path)) == list(matches_by_search(text, path).values())


@settings(deadline=None)
@given(TOKENS, st.lists(st.lists(st.integers(0, 3), max_size=9), max_size=4), PATHS)
def test_an_index_that_follows_a_text_is_that_of_the_whole(text: list[int], more: list[list[int]], path: list[int]) -> None:
    index = TextIndex(text)
    for token_ids in more:
        index.find(path, 8)
        index.follow(token_ids)
    whole = TextIndex([*text, *(token_id for token_ids in more for token_id in token_ids)])
    assert index.find(path, 40) == whole.find(path, 40)


@settings(deadline=None)
@given(TOKENS, PATHS, st.integers(0, 60))
def test_finds_are_a_trie_of_what_is_behind_the_matches_best_first(text: list[int], path: list[int], most: int) -> None:
    index = TextIndex(text)
    found, behind = index.find(path, most), [tokens for _, tokens in laid_out(index.matches(path))]
    texts = texts_of(found)
    assert len(found) <= most and len(set(texts)) == len(texts)
    assert all(-1 <= one.parent < place for place, one in enumerate(found))
    assert all(any(tuple(tokens[: len(text)]) == text for tokens in behind) for text in texts)
    if len(found) < most:  # then it is all of it
        assert set(texts) == {tuple(tokens[:n]) for tokens in behind for n in range(1, len(tokens) + 1)}
    values: list[float] = []
    for one in found:
        values.append(PRIORS[one.bin] * (values[one.parent] if one.parent >= 0 else 1.0))
    assert values == sorted(values, reverse=True)
    assert found == index.find(path, most + 5)[: len(found)]


def test_an_edited_copy_is_found_again_behind_its_edit() -> None:
    original = random.Random(0).sample(range(1000), 200)
    edit = [*original[:50], 5000, *original[51:54]]
    found = TextIndex([*original, *edit]).find((), MOST_LEVELS)
    assert [one.token_id for one in found] == original[54 : 54 + MOST_LEVELS]
    assert prod(PRIORS[one.bin] for one in found[:4]) > 0.05 and found[-1].bin > found[0].bin


def test_repetition_goes_on_beyond_the_end_of_the_text() -> None:
    assert [one.token_id for one in TextIndex([9, 8, 1, 2, 3, 1, 2, 3]).find((), 8)] == [1, 2, 3, 1, 2, 3, 1, 2]
    assert [one.token_id for one in TextIndex([9, 8, 1, 2]).find([3, 1], 4)] == [2, 3, 1, 2]


def test_longer_matches_and_more_of_them_weigh_more() -> None:
    text = [7, 1, 5, 0, 7, 1, 5, 9, 1, 6, 3, 8, 1, 6, 7, 1]
    found = TextIndex(text).find((), 2)
    assert [(one.parent, one.token_id) for one in found][:1] == [(-1, 5)]  # two of three tokens' length against two of one's
    shorter = merge([Match(1, [5], 0, 1), Match(1, [5], 0, 1)], 1)
    longer = merge([Match(4, [5], 0, 1), Match(4, [5], 0, 1)], 1)
    alone = merge([Match(4, [5], 0, 1)], 1)
    assert PRIORS[longer[0].bin] > PRIORS[shorter[0].bin] and PRIORS[longer[0].bin] > PRIORS[alone[0].bin]


def test_every_bin_has_a_prior_that_is_a_probability() -> None:
    assert all(0 < prior < 1 for prior in PRIORS)
    longest = merge([Match(LONGEST_MATCH, range(MOST_LEVELS), 0, MOST_LEVELS)] * 2, MOST_LEVELS)
    assert max(one.bin for one in longest) < len(PRIORS)


@pytest.mark.parametrize("text", [[], [1]])
def test_nothing_is_found_in_a_text_that_has_said_nothing_twice(text: list[int]) -> None:
    assert TextIndex(text).find((), 8) == [] and TextIndex(text).find([7], 8) == []


def test_a_find_looks_at_few_places_however_long_the_text_is() -> None:
    class Counted(list[int]):
        reads = 0

        def __getitem__(self, place):  # type: ignore[no-untyped-def]
            Counted.reads += 1
            return super().__getitem__(place)

    index = TextIndex([1, 2, 3, 4] * 10_000)
    index._token_ids = Counted(index._token_ids)
    assert len(index.find((), 64)) == MOST_LEVELS
    assert Counted.reads < 40 * MOST_MATCHES
