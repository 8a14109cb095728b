"""Passes of a few fixed shapes, which a device can record once and replay: a level of a small draft takes the GPU less time
than Python takes to launch its kernels.

A pass of n rows over a cache of m is padded to the next bucket of both. Padding repeats the last row, its position, mask and
slot included: it writes what that row writes anyway, is seen by nobody, and needs no rows of its own. All that varies between
passes of one shape lies in buffers which stay where they are.
"""

from collections.abc import Callable

import torch

from ..device import Device
from .causal_lm import CausalLM

MAX_ROWS = 512  # of one pass; beyond, computing takes longer than launching, and padding would cost more than it saves
MAX_UNWANTED = 64  # logits that are computed for rows whose logits nobody asked for; reading a prompt is not worth recording
POWERS_UP_TO = 64  # buckets of new rows: powers of two, then multiples of this
LEAST_CACHED_ROWS = 512  # buckets of attended rows: powers of two from here to the cache's capacity


class FixedPasses:
    """The passes of `model`, whose layers are resident: recorded when a shape is first needed, then replayed."""

    def __init__(self, model: CausalLM, device: Device) -> None:
        self._model, self._device = model, device
        self._passes: dict[tuple[int, int], _Pass] = {}  # by new rows and attended rows
        self.restart()

    def restart(self) -> None:
        """Another sequence. Rows that are masked take part in a pass with weight 0, so they must not hold NaN."""
        self._model.cache.clear_tail()

    def suit(self, num_rows: int, num_logits: int) -> bool:
        """Whether a pass like this is worth recording."""
        return num_rows <= MAX_ROWS and num_rows - num_logits <= MAX_UNWANTED

    def run(self, token_ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """As CausalLM.forward, but float32 logits of all rows; those of later passes do not overwrite them."""
        cache = self._model.cache
        cache.check_room(len(token_ids))
        shape = width_bucket(len(token_ids)), rows_bucket(cache.rows + len(token_ids), cache.capacity)
        fixed = self._passes.get(shape)
        if fixed is None:
            fixed = self._passes[shape] = _Pass(self._model, self._device, *shape)
        logits = fixed.run(token_ids, positions, cache.rows, mask)
        cache.appended(len(token_ids))
        return logits


class _Pass:
    """The pass of one shape: its inputs, its output, and the recording that leads from one to the other."""

    def __init__(self, model: CausalLM, device: Device, width: int, num_rows: int) -> None:
        self._model, self._device, self._width = model, device, width
        self._token_ids, self._positions, self._slots = torch.zeros(3, width, dtype=torch.int64, device=device.torch_device)
        self._mask = torch.zeros(1, 1, width, num_rows, dtype=torch.bool, device=device.torch_device)
        self._rows = model.cache.fixed_rows(self._slots, num_rows)
        self._logits: torch.Tensor | None = None
        self._replay: Callable[[], None] | None = None

    def run(self, token_ids: torch.Tensor, positions: torch.Tensor, first_slot: int, mask: torch.Tensor) -> torch.Tensor:
        num_rows = len(token_ids)
        slots = torch.arange(first_slot, first_slot + num_rows, device=self._slots.device)
        for buffer, values in ((self._token_ids, token_ids), (self._positions, positions), (self._slots, slots)):
            buffer[:num_rows] = values
            buffer[num_rows:] = values[-1]
        self._mask[..., mask.shape[-1] :] = False
        self._mask[:, :, :num_rows, : mask.shape[-1]] = mask
        self._mask[:, :, num_rows:] = self._mask[:, :, num_rows - 1 : num_rows]
        if self._replay is None:  # only now, since recording computes, and with these inputs it may
            self._replay = self._device.record(self._compute)
        self._replay()
        assert self._logits is not None
        return self._logits[:num_rows].to(torch.float32, copy=True)

    def _compute(self) -> None:
        self._logits = self._model.compute(self._token_ids, self._positions, self._mask, self._width, self._rows)


def waits_in_a_pass(config: object) -> bool:
    """Whether a model of this config asks the device something in the middle of a pass, which cannot be recorded: rotary
    embeddings that change with the length of the text do."""
    parameters = str(getattr(config, "rope_parameters", ""))  # which some families nest by kind of layer
    return any(kind in parameters for kind in ("dynamic", "longrope"))


def width_bucket(num_rows: int) -> int:
    """The rows that a pass of `num_rows` is padded to."""
    if num_rows <= POWERS_UP_TO:
        return _power_of_two(num_rows)
    return -(-num_rows // POWERS_UP_TO) * POWERS_UP_TO


def rows_bucket(num_rows: int, capacity: int) -> int:
    """How many cached rows a pass attends to that needs the first `num_rows` of them."""
    return min(max(_power_of_two(num_rows), LEAST_CACHED_ROWS), capacity)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
