"""Passes of a few fixed shapes, which a device records as CUDA graphs, once and ahead, and replays: a level of a small draft
takes the GPU less time than Python takes to launch its kernels. Recording stops the device, so no round does it: what was not
foreseen is computed as it comes.

A pass of n rows over m rows of a segment is padded to the next bucket of both. Padding repeats the last row, its position,
masks and slot included: it writes what that row writes anyway, is seen by nobody, and needs no rows of its own. All that varies
between passes of one shape lies in buffers which stay where they are. Those of all shapes are the beginnings of the same ones:
what recordings keep does not grow with their number.
"""

import itertools
from collections.abc import Callable, Iterable

import torch

from ..device import Device
from .attention import Block
from .buckets import rows_bucket, rows_buckets, width_bucket
from .causal_lm import CausalLM
from .kv_cache import Segment
from .pass_inputs import Part, PassInputs


class FixedPasses:
    """The passes of `model`, whose layers are resident, of one part of at most `max_rows` rows: what `prepare` has recorded is
    replayed. Keeps the bytes of `planner.cost.recording_bytes`, and one more mask for each further window of the layers."""

    def __init__(self, model: CausalLM, device: Device, max_rows: int) -> None:
        self._model, self._device, self.max_rows = model, device, max_rows
        self._segments, capacity = model.cache.segments, model.cache.segments[0].capacity
        numbers = device.alloc(4 * max_rows * 8).view(torch.int64).view(4, max_rows)
        self._token_ids, self._positions, self._counted_prompts, self._slots = numbers  # [max_rows] each
        windows = set(model.architecture.windows)
        self._masks = {window: device.alloc(max_rows * capacity).view(torch.bool) for window in windows}
        vocab_size = model.architecture.vocab_size
        logits = device.alloc(max_rows * vocab_size * model.dtype.itemsize).view(model.dtype)
        self._logits = logits.view(max_rows, vocab_size)
        self._replays: dict[tuple[int, int, int], Callable[[], None]] = {}  # by new rows, attended rows, start of the segment
        for segment in self._segments:
            self.restart(segment)

    def restart(self, segment: Segment) -> None:
        """Another sequence. Rows that are masked take part in a pass with weight 0, so they must not hold NaN."""
        segment.clear_tail()

    def prepare(self, widths: Iterable[int]) -> None:
        """Record passes of these numbers of rows, at every length of every segment, unless they are. The largest come first:
        the others find room where those lay. Recording computes, from inputs that mean nothing: it takes a row of the segment
        that holds nothing. What parameters hold does not matter, only where they lie."""
        capacity = self._segments[0].capacity
        lengths = itertools.product({width_bucket(rows) for rows in widths if rows <= self.max_rows}, rows_buckets(capacity))
        for width, num_attended in sorted(lengths, reverse=True):
            for segment in self._segments:
                shape = width, num_attended, segment.start
                if shape not in self._replays:
                    self._fill(segment)
                    self._replays[shape] = self._device.record(self._work(*shape))
                    segment.clear_tail()

    def has(self, part: Part) -> bool:
        """Whether a pass over `part` is recorded."""
        return self._shape_of(part) in self._replays

    def run(self, part: Part) -> torch.Tensor:
        """As CausalLM.forward, but float32 logits of all rows of the part, [n, V]; later passes do not overwrite them."""
        segment, num_rows, shape = part.segment, part.num_rows, self._shape_of(part)
        segment.check_room(num_rows)
        inputs, (width, num_attended, _) = self._model.inputs((part,)), shape
        first = segment.start + segment.rows
        slots = torch.arange(first, first + num_rows, device=self._slots.device)
        for buffer, values in (
            (self._token_ids, inputs.token_ids),
            (self._positions, inputs.positions),
            (self._counted_prompts, inputs.counted_prompts),
            (self._slots, slots),
        ):
            if values is not None:
                buffer[:num_rows] = values
                buffer[num_rows:width] = values[-1]
        for window, (block,) in inputs.masks.items():
            fixed_mask, mask = self._mask_of(window, width, num_attended), block.mask
            fixed_mask[..., mask.shape[-1] :] = False
            fixed_mask[:, :, :num_rows, : mask.shape[-1]] = mask
            fixed_mask[:, :, num_rows:] = fixed_mask[:, :, num_rows - 1 : num_rows]
        self._replays[shape]()
        segment.appended(part.positions)
        return self._logits[:num_rows].to(torch.float32, copy=True)

    def _shape_of(self, part: Part) -> tuple[int, int, int]:
        segment, num_rows = part.segment, part.num_rows
        return width_bucket(num_rows), rows_bucket(segment.rows + num_rows, segment.capacity), segment.start

    def _fill(self, segment: Segment) -> None:
        """Inputs to record with."""
        segment.check_room(1)
        self._slots.fill_(segment.start + segment.rows)
        for buffer in (self._token_ids, self._positions, self._counted_prompts):
            buffer.zero_()
        for mask in self._masks.values():
            mask.fill_(True)

    def _work(self, width: int, num_attended: int, start: int) -> Callable[[], None]:
        """The pass of this shape, from the buffers to the buffers. It holds them, and not this object, which holds it."""
        model, logits = self._model, self._logits[:width]
        rows, keys = slice(width), slice(start, start + num_attended)
        inputs = PassInputs(
            token_ids=self._token_ids[:width],
            positions=self._positions[:width],
            counted_prompts=self._counted_prompts[:width],
            masks={window: (Block(rows, keys, self._mask_of(window, width, num_attended)),) for window in self._masks},
            logit_rows=width,
        )
        cached = model.cache.fixed_rows(self._slots[:width])

        def work() -> None:
            logits.copy_(model.compute(inputs, cached))

        return work

    def _mask_of(self, window: int | None, width: int, num_attended: int) -> torch.Tensor:
        return self._masks[window][: width * num_attended].view(1, 1, width, num_attended)
