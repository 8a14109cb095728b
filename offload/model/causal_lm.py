"""A transformers model whose decoder layers are fed by a weight source, one pass at a time.

The model is transformers' own code; only the memory behind its parameters is ours. A forward pre-hook on each decoder layer
asks the source for that layer's weights and points the layer's parameters at them; a hook behind the last one ends its use.
"""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from ..device import Device
from ..streaming.stream import BeforeLayer, ResidentWeights, Weights
from .architecture import Architecture
from .base_model import parameter_forms
from .kv_cache import KVCache
from .pass_inputs import Part, PassInputs, pass_inputs
from .rope import Rope
from .rotary import rebuild_rotary
from .transformers_api import Forward, Rows


class WeightSource(Protocol):
    def one_pass(self, before_layer: BeforeLayer | None = None) -> Iterator[Weights]:
        """The weights of every decoder layer, in order; each is valid until the next is asked for. Then `before_layer` is
        called with the number of the next: the one before is not in use any more, and the next is not waited for yet."""


@dataclass(frozen=True, slots=True, eq=False)
class PartOutput:
    """Of the rows of a part that have logits, in their order."""

    logits: torch.Tensor  # [num_logits, V], in the model's dtype
    features: torch.Tensor | None  # [num_logits, layers * D]: what the layers asked for put out, side by side


class _Pass:
    """The pass under way, as the hooks on the layers know it. They do not know the CausalLM, which holds them: in a circle its
    memory would wait for the garbage collector, which knows nothing of GiB on a device."""

    def __init__(self) -> None:
        self.layers: Iterator[Weights] = iter(())

    def bind(self, forms: tuple[Mapping[str, nn.Parameter], ...]) -> None:
        """Point one of `forms` at the next layer's weights, the first of which there are all, and the rest of the others at
        nothing."""
        weights = next(self.layers)
        bound = next((form for form in forms if form.keys() <= weights.keys()), forms[0])
        for name, parameter in bound.items():
            parameter.data = weights[name]
        for form in forms:
            if form is not bound:
                _let_go(parameter for name, parameter in form.items() if name not in bound)

    def end(self) -> None:
        """The last layer has been used: what it lay in is free while the head computes."""
        leftover = next(self.layers, None)
        assert leftover is None, "the model has more layers than it ran"


