"""Conversations that a request may go on from: one whose keys and values are on the device, copies of others in host memory.

Knows token ids and caches, not text: what may be reused is decided token by token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..device.host import available_bytes
from ..errors import OutOfMemoryError
from ..model.kv_cache import KVCache
from ..model.rope import Rope
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Kept:
    """`rows` has a host copy for each cache; `token_ids` are those of the first cache's rows, computed for
    prompts of the lengths `counted`, one for each cache."""

    token_ids: tuple[int, ...]
    counted: tuple[int, ...]
    rows: tuple[torch.Tensor, ...]

    @property
    def num_bytes(self) -> int:
        return sum(rows.nbytes for rows in self.rows)


class Sessions:
    """`caches` are the target's and, with a draft, the draft's; `ropes` are theirs. The caches belong to the sequence that is
    being decoded, and each holds the rows of some prefix of it. At most `max_kept` other sequences are kept, in `max_bytes` of
    host memory; the one not asked for longest goes first."""

    def __init__(self, caches: Sequence[KVCache], ropes: Sequence[Rope], *, max_bytes: int, max_kept: int = MAX_KEPT) -> None:
        self._caches, self._ropes, self._max_bytes, self._max_kept = tuple(caches), tuple(ropes), max_bytes, max_kept
        self._counted = (0,) * len(self._caches)  # see rope.py; of the sequence that the caches hold
        self._kept: list[_Kept] = []  # least recently used first

    @property
    def host_bytes(self) -> int:
        return sum(kept.num_bytes for kept in self._kept)

    def resume(self, live: list[int], text: Sequence[int], prompt_tokens: int) -> int:
        """Fill the caches with what is known of `text`, its last token excepted, which must go through a pass; `live`, the
        tokens of the sequence that they hold, becomes `text`, which began with a prompt of `prompt_tokens`. Returns the rows
        that the target has.

        At every moment the caches hold rows of a prefix of `live`, so an interruption leaves nothing wrong behind.
        """
        wanted, target = text[:-1], self._caches[0]
        common = num_common(live, wanted)
        counted = tuple(rope.counted_prompt(prompt_tokens, len(text)) for rope in self._ropes)
        usable = [common if same else 0 for same in self._same_groups(self._counted, counted)]
        best = self._longest(wanted, counted, min(usable[0], target.length))
        if target.length - usable[0] >= MIN_KEPT_ROWS:
            self._keep(tuple(live[: target.length]))
        for cache, rows in zip(self._caches, usable, strict=True):
            cache.truncate(min(cache.length, rows))
        live[:] = text
        self._counted = counted
        if best is not None:
            common = num_common(best.token_ids, wanted)
            for cache, saved, same in zip(self._caches, best.rows, self._same_groups(best.counted, counted), strict=True):
                cache.load_rows(saved, common if same else 0)
        return target.length

    def grown(self, num_tokens: int) -> None:
        """The sequence has `num_tokens` tokens now, and caches whose family starts over there have been emptied."""
        self._counted = tuple(map(Rope.counted_prompt, self._ropes, self._counted, [num_tokens] * len(self._ropes)))

    def limit(self, max_bytes: int) -> None:
        """From now on at most `max_bytes`; what is more goes at once."""
        self._max_bytes = max_bytes
        while self.host_bytes > max_bytes:
            self._kept.pop(0)

    def forget(self) -> None:
        """Drop every sequence, the one on the device, too."""
        self._kept.clear()
        for cache in self._caches:
            cache.truncate(0)

    def _same_groups(self, one: Sequence[int], other: Sequence[int]) -> list[bool]:
        """For each cache, whether prompts of these lengths have the same frequencies in it."""
        return [rope.group(a) == rope.group(b) for rope, a, b in zip(self._ropes, one, other, strict=True)]

    def _longest(self, wanted: Sequence[int], counted: Sequence[int], least: int) -> _Kept | None:
        """The kept sequence that has most of `wanted`, more than `least` tokens of it; it is now the last to go."""
        alike = [kept for kept in self._kept if self._same_groups(kept.counted, counted)[0]]
        best = max(alike, key=lambda kept: num_common(kept.token_ids, wanted), default=None)
        if best is None or num_common(best.token_ids, wanted) <= least:
            return None
        self._kept = [*(kept for kept in self._kept if kept is not best), best]
        return best

    def _keep(self, token_ids: tuple[int, ...]) -> None:
        """Copy the caches to the host, unless a copy has it all, or nothing could make room. Copies of its beginnings go for
        it, then the oldest."""
        alike = [kept for kept in self._kept if self._same_groups(kept.counted, self._counted)[0]]
        if any(num_common(kept.token_ids, token_ids) == len(token_ids) for kept in alike):
            return
        num_rows = [min(cache.length, len(token_ids)) for cache in self._caches]
        num_bytes = sum(cache.bytes_per_row * rows for cache, rows in zip(self._caches, num_rows, strict=True))
        if self._max_kept < 1 or num_bytes > min(self._max_bytes, available_bytes() // 2):
            return
        beginnings = [kept for kept in alike if num_common(kept.token_ids, token_ids) == len(kept.token_ids)]
        self._kept = [kept for kept in self._kept if kept not in beginnings]
        while len(self._kept) >= self._max_kept or self.host_bytes + num_bytes > self._max_bytes:
            self._kept.pop(0)
        try:
            rows = tuple(cache.save_rows(rows) for cache, rows in zip(self._caches, num_rows, strict=True))
        except OutOfMemoryError:  # the system refused the memory: no reason to refuse the request
            return
        self._kept.append(_Kept(token_ids=token_ids, counted=self._counted, rows=rows))
