"""Conversations that a text may go on from: those whose keys and values are on the device, copies of others in host memory.

Knows token ids and caches, not text: what may be reused is decided token by token.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch

from ..device.host import available_bytes
from ..errors import OutOfMemoryError
from ..model.kv_cache import KVCache, Segment
from ..planner.plan import Plan

MAX_KEPT = 4
MAX_KEPT_BYTES = 8 * 2**30
# Fewer rows are cheaper to compute again, in a pass that comes anyway, than to copy to the host and back.
MIN_KEPT_ROWS = 32


def host_limit_bytes(plan: Plan) -> int:
    """Host memory for kept conversations: what the plan's budget leaves beside the weights, MAX_KEPT_BYTES at most."""
    if plan.host_budget_bytes is None:
        return MAX_KEPT_BYTES
    return min(MAX_KEPT_BYTES, max(plan.host_budget_bytes - sum(plan.host_ledger.values()), 0))


def num_common(tokens: Sequence[int], others: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    pairs = zip(tokens, others, strict=False)
    return next((position for position, (one, other) in enumerate(pairs) if one != other), min(len(tokens), len(others)))


class Place:
    """Where one sequence lies on the device: segment `number` of each cache, the target's first. At every moment the segments
    hold rows of beginnings of `token_ids`, also when the sequence has left, and after an interruption."""

    def __init__(self, number: int, segments: tuple[Segment, ...]) -> None:
        self.number, self.segments = number, segments
        self.token_ids: list[int] = []


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Kept:
    """`rows` has a host copy for each cache; `token_ids` are those of the first cache's rows, computed for prompts of the
    lengths `counted`, one for each cache (see rope.py)."""

    token_ids: tuple[int, ...]
    counted: tuple[int, ...]
    rows: tuple[torch.Tensor, ...]

    @property
    def num_bytes(self) -> int:
        return sum(rows.nbytes for rows in self.rows)


class Sessions:
    """Gives sequences their places. `caches` are the target's and, with a draft model, the draft's; segment k of each is place
    k's. At most `max_kept` sequences that no place holds any more are kept, in `max_bytes` of host memory; the one not asked
    for longest goes first."""

    def __init__(self, caches: Sequence[KVCache], *, max_bytes: int, max_kept: int = MAX_KEPT) -> None:
        self._ropes, self._max_bytes, self._max_kept = [cache.rope for cache in caches], max_bytes, max_kept
        segments = zip(*(cache.segments for cache in caches), strict=True)
        self._places = [Place(number, of_place) for number, of_place in enumerate(segments)]  # least recently taken first
        self._kept: list[_Kept] = []  # least recently used first

    @property
    def host_bytes(self) -> int:
        return sum(kept.num_bytes for kept in self._kept)

    def take(self, text: Sequence[int], prompt_tokens: int, busy: Collection[Place] = ()) -> Place:
        """A place for `text`, which began with a prompt of `prompt_tokens` tokens: of those that are not `busy` the one that
        knows most of it, then the one not taken for longest. Its segments are filled with what is known of the text, but for
        the last token, which must go through a pass."""
        idle = [place for place in self._places if place not in busy]
        counted = tuple(rope.counted_prompt(prompt_tokens, len(text)) for rope in self._ropes)
        place = max(idle, key=lambda place: self._usable(place, text[:-1], counted)[0])
        self._places = [*(other for other in self._places if other is not place), place]
        self._resume(place, text, counted)
        return place

    def limit(self, max_bytes: int) -> None:
        """From now on at most `max_bytes`; what is more goes at once."""
        self._max_bytes = max_bytes
        while self.host_bytes > max_bytes:
            self._kept.pop(0)

    def forget(self) -> None:
        """Drop all copies and all rows. A sequence that has a place reads its tokens again."""
        self._kept.clear()
        for place in self._places:
            for segment in place.segments:
                segment.truncate(0)

    def _resume(self, place: Place, text: Sequence[int], counted: tuple[int, ...]) -> None:
        wanted, target = text[:-1], place.segments[0]
        usable = self._usable(place, wanted, counted)
        best = self._longest(wanted, counted, min(usable[0], target.length))
        if target.length - usable[0] >= MIN_KEPT_ROWS:
            self._keep(place)
        for segment, rows in zip(place.segments, usable, strict=True):
            segment.truncate(min(segment.length, rows))
        place.token_ids = list(text)
        for segment, length in zip(place.segments, counted, strict=True):
            segment.counted_prompt = length
        if best is not None:
            common = num_common(best.token_ids, wanted)
            for segment, saved, same in zip(place.segments, best.rows, self._same(best.counted, counted), strict=True):
                segment.load_rows(saved, common if same else 0)

    def _usable(self, place: Place, wanted: Sequence[int], counted: Sequence[int]) -> list[int]:
        """How many of the tokens `wanted` each segment of `place` may have right rows of."""
        common = num_common(place.token_ids, wanted)
        held = [segment.counted_prompt for segment in place.segments]
        return [common if same else 0 for same in self._same(held, counted)]

    def _same(self, one: Sequence[int], other: Sequence[int]) -> Iterator[bool]:
        """For each cache, whether prompts of these lengths have the same frequencies in it."""
        return (rope.group(a) == rope.group(b) for rope, a, b in zip(self._ropes, one, other, strict=True))

    def _longest(self, wanted: Sequence[int], counted: Sequence[int], least: int) -> _Kept | None:
        """The kept sequence that has most of `wanted`, more than `least` tokens of it; it is now the last to go."""
        alike = [kept for kept in self._kept if next(self._same(kept.counted, counted))]
        best = max(alike, key=lambda kept: num_common(kept.token_ids, wanted), default=None)
        if best is None or num_common(best.token_ids, wanted) <= least:
            return None
        self._kept = [*(kept for kept in self._kept if kept is not best), best]
        return best

    def _keep(self, place: Place) -> None:
        """Copy a place's rows to the host, unless a copy has them all, or nothing could make room. Copies of its beginnings go
        for it, then the oldest."""
        token_ids = tuple(place.token_ids[: place.segments[0].length])
        counted = tuple(segment.counted_prompt for segment in place.segments)
        alike = [kept for kept in self._kept if next(self._same(kept.counted, counted))]
        if any(num_common(kept.token_ids, token_ids) == len(token_ids) for kept in alike):
            return
        num_rows = [min(segment.length, len(token_ids)) for segment in place.segments]
        num_bytes = sum(segment.bytes_per_row * rows for segment, rows in zip(place.segments, num_rows, strict=True))
        if self._max_kept < 1 or num_bytes > min(self._max_bytes, available_bytes() // 2):
            return
        beginnings = [kept for kept in alike if num_common(kept.token_ids, token_ids) == len(kept.token_ids)]
        self._kept = [kept for kept in self._kept if kept not in beginnings]
        while len(self._kept) >= self._max_kept or self.host_bytes + num_bytes > self._max_bytes:
            self._kept.pop(0)
        try:
            rows = tuple(segment.save_rows(rows) for segment, rows in zip(place.segments, num_rows, strict=True))
        except OutOfMemoryError:  # the system refused the memory: no reason to refuse the request
            return
        self._kept.append(_Kept(token_ids=token_ids, counted=counted, rows=rows))
