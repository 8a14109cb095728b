"""A transformers model whose decoder layers are fed by a weight source, one pass at a time.

The model is transformers' own code; only the memory behind its parameters is ours. A forward pre-hook on each decoder layer
asks the source for that layer's weights and points the layer's parameters at them; a hook behind the last one ends its use.
"""

from collections.abc import Generator, Iterator
from typing import Protocol

import torch
from torch import nn

from ..device import Device
from ..streaming.stream import ResidentWeights, Weights
from .architecture import Architecture
from .kv_cache import KVCache
from .rotary import rebuild_rotary
from .transformers_api import Forward, Rows


class WeightSource(Protocol):
    def one_pass(self) -> Iterator[Weights]:
        """The weights of every decoder layer, in order; each is valid until the next is asked for."""


class _Pass:
    """The pass under way, as the hooks on the layers know it. They do not know the CausalLM, which holds them: in a circle its
    memory would wait for the garbage collector, which knows nothing of GiB on a device."""

    def __init__(self) -> None:
        self.layers: Iterator[Weights] = iter(())

    def bind(self, parameters: dict[str, nn.Parameter]) -> None:
        weights = next(self.layers)
        for name, parameter in parameters.items():
            parameter.data = weights[name]

    def end(self) -> None:
        """The last layer has been used: what it lay in is free while the head computes."""
        leftover = next(self.layers, None)
        assert leftover is None, "the model has more layers than it ran"


class CausalLM:
    """`shared` holds the tensors outside the decoder layers (device, `dtype`), by their full names."""

    def __init__(
        self,
        architecture: Architecture,
        device: Device,
        dtype: torch.dtype,
        shared: Weights,
        weights: WeightSource,
        cache: KVCache,
    ) -> None:
        self.architecture, self.dtype, self.cache = architecture, dtype, cache
        self._weights: WeightSource = weights
        self._pass = under_way = _Pass()
        self._model = architecture.model
        _materialise(self._model, device.torch_device, dtype, shared)
        self.rope = architecture.rope
        self._row_rotary = rebuild_rotary(self._model, self.rope, device.torch_device)
        self._prompt_tokens = 0
        layers = list(self._model.get_submodule(architecture.prefix).children())
        self._forward = Forward(self._model, len(layers))
        self._parameters = [dict(layer.named_parameters()) for layer in layers]
        self._hooks = [
            layer.register_forward_pre_hook(lambda _module, _args, parameters=parameters: under_way.bind(parameters))
            for layer, parameters in zip(layers, self._parameters, strict=True)
        ]
        self._hooks.append(layers[-1].register_forward_hook(lambda _module, _args, _output: under_way.end()))

    def begin_text(self, prompt_tokens: int, num_tokens: int) -> None:
        """The passes to come belong to a text of `num_tokens` tokens so far, of which `prompt_tokens` are its prompt."""
        self._prompt_tokens = self.rope.counted_prompt(prompt_tokens, num_tokens)
        for rotary in self._row_rotary:
            rotary.begin_text(self._prompt_tokens)

    def start_over_if_outgrown(self, num_tokens: int) -> None:
        """The text has grown to `num_tokens`. Where its family computes all rows anew at that length, none are left."""
        if self.rope.counted_prompt(self._prompt_tokens, num_tokens) != self._prompt_tokens:
            self.cache.truncate(0)
            self.begin_text(self._prompt_tokens, num_tokens)

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, num_logits: int) -> torch.Tensor:
        """One pass over rows `token_ids` [N] int64 at `positions` [N] int64 under `mask` [1, 1, N, cached + N] bool.

        Appends N pending rows to the cache and returns the logits of the last `num_logits` (>= 1) rows, [num_logits, V] in
        the model's dtype. On any error the cache and the weight source are as before the pass.
        """
        self.cache.check_room(len(token_ids))
        logits = self.compute(token_ids, positions, mask, num_logits, self.cache)
        self.cache.appended(len(token_ids))
        return logits

    def compute(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor,
        num_logits: int,
        rows: Rows,
    ) -> torch.Tensor:
        """The pass alone: keys and values go where `rows` says, and the cache's counts stay as they are."""
        layers = self._weights.one_pass()
        self._pass.layers = layers
        try:
            return self._forward(token_ids, positions, mask, num_logits, rows)
        finally:
            self._pass.layers = iter(())
            if isinstance(layers, Generator):
                layers.close()

    def let_go(self) -> None:
        """Hold no layer's weights until the next pass, so that their memory may go."""
        for parameters in self._parameters:
            for parameter in parameters.values():
                parameter.data = parameter.new_empty(0)

    def close(self) -> None:
        """Hold no weights, keys or values any more; whoever still holds the model holds next to nothing, and may give it to
        another CausalLM."""
        for hook in self._hooks:
            hook.remove()
        for parameter in self._model.parameters():
            parameter.data = parameter.new_empty(0)
        self.cache.close()
        self._weights = ResidentWeights([])


def _materialise(model: nn.Module, device: torch.device, dtype: torch.dtype, shared: Weights) -> None:
    """Replace every meta parameter: shared ones by their tensors, the layers' by empty ones that a pass points
    at its weights. A tied parameter stays one object."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = names[id(parameter)]
            if id(parameter) not in made:
                tensor = shared[name] if name in shared else torch.empty(0, device=device, dtype=dtype)
                made[id(parameter)] = nn.Parameter(tensor, requires_grad=False)
            setattr(module, key, made[id(parameter)])
