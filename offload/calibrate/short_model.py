"""Models of a few layers full of noise: what a forward pass takes, without the model whose layers they are."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from tree.aim import Aim
from tree.shape import TreeShape

from ..coding.base_layout import base_parts, base_prefix
from ..config import SamplingKind
from ..device import Device, Ticket
from ..model.architecture import Architecture, shortened
from ..model.base_model import base_architecture
from ..model.buckets import MAX_ROWS
from ..model.causal_lm import CausalLM
from ..model.drafter import PROMPT_CHUNK_TOKENS, ModelContext, ModelDrafter
from ..model.kv_cache import KVCache
from ..model.pass_inputs import Part
from ..planner.hardware import Role
from ..streaming.stream import BeforeLayer
from ..typed_model import TypedModel, base_draft
from ..weights.layout import LayerLayout
from .draft_levels import growing_levels, num_levels, peaked_logits, tree_of_levels
from .effort import Effort
from .stopwatch import Work

# Layers share weights, from several buffers in turn, so that those of a small model do not stay in a cache.
FEW_LAYERS, MORE_LAYERS = 1, 3
ROTATED_BYTES = 2**26
NOISE_NUMBERS = 2**18
BASE_SCALE = f"{base_prefix('weight')}scale"
SCALE = 1e-4


class _Repeated:
    """A weight source: `num_layers` layers, each as it lies in one of a few `buffers`, which are used in turn, across passes;
    each comes after `late_s`."""

    def __init__(self, device: Device, buffers: Sequence[Sequence[Mapping[str, torch.Tensor]]], num_layers: int) -> None:
        self._device, self._buffers, self._num_layers, self._next = device, buffers, num_layers, 0
        self.late_s = 0.0
        self.came: Ticket | None = None  # when the last layer did

    def one_pass(self, before_layer: BeforeLayer | None = None) -> Iterator[Mapping[str, torch.Tensor]]:
        for layer in range(self._num_layers):
            if before_layer is not None:
                before_layer(layer)
            if self.late_s:
                time.sleep(self.late_s)
            self.came = self._device.mark()
            self._next = (self._next + 1) % len(self._buffers)
            yield self._buffers[self._next][layer]


class ShortModel:
    """A model of a few layers, ready to be timed; a draft has room for `most_nodes` nodes, all levels of a tree together."""

    def __init__(self, device: Device, role: Role, model: CausalLM, weights: _Repeated, most_nodes: int) -> None:
        self._device, self._model, self._weights = device, model, weights
        self._segment, self._drafter = model.cache.segments[0], None
        if role == "draft":
            vocab_size, widest = model.architecture.vocab_size, TreeShape.chains(MAX_ROWS, 1)
            aim, max_nodes = Aim(shape=widest), max(widest.num_nodes, most_nodes)
            self._drafter = ModelDrafter(model, device, vocab_size, aim, PROMPT_CHUNK_TOKENS, max_nodes=max_nodes)

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
        self._drafter.start(0, text := [0] * (context_rows + 1), len(text))
        context = ModelContext(self._drafter, self._segment, text)
        vocab_size = self._model.architecture.vocab_size
        shape = tree_of_levels(rows, vocab_size)
        self._drafter.prepare(Aim(shape=shape))
        model = _AlwaysTheSame(context, context_rows, peaked_logits(self._device, rows, vocab_size))
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
        self._segment.truncate(0)
        self._segment.length = context_rows

    def _pass(self, rows: int, context_rows: int) -> Callable[[], None]:
        part = Part(
            segment=self._segment,
            prefix=(),
            node_ids=self._device.upload(torch.zeros(rows, dtype=torch.int64)),
            depths=[0] * rows,
            tree_mask=self._device.upload(torch.ones(rows, rows, dtype=torch.bool).tril()),
            num_logits=rows,
        )

        def forward() -> None:
            self._model.forward((part,))
            self._segment.truncate(context_rows)

        return forward


class _AlwaysTheSame:
    """The context of a text of which `context_rows` tokens have been read when a tree begins, whose logits are those of a model
    that knows something: noise multiplied with noise would make all tokens equally probable."""

    def __init__(self, context: ModelContext, context_rows: int, logits: torch.Tensor) -> None:
        self._context, self._context_rows, self._logits = context, context_rows, logits

    def begin(self) -> torch.Tensor:
        self._context.segment.truncate(self._context_rows)
        return self._logits[: len(self._context.begin())]

    def expand(self, parents: Sequence[int], token_ids: torch.Tensor) -> torch.Tensor:
        return self._logits[: len(self._context.expand(parents, token_ids))]


def short_models(device: Device, model: TypedModel, role: Role, effort: Effort) -> tuple[ShortModel, ShortModel]:
    """One of FEW_LAYERS and one of MORE_LAYERS, on the same noise, with room for all that `effort` has them do."""
    few, more = (shorter(model, num_layers) for num_layers in (FEW_LAYERS, MORE_LAYERS))
    layouts, outside = [codec.computed for codec in more.codecs], model.outside_layout
    layer_bytes = max(layout.num_bytes for layout in layouts)
    num_buffers = max(1, min(model.architecture.num_layers, ROTATED_BYTES // layer_bytes))
    buffers = [_layers(device, layouts, model.dtype) for _ in range(num_buffers)]
    outside_views = outside.views(_noise(device, outside.num_bytes, model.dtype))
    new_rows = max(rows * (num_levels(rows) if role == "draft" else 1) for rows in effort.rows)

    def short(model: TypedModel) -> ShortModel:
        architecture = _drafting(model) if model.drafts_from_base else model.architecture
        cache = KVCache(
            device,
            layer_shapes=architecture.kv_shapes,
            num_segments=1,
            segment_rows=max(effort.contexts) + 1 + new_rows,
            dtype=model.dtype,
            rope=architecture.rope,
        )
        weights = _Repeated(device, buffers, architecture.num_layers)
        lm = CausalLM(architecture, device, model.dtype, outside_views, weights, cache)
        return ShortModel(device, role, lm, weights, new_rows)

    return short(few), short(more)


def shorter(model: TypedModel, num_layers: int) -> TypedModel:
    """`model` with `num_layers` layers, as they compute, or as they draft where `model` is drafted from a base: then every
    matrix has one."""
    architecture = shortened(model.architecture, num_layers)
    plain = replace(model, architecture=architecture, packed={}, bases={}, drafts_from_base=False)
    if not model.drafts_from_base:
        return plain
    assert model.base is not None
    bases = {
        f"{architecture.prefix}.{layer}.{name}": base_parts(name, shape, model.base)
        for layer, shapes in enumerate(architecture.layer_shapes)
        for name, shape in shapes.items()
        if len(shape) == 2
    }
    return base_draft(replace(plain, bases=bases))


def _drafting(model: TypedModel) -> Architecture:
    assert model.base is not None
    return base_architecture(model.architecture, model.base, model.bases.keys(), kernels=model.kernels)


def _layers(device: Device, layouts: Sequence[LayerLayout], dtype: torch.dtype) -> list[Mapping[str, torch.Tensor]]:
    """Noise that takes the place of layers; those of one layout are one. Its bytes are codes as good as any, but no scales."""
    made = {layout: layout.views(_noise(device, layout.num_bytes, dtype)) for layout in set(layouts)}
    for views in made.values():
        for name, view in views.items():
            if name.endswith(BASE_SCALE):
                view.fill_(SCALE)
    return [made[layout] for layout in layouts]


def _noise(device: Device, num_bytes: int, dtype: torch.dtype) -> torch.Tensor:
    """Device memory full of small random numbers: zeros would multiply faster than weights do on some devices."""
    buffer = device.alloc(num_bytes)
    numbers = buffer[: num_bytes // dtype.itemsize * dtype.itemsize].view(dtype)
    noise = torch.randn(NOISE_NUMBERS, generator=torch.Generator().manual_seed(0))
    block = device.upload((noise * 0.02).to(dtype))
    for part in numbers.split(NOISE_NUMBERS):
        part.copy_(block[: len(part)])
    return buffer
