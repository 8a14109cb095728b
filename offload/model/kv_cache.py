"""Preallocated keys and values of one sequence: append rows, keep the accepted ones, drop the rest.

Rows [0, length) are committed, rows [length, length + pending) were appended since, and what lies behind is never read:

    0 ............ length ............ length + pending ............ capacity
      committed          pending                    undefined
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..device import Device
from ..device.host import HostMapping
from ..errors import FitError


class KVCache:
    """Keys and values [layers, 2, 1, K, capacity, C] of one sequence on `device`; the `Rows` of passes of any shape."""

    def __init__(
        self, device: Device, *, num_layers: int, num_kv_heads: int, head_dim: int, capacity: int, dtype: torch.dtype
    ) -> None:
        self._device = device
        shape = (num_layers, 2, 1, num_kv_heads, capacity, head_dim)
        self._kv = device.alloc(num_bytes(num_layers, num_kv_heads, head_dim, capacity, dtype)).view(dtype).view(shape)
        self.capacity = capacity
        self.length = 0
        self.pending = 0

    @property
    def rows(self) -> int:
        return self.length + self.pending

    @property
    def bytes_per_row(self) -> int:
        return self._kv.nbytes // self.capacity

    def check_room(self, num_rows: int) -> None:
        """FitError when `num_rows` more rows do not fit."""
        if self.rows + num_rows > self.capacity:
            raise FitError(
                f"{self.rows} cached rows + {num_rows} new rows > {self.capacity}",
                where="key/value cache",
                cure="raise --max-context, or ask for fewer tokens or a smaller tree",
            )

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [1, K, N, C] behind the pending rows; returns [1, K, rows + N, C] views. `pending` is left alone, so that a
        pass that fails half-way leaves the cache as it was; call `appended` when it has succeeded."""
        end = self.rows + key.shape[2]
        keys, values = self._kv[layer]  # [1, K, capacity, C] each
        keys[:, :, self.rows : end] = key
        values[:, :, self.rows : end] = value
        return keys[:, :, :end], values[:, :, :end]

    def appended(self, num_rows: int) -> None:
        self.pending += num_rows

    def commit(self, pending_rows: Sequence[int]) -> None:
        """Keep these pending rows (ascending, counted from the first pending one) in this order; drop the others."""
        assert list(pending_rows) == sorted(set(pending_rows)) and max(pending_rows, default=-1) < self.pending
        # Row by row, in place: gathering them at once would need memory that no plan counts, at a time when a round can no
        # longer be taken back. Rows that stay where they are, such as a prompt's, are not touched.
        for row, pending in enumerate(pending_rows):
            if row != pending:
                self._kv[..., self.length + row, :] = self._kv[..., self.length + pending, :]
        self.length += len(pending_rows)
        self.pending = 0

    def truncate(self, length: int) -> None:
        """Forget everything from row `length` on."""
        assert 0 <= length <= self.length
        self.length, self.pending = length, 0

    def save_rows(self, num_rows: int) -> torch.Tensor:
        """The first `num_rows` committed rows, [layers, num_rows, 2, 1, K, C] in host memory of exact size. Waits for the
        device. HostMemoryError when the host has no room."""
        assert num_rows <= self.length
        by_row = self._kv.movedim(-2, 1)  # [layers, capacity, 2, 1, K, C]
        saved = HostMapping(self.bytes_per_row * num_rows).tensor.view(self._kv.dtype)
        saved = saved.view(by_row.shape[0], num_rows, *by_row.shape[2:])
        for layer in range(len(saved)):
            saved[layer] = self._device.download(by_row[layer, :num_rows])
        return saved

    def load_rows(self, saved: torch.Tensor, length: int) -> None:
        """Extend the committed rows to `length`, or as far as they go, from what `save_rows` made of a sequence that begins
        with the same tokens. One copy a layer: in the cache a layer's rows lie apart, in a scratch side by side."""
        begin, end = self.length, min(length, saved.shape[1])
        if begin >= end:
            return
        by_row, sources = self._kv.movedim(-2, 1)[:, begin:end], saved[:, begin:end]
        scratch, free = torch.empty(sources[0].nbytes, dtype=torch.uint8, device=self._kv.device), self._device.mark()
        try:
            for place, source in zip(by_row, sources, strict=True):
                ticket = self._device.copy_async(scratch, _bytes_of(source), free)
                place.copy_(self._device.wait(ticket).view(saved.dtype).view(place.shape))
                free = self._device.release(scratch)
        except BaseException:
            self._device.drain_copies()  # into a scratch that is about to go
            raise
        self.length, self.pending = end, 0

    def close(self) -> None:
        """Give the memory back."""
        self._kv = self._kv.new_empty(0)
        self.length = self.pending = self.capacity = 0

    def clear_tail(self) -> None:
        """Fill every row that holds nothing with zeros."""
        self._kv[..., self.rows :, :] = 0

    def fixed_rows(self, slots: torch.Tensor, num_rows: int) -> "FixedRows":
        """These rows for passes of a fixed shape, which leave `length` and `pending` to the caller."""
        return FixedRows(self._kv, slots, num_rows)

    def poison_tail(self) -> None:
        """Fill every row that must not be read with NaN (tests)."""
        self._kv[..., self.rows :, :] = torch.nan


@dataclass(frozen=True, slots=True)
class FixedRows:
    """What a layer needs of the cache when no shape or address may depend on how full it is. New row i goes to row
    slots[i] ([N] int64, on the device); every pass attends to the first `num_rows` rows, under its mask."""

    kv: torch.Tensor  # [layers, 2, 1, K, capacity, C]
    slots: torch.Tensor
    num_rows: int

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [1, K, N, C] to the slots; returns [1, K, num_rows, C] views."""
        keys, values = self.kv[layer]
        keys.index_copy_(2, self.slots, key)
        values.index_copy_(2, self.slots, value)
        return keys[:, :, : self.num_rows], values[:, :, : self.num_rows]


def num_bytes(num_layers: int, num_kv_heads: int, head_dim: int, capacity: int, dtype: torch.dtype) -> int:
    return num_layers * 2 * num_kv_heads * capacity * head_dim * dtype.itemsize


def _bytes_of(rows: torch.Tensor) -> torch.Tensor:
    """The same memory, [num_bytes] uint8; `rows` are contiguous."""
    return rows.view(-1).view(torch.uint8)
