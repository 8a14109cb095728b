"""Preallocated keys and values of several sequences: append rows, keep the accepted ones, drop the rest.

The rows of a cache are cut into segments of equal size, one for each sequence. In a segment, rows [0, length) are committed,
rows [length, length + pending) were appended since, and what lies behind is never read:

    start ............ length ............ length + pending ............ capacity
          committed          pending                        undefined

Layers whose keys and values are of one shape lie in one buffer.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..device import Device
from ..device.host import HostMapping
from ..errors import FitError
from .rope import Rope

# Keys and values of each layer, [1, K, rows, C] each.
Layers = list[tuple[torch.Tensor, ...]]


class _Memory:
    """The buffers of a cache, which its segments know instead of the cache: in a circle, memory would wait for the garbage
    collector, which knows nothing of GiB on a device."""

    def __init__(self, device: Device, layer_shapes: Sequence[tuple[int, int]], num_rows: int, dtype: torch.dtype) -> None:
        self.device = device
        buffers: dict[tuple[int, int], torch.Tensor] = {}  # by shape: [layers, 2, 1, K, rows, C]
        for shape, num_layers in Counter(layer_shapes).items():
            num_kv_heads, head_dim = shape
            num_bytes = num_layers * 2 * num_kv_heads * num_rows * head_dim * dtype.itemsize
            buffer = device.alloc(num_bytes).view(dtype)
            buffers[shape] = buffer.view(num_layers, 2, 1, num_kv_heads, num_rows, head_dim)
        self.buffers = list(buffers.values())
        of_shape = {shape: iter(buffer) for shape, buffer in buffers.items()}
        self.layers: Layers = [tuple(next(of_shape[shape])) for shape in layer_shapes]

    @property
    def bytes_per_row(self) -> int:
        return sum(buffer.nbytes // buffer.shape[-2] for buffer in self.buffers)

    def close(self) -> None:
        self.buffers.clear()
        self.layers.clear()

    def by_row(self, flat: torch.Tensor, num_rows: int) -> list[torch.Tensor]:
        """Views [layers, num_rows, 2, 1, K, C] of `flat`, uint8, which holds `num_rows` rows of each buffer in turn."""
        shapes = [(len(buffer), num_rows, *buffer.shape[1:4], buffer.shape[5]) for buffer in self.buffers]
        sizes = [num_rows * (buffer.nbytes // buffer.shape[-2]) for buffer in self.buffers]
        parts = zip(self.buffers, flat.split(sizes), shapes, strict=True)
        return [part.view(buffer.dtype).view(shape) for buffer, part, shape in parts]


class KVCache:
    """Keys and values of `num_segments` sequences of at most `segment_rows` rows each.

    layer_shapes: (key/value heads K, head dimension C) of every layer.
    """

    def __init__(
        self,
        device: Device,
        *,
        layer_shapes: Sequence[tuple[int, int]],
        num_segments: int,
        segment_rows: int,
        dtype: torch.dtype,
        rope: Rope,
    ) -> None:
        self.rope = rope
        self._memory = _Memory(device, layer_shapes, num_segments * segment_rows, dtype)
        self.segments = tuple(
            Segment(self._memory, rope, start=number * segment_rows, capacity=segment_rows) for number in range(num_segments)
        )

    @property
    def bytes_per_row(self) -> int:
        return self._memory.bytes_per_row

    def appending(self, spans: Sequence[tuple["Segment", int]]) -> "AppendedRows":
        """The `Rows` of a pass over so many new rows of each of these segments, one behind the other. What segments count is
        left alone, so that a pass that fails half-way changes nothing; call `Segment.appended` when it has succeeded."""
        places, begin = [], 0
        for segment, num_rows in spans:
            first = segment.start + segment.rows
            places.append((slice(begin, begin + num_rows), slice(first, first + num_rows)))
            begin += num_rows
        return AppendedRows(self._memory.layers, tuple(places))

    def fixed_rows(self, slots: torch.Tensor) -> "FixedRows":
        """The `Rows` of a pass of a fixed shape: new row i goes to row slots[i] of the cache ([N] int64, on the device)."""
        return FixedRows(tuple(self._memory.layers), slots)

    def close(self) -> None:
        """Give the memory back."""
        self._memory.close()
        for segment in self.segments:
            segment.close()


class Segment:
    """The rows of one sequence: `capacity` rows of a cache, from row `start` of it.

    `counted_prompt` is the prompt's length as it counts for rotary frequencies, see rope.py.
    """

    def __init__(self, memory: _Memory, rope: Rope, *, start: int, capacity: int) -> None:
        self._memory, self._rope = memory, rope
        self.start, self.capacity = start, capacity
        self.length = 0
        self.pending_positions: tuple[int, ...] = ()  # in the text, of pending rows; committed row i is at position i
        self.counted_prompt = 0

    @property
    def pending(self) -> int:
        return len(self.pending_positions)

    @property
    def rows(self) -> int:
        return self.length + self.pending

    @property
    def bytes_per_row(self) -> int:
        return self._memory.bytes_per_row

    # -- the text ---------------------------------------------------------------------------------------------------------

    def begin_text(self, prompt_tokens: int, num_tokens: int) -> None:
        """The rows to come belong to a text of `num_tokens` tokens so far, of which `prompt_tokens` are its prompt."""
        self.counted_prompt = self._rope.counted_prompt(prompt_tokens, num_tokens)

    def grown(self, num_tokens: int) -> None:
        """The text has `num_tokens` tokens now. Where its family computes all rows anew at that length, none are left."""
        counted = self._rope.counted_prompt(self.counted_prompt, num_tokens)
        if counted != self.counted_prompt:
            self.truncate(0)
            self.counted_prompt = counted

    # -- rows -------------------------------------------------------------------------------------------------------------

    def check_room(self, num_rows: int) -> None:
        """FitError when `num_rows` more rows do not fit."""
        if self.rows + num_rows > self.capacity:
            raise FitError(
                f"{self.rows} cached rows + {num_rows} new rows > {self.capacity}",
                where="key/value cache",
                cure="raise --max-context, or ask for fewer tokens or a smaller tree",
            )

    def appended(self, positions: Sequence[int]) -> None:
        """A pass has written one more pending row for each of `positions`, where those tokens stand in the text."""
        self.pending_positions += tuple(positions)

    def commit(self, pending_rows: Sequence[int], kept: Sequence[int] = ()) -> None:
        """Commit these pending rows (ascending, counted from the first pending one) in this order; row i of a segment then
        holds the token at position i. Those of `kept`, ascending and behind them all, stay pending, in their positions and
        right behind what is committed. All others are dropped."""
        wanted = [*pending_rows, *kept]
        assert wanted == sorted(set(wanted)) and max(wanted, default=-1) < self.pending
        first, row = self.start + self.length, 0
        # In place: gathering rows at once would need memory that no plan counts, at a time when a round can no longer be taken
        # back. A piece ends before its own source: what is written there is read no more. Rows that stay are not touched.
        while row < len(wanted):
            distance = wanted[row] - row
            end = row + 1
            while end < len(wanted) and wanted[end] - end == distance and (not distance or end - row < distance):
                end += 1
            if distance:
                for buffer in self._memory.buffers:
                    buffer[..., first + row : first + end, :] = buffer[..., first + row + distance : first + end + distance, :]
            row = end
        self.pending_positions = tuple(self.pending_positions[row] for row in kept)
        self.length += len(pending_rows)

    def truncate(self, length: int) -> None:
        """Forget everything from row `length` on."""
        assert 0 <= length <= self.length
        self.length, self.pending_positions = length, ()

    def save_rows(self, num_rows: int) -> torch.Tensor:
        """The first `num_rows` committed rows, uint8 in host memory of exact size. Waits for the device. HostMemoryError when
        the host has no room."""
        assert num_rows <= self.length
        flat = HostMapping(self.bytes_per_row * num_rows).tensor
        for buffer, saved in zip(self._memory.buffers, self._memory.by_row(flat, num_rows), strict=True):
            by_row = buffer.movedim(-2, 1)[:, self.start : self.start + num_rows]  # [layers, num_rows, 2, 1, K, C]
            for layer in range(len(saved)):
                saved[layer] = self._memory.device.download(by_row[layer])
        return flat

    def load_rows(self, saved: torch.Tensor, length: int) -> None:
        """Extend the committed rows to `length`, or as far as they go, from what `save_rows` made of a sequence that begins
        with the same tokens. One copy a layer: in the cache a layer's rows lie apart, in a scratch side by side."""
        num_saved = saved.numel() // self.bytes_per_row
        begin, end = self.length, min(length, num_saved)
        if begin >= end:
            return
        device, places, sources = self._memory.device, list[torch.Tensor](), list[torch.Tensor]()
        for buffer, rows in zip(self._memory.buffers, self._memory.by_row(saved, num_saved), strict=True):
            places += buffer.movedim(-2, 1)[:, self.start + begin : self.start + end]  # [end - begin, 2, 1, K, C] a layer
            sources += rows[:, begin:end]
        scratch_bytes = max(source.nbytes for source in sources)
        scratch, free = torch.empty(scratch_bytes, dtype=torch.uint8, device=places[0].device), device.mark()
        try:
            for place, source in zip(places, sources, strict=True):
                ticket = device.copy_async(scratch[: source.nbytes], source.view(-1).view(torch.uint8), free)
                place.copy_(device.wait(ticket).view(place.dtype).view(place.shape))
                free = device.release(scratch)
        except BaseException:
            device.drain_copies()  # into a scratch that is about to go
            raise
        self.length, self.pending_positions = end, ()

    def clear_tail(self) -> None:
        """Fill every row that holds nothing with zeros."""
        self._fill_tail(0.0)

    def poison_tail(self) -> None:
        """Fill every row that must not be read with NaN (tests)."""
        self._fill_tail(torch.nan)

    def close(self) -> None:
        """Of a cache that is closed: there are no rows any more."""
        self.length = self.capacity = 0
        self.pending_positions = ()

    def _fill_tail(self, value: float) -> None:
        for buffer in self._memory.buffers:
            buffer[..., self.start + self.rows : self.start + self.capacity, :] = value


@dataclass(frozen=True, slots=True)
class AppendedRows:
    """Where the keys and values of a pass go: rows `places[i][0]` of the pass to rows `places[i][1]` of the cache."""

    layers: Layers
    places: tuple[tuple[slice, slice], ...]

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in [1, K, N, C]; returns all rows of the cache, [1, K, rows, C] each."""
        keys, values = self.layers[layer]
        for new, place in self.places:
            keys[:, :, place] = key[:, :, new]
            values[:, :, place] = value[:, :, new]
        return keys, values


@dataclass(frozen=True, slots=True)
class FixedRows:
    """The same where no shape or address may depend on how full the cache is."""

    layers: tuple[tuple[torch.Tensor, ...], ...]  # as in Layers; a recording holds them as long as it lives
    slots: torch.Tensor  # [N] int64, on the device

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in [1, K, N, C]; returns all rows of the cache, [1, K, rows, C] each."""
        keys, values = self.layers[layer]
        keys.index_copy_(2, self.slots, key)
        values.index_copy_(2, self.slots, value)
        return keys, values
