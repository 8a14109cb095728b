"""Passes of a few fixed shapes, which a device records once, ahead, and replays: a level of a small draft takes the GPU less
time than Python takes to launch its kernels. Recording stops the device, so no round does it: what was not foreseen is
computed as it comes.

A pass of n rows over a cache of m is padded to the next bucket of both. Padding repeats the last row, its position, mask and
slot included: it writes what that row writes anyway, is seen by nobody, and needs no rows of its own. All that varies between
passes of one shape lies in buffers which stay where they are, and those of all shapes are the beginnings of the same ones: what
recordings keep does not grow with their number.
"""

import itertools
from collections.abc import Callable, Iterable

import torch

from ..device import Device
from .buckets import rows_bucket, rows_buckets, width_bucket
from .causal_lm import CausalLM


class FixedPasses:
    """The passes of `model`, whose layers are resident, of at most `max_rows` rows: what `prepare` has recorded is replayed.
    Keeps the bytes of `planner.cost.recording_bytes`."""

    def __init__(self, model: CausalLM, device: Device, max_rows: int) -> None:
        self._model, self._device, self.max_rows = model, device, max_rows
        self._token_ids, self._positions, self._slots = device.alloc(3 * max_rows * 8).view(torch.int64).view(3, max_rows)
        self._mask = device.alloc(max_rows * model.cache.capacity).view(torch.bool)
        vocab_size = model.architecture.vocab_size
        self._logits = device.alloc(max_rows * vocab_size * model.dtype.itemsize).view(model.dtype).view(max_rows, vocab_size)
        self._replays: dict[tuple[int, int], Callable[[], None]] = {}  # by new rows and attended rows
        self.restart()

    def restart(self) -> None:
        """Another sequence. Rows that are masked take part in a pass with weight 0, so they must not hold NaN."""
        self._model.cache.clear_tail()

    def prepare(self, widths: Iterable[int]) -> None:
        """Record passes of these numbers of rows, at every length of the cache, unless they are. The largest come first: the
        others find room where those lay. Recording computes, from inputs that mean nothing: it takes a row of the cache that
        holds nothing. What parameters hold does not matter, only where they lie."""
        cache = self._model.cache
        cache.check_room(1)
        for buffer, value in ((self._token_ids, 0), (self._positions, 0), (self._slots, cache.rows), (self._mask, 1)):
            buffer.fill_(value)
        shapes = itertools.product(
            {width_bucket(rows) for rows in widths if rows <= self.max_rows}, rows_buckets(cache.capacity)
        )
        for width, num_attended in sorted(set(shapes) - set(self._replays), reverse=True):
            self._replays[width, num_attended] = self._device.record(self._work(width, num_attended))
        cache.clear_tail()

    def has(self, num_rows: int) -> bool:
        """Whether the next pass, over `num_rows` rows, is recorded."""
        return self._shape_of(num_rows) in self._replays

    def run(self, token_ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """As CausalLM.forward, but float32 logits of all rows; those of later passes do not overwrite them."""
        cache, num_rows = self._model.cache, len(token_ids)
        cache.check_room(num_rows)
        width, num_attended = self._shape_of(num_rows)
        slots = torch.arange(cache.rows, cache.rows + num_rows, device=self._slots.device)
        for buffer, values in ((self._token_ids, token_ids), (self._positions, positions), (self._slots, slots)):
            buffer[:num_rows] = values
            buffer[num_rows:width] = values[-1]
        fixed_mask = self._mask_of(width, num_attended)
        fixed_mask[..., mask.shape[-1] :] = False
        fixed_mask[:, :, :num_rows, : mask.shape[-1]] = mask
        fixed_mask[:, :, num_rows:] = fixed_mask[:, :, num_rows - 1 : num_rows]
        self._replays[width, num_attended]()
        cache.appended(num_rows)
        return self._logits[:num_rows].to(torch.float32, copy=True)

    def _shape_of(self, num_rows: int) -> tuple[int, int]:
        cache = self._model.cache
        return width_bucket(num_rows), rows_bucket(cache.rows + num_rows, cache.capacity)

    def _work(self, width: int, num_attended: int) -> Callable[[], None]:
        """The pass of this shape, from the buffers to the buffers. It does not know this object, which holds it."""
        model, mask, logits = self._model, self._mask_of(width, num_attended), self._logits[:width]
        token_ids, positions, slots = self._token_ids[:width], self._positions[:width], self._slots[:width]
        rows = model.cache.fixed_rows(slots, num_attended)

        def work() -> None:
            logits.copy_(model.compute(token_ids, positions, mask, width, rows))

        return work

    def _mask_of(self, width: int, num_attended: int) -> torch.Tensor:
        return self._mask[: width * num_attended].view(1, 1, width, num_attended)