class CausalLM:
    """`outside` holds the tensors outside the decoder layers (device, `dtype`), by their full names."""

    def __init__(
        self,
        architecture: Architecture,
        device: Device,
        dtype: torch.dtype,
        outside: Weights,
        weights: WeightSource,
        cache: KVCache,
    ) -> None:
        self.architecture, self.dtype, self.cache = architecture, dtype, cache
        self._device = device
        self._weights: WeightSource = weights
        self._pass = under_way = _Pass()
        self._model = architecture.model
        _materialise(self._model, device.torch_device, dtype, outside)
        self._windows = frozenset(architecture.windows)
        self._row_rotary = rebuild_rotary(self._model, architecture.rope, device.torch_device)
        self._layers = list(self._model.get_submodule(architecture.prefix).children())
        self._forward = Forward(self._model, len(self._layers))
        self._hooks = [
            layer.register_forward_pre_hook(lambda _module, _args, forms=forms: under_way.bind(forms))
            for layer, forms in zip(self._layers, map(parameter_forms, self._layers), strict=True)
        ]
        self._hooks.append(self._layers[-1].register_forward_hook(lambda _module, _args, _output: under_way.end()))

    @property
    def rope(self) -> Rope:
        return self.architecture.rope

    def forward(
        self,
        parts: Sequence[Part],
        *,
        before_layer: BeforeLayer | None = None,
        feature_layers: Sequence[int] = (),
    ) -> tuple[PartOutput, ...]:
        """One pass over `parts`, at least one, each of at least one row and of another segment of the cache.

        Appends the rows of each part to its segment, as pending ones. `before_layer`: see
        WeightSource. FitError when a segment has no room. On any error the segments and the weight source are as before.
        """
        for part in parts:
            part.segment.check_room(part.num_rows)
        rows = self.cache.appending([(part.segment, part.num_rows) for part in parts])
        inputs, sizes = self.inputs(parts), [part.num_logits for part in parts]
        with self._taking(feature_layers, inputs.logit_rows) as taken:
            logits = self.compute(inputs, rows, before_layer).split(sizes)  # [num_logits, V] of each part
        features: Sequence[torch.Tensor | None] = [None] * len(parts)
        if feature_layers:
            features = torch.cat([taken[layer] for layer in feature_layers], dim=1).split(sizes)  # [num_logits, layers * D]
        for part in parts:
            part.segment.appended(part.positions)
        return tuple(map(PartOutput, logits, features))

    def inputs(self, parts: Sequence[Part]) -> PassInputs:
        return pass_inputs(self._device, parts, self._windows, counts_prompts=bool(self._row_rotary))

    def compute(self, inputs: PassInputs, rows: Rows, before_layer: BeforeLayer | None = None) -> torch.Tensor:
        """The pass alone: logits [n, V]. Keys and values go where `rows` says, and the counts of segments stay as they are."""
        for rotary in self._row_rotary:
            assert inputs.counted_prompts is not None
            rotary.counted_prompts = inputs.counted_prompts
        self._pass.layers = layers = self._weights.one_pass(before_layer)
        try:
            return self._forward(inputs.token_ids, inputs.positions, inputs.masks, inputs.logit_rows, rows)
        finally:
            self._pass.layers = iter(())
            if isinstance(layers, Generator):
                layers.close()

    @contextmanager
    def _taking(self, feature_layers: Sequence[int], logit_rows: int | torch.Tensor) -> Iterator[Mapping[int, torch.Tensor]]:
        """Inside, passes leave what these layers put out for `logit_rows`, [n, D] by layer."""
        taken: dict[int, torch.Tensor] = {}

        def take(layer: int, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
            hidden = output[0] if isinstance(output, tuple) else output  # [1, N, D]
            if isinstance(logit_rows, int):
                taken[layer] = hidden[0, -logit_rows:].clone()
            else:
                taken[layer] = hidden[0].index_select(0, logit_rows)

        hooks = [
            self._layers[layer].register_forward_hook(lambda _module, _args, output, layer=layer: take(layer, output))
            for layer in feature_layers
        ]
        try:
            yield taken
        finally:
            for hook in hooks:
                hook.remove()

    def let_go(self) -> None:
        """Hold no layer's weights until the next pass, so that their memory may go."""
        for layer in self._layers:
            _let_go(layer.parameters())

    def rebind(self, weights: WeightSource) -> None:
        """Take the layers' weights from another source from the next pass on, and hold none of the old one's until then. What
        was recorded of this model knows the old ones only."""
        self._weights = weights
        self.let_go()

    def close(self) -> None:
        """Hold no weights, keys or values any more; whoever still holds the model holds next to nothing, and may give it to
        another CausalLM."""
        for hook in self._hooks:
            hook.remove()
        _let_go(self._model.parameters())
        self.cache.close()
        self._weights = ResidentWeights([])


def _let_go(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        if parameter.numel():
            parameter.data = parameter.new_empty(0)


def _materialise(model: nn.Module, device: torch.device, dtype: torch.dtype, outside: Weights) -> None:
    """Replace every meta parameter: those outside the layers by their tensors, the layers' by empty ones that a pass points
    at its weights, whatever their dtype. A tied parameter stays one object."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = names[id(parameter)]
            if id(parameter) not in made:
                tensor = outside[name] if name in outside else torch.empty(0, device=device, dtype=dtype)
                made[id(parameter)] = nn.Parameter(tensor, requires_grad=False)
            setattr(module, key, made[id(parameter)])
