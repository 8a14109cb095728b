"""A source's tensors in host memory, and transformers' model over them: the same weights for engines that are not ours."""

from typing import Any

import torch

from ..device.host import available_bytes
from ..model.rotary import rebuild_rotary
from ..model.transformers_api import build_on_meta
from ..source import ModelSource
from ..weights.source import borrowed_layers
from .measure import CannotRun

HOST_SHARE = 0.9  # of the memory available may be weights


def build_model(source: ModelSource) -> Any:
    """transformers' model with the source's tensors, in host memory; equal layers share theirs when memory is short.
    CannotRun when it is not enough."""
    model: Any = build_on_meta(source.architecture.config, "sdpa", source.model.dtype)
    state = host_tensors(source)
    model.load_state_dict(state, assign=True, strict=False)
    model.tie_weights()
    rebuild_rotary(model, None, torch.device("cpu"))
    return model.eval()


def host_tensors(source: ModelSource) -> dict[str, torch.Tensor]:
    """Every tensor by name, on the CPU."""
    architecture, layer_bytes = source.architecture, max(codec.computed.num_bytes for codec in source.model.codecs)
    room = (round(available_bytes() * HOST_SHARE) - source.model.outside_layout.num_bytes) // layer_bytes
    borrowed = borrowed_layers(range(architecture.num_layers), source.tensors.equal_layers, room)
    if architecture.num_layers - len(borrowed) > room:
        raise CannotRun(f"host memory has room for {max(room, 0)} of {architecture.num_layers} layers")
    elsewhere = tuple(f"{architecture.prefix}.{layer}." for layer in borrowed)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in architecture.expected_tensors.items():
        if not name.startswith(elsewhere):
            tensors[name] = torch.empty(shape, dtype=source.model.dtype)
    with source.parameters.open() as feed:
        feed.fill(tensors)
    for layer, owner in borrowed.items():
        for name in architecture.layer_shapes[layer]:
            tensors[f"{architecture.prefix}.{layer}.{name}"] = tensors[f"{architecture.prefix}.{owner}.{name}"]
    return tensors
