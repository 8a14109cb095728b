"""Models of a few layers full of noise: what a forward pass takes, without the model whose layers they are."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from tree.shape import TreeShape

from ..config import SamplingKind
from ..device import Device, Ticket
from ..model.architecture import shortened
from ..model.attention import pass_mask
from ..model.causal_lm import CausalLM
from ..model.drafter import ModelDrafter
from ..model.kv_cache import KVCache
from ..model.masks import TreeMasks
from ..planner.hardware import Role
from ..source import TypedModel
from ..weights.layout import lay_out, views_of_each
from .draft_levels import growing_levels, num_levels, peaked_logits, tree_of_levels
from .effort import Effort
from .stopwatch import Work

# Layers share weights, from several buffers in turn, so that those of a small model do not stay in a cache.
FEW_LAYERS, MORE_LAYERS = 1, 3
ROTATED_BYTES = 2**26
NOISE_NUMBERS = 2**18


class _Repeated:
    """A weight source: `num_layers` layers, each as it lies in one of a few `buffers`, which are used in turn, across passes;
    each comes after `late_s`."""

    def __init__(self, device: Device, buffers: Sequence[Sequence[Mapping[str, torch.Tensor]]], num_layers: int) -> None:
        self._device, self._buffers, self._num_layers, self._next = device, buffers, num_layers, 0
        self.late_s = 0.0
        self.came: Ticket | None = None  # when the last layer did

    def one_pass(self) -> Iterator[Mapping[str, torch.Tensor]]:
        for layer in range(self._num_layers):
            if self.late_s:
                time.sleep(self.late_s)
            self.came = self._device.mark()
            self._next = (self._next + 1) % len(self._buffers)
            yield self._buffers[self._next][layer]


class ShortModel:
    """A model of a few layers, ready to be timed."""

    def __init__(self, device: Device, role: Role, model: CausalLM, weights: _Repeated) -> None:
        self._device, self._model, self._weights = device, model, weights
        is_draft, vocab_size = role == "draft", model.architecture.vocab_size
        self._drafter = ModelDrafter(model, device, vocab_size, TreeMasks(device)) if is_draft else None

    def close(self) -> None:
        if self._drafter is not None:
            self._drafter.close()
        else:
            self._model.close()

    def work(self, rows: int, context_rows: int, sampling: SamplingKind) -> Work:
        """A pass over `rows` nodes; of a draft, getting from one level of as many to the next."""
        self._look_back_on(context_rows)
        if self._drafter is None:
            return Work(self._pass(rows, context_rows))
        self._drafter.restart([0] * (context_rows + 1), context_rows + 1)
        vocab_size = self._model.architecture.vocab_size
        self._drafter.prepare(tree_of_levels(rows, vocab_size))
        model = _AlwaysTheSame(self._drafter, context_rows, peaked_logits(self._device, rows, vocab_size))
        return growing_levels(self._device, model, rows, vocab_size, sampling)

    def waiting(self, rows: int, context_rows: int, late_s: float) -> Work:
        """From the arrival of the last layer, which comes after `late_s`, to the end of a pass."""
        self._look_back_on(context_rows)
        forward = self._pass(rows, context_rows)

        def run() -> Ticket | None:
            self._weights.late_s = late_s
            forward()
            return self._weights.came

        return Work(run)

    def _look_back_on(self, context_rows: int) -> None:
        self._weights.late_s = 0.0
        self._model.cache.truncate(0)
        self._model.cache.length = context_rows

    def _pass(self, rows: int, context_rows: int) -> Callable[[], None]:
        token_ids = self._device.upload(torch.zeros(rows, dtype=torch.int64))
        positions = self._device.upload(torch.full((rows,), context_rows))
        tree_mask = self._device.upload(torch.ones(rows, rows, dtype=torch.bool).tril())
        mask = pass_mask(context_rows, 0, tree_mask)

        def forward() -> None:
            self._model.forward(token_ids, positions, mask, rows)
            self._model.cache.truncate(context_rows)

        return forward


class _AlwaysTheSame:
    """A drafter that has never read more than `context_rows` tokens when a tree begins, and whose logits are those of a model
    that knows something: noise multiplied with noise would make all tokens equally probable."""

    def __init__(self, drafter: ModelDrafter, context_rows: int, logits: torch.Tensor) -> None:
        self._drafter, self._context_rows, self._logits = drafter, context_rows, logits

    def begin(self, shape: TreeShape) -> torch.Tensor:
        self._drafter.cache.truncate(self._context_rows)
        return self._logits[: len(self._drafter.begin(shape))]

    def expand(self, nodes: tuple[int, ...], token_ids: torch.Tensor) -> torch.Tensor:
        return self._logits[: len(self._drafter.expand(nodes, token_ids))]


def short_models(device: Device, model: TypedModel, role: Role, effort: Effort) -> tuple[ShortModel, ShortModel]:
    """One of FEW_LAYERS and one of MORE_LAYERS, on the same noise, with room for all that `effort` has them do."""
    architectures = {num_layers: shortened(model.architecture, num_layers) for num_layers in (FEW_LAYERS, MORE_LAYERS)}
    layouts, outside = lay_out(architectures[MORE_LAYERS].layer_shapes, model.dtype), model.outside_layout
    layer_bytes = max(layout.num_bytes for layout in layouts)
    num_buffers = max(1, min(model.architecture.num_layers, ROTATED_BYTES // layer_bytes))
    buffers = [views_of_each(layouts, _noise(device, layer_bytes, model.dtype)) for _ in range(num_buffers)]
    outside_views = outside.views(_noise(device, outside.num_bytes, model.dtype))
    new_rows = max(rows * (num_levels(rows) if role == "draft" else 1) for rows in effort.rows)

    def short(num_layers: int) -> ShortModel:
        architecture = architectures[num_layers]
        cache = KVCache(
            device,
            num_layers=num_layers,
            num_kv_heads=architecture.num_kv_heads,
            head_dim=architecture.head_dim,
            capacity=max(effort.contexts) + 1 + new_rows,
            dtype=model.dtype,
        )
        weights = _Repeated(device, buffers, num_layers)
        return ShortModel(device, role, CausalLM(architecture, device, model.dtype, outside_views, weights, cache), weights)

    return short(FEW_LAYERS), short(MORE_LAYERS)


def _noise(device: Device, num_bytes: int, dtype: torch.dtype) -> torch.Tensor:
    """Device memory full of small random numbers: zeros would multiply faster than weights do on some devices."""
    buffer = device.alloc(num_bytes)
    numbers = buffer[: num_bytes // dtype.itemsize * dtype.itemsize].view(dtype)
    noise = torch.randn(NOISE_NUMBERS, generator=torch.Generator().manual_seed(0))
    block = device.upload((noise * 0.02).to(dtype))
    for part in numbers.split(NOISE_NUMBERS):
        part.copy_(block[: len(part)])
    return buffer
