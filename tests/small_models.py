"""A model as passes know it, straight from a folder: without a plan, an engine or a loop."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from offload.device import Device
from offload.device.cpu import CpuDevice
from offload.model.causal_lm import CausalLM, WeightSource
from offload.model.kv_cache import KVCache, Segment
from offload.model.pass_inputs import Part
from offload.source import ModelSource, check_source
from offload.streaming.stream import BeforeLayer, ResidentWeights, Weights
from tree.shape import TreeShape


class PassingWeights:
    """A weight source whose layers hold until the next one is asked for, and are full of NaN then. `num_ended` counts them."""

    def __init__(self, layers: Sequence[Weights]) -> None:
        self._layers, self.num_ended = layers, 0

    def one_pass(self, before_layer: BeforeLayer | None = None) -> Iterator[Weights]:
        for number, layer in enumerate(self._layers):
            if before_layer is not None:
                before_layer(number)
            lent = {name: tensor.clone() for name, tensor in layer.items()}
            yield lent
            self.num_ended += 1
            for tensor in lent.values():
                tensor.fill_(torch.nan)


def causal_lm(
    source: ModelSource, device: Device, *, num_segments: int = 1, segment_rows: int = 160, passing: bool = False
) -> CausalLM:
    """Its weights are on the device, each layer's own, or `passing`."""
    architecture, dtype = source.architecture, source.model.dtype
    tensors = {name: torch.empty(shape, dtype=dtype) for name, shape in architecture.expected_tensors.items()}
    with source.tensors.open() as feed:
        feed.fill(tensors)
    outside = {name: tensor.to(device.torch_device) for name, tensor in tensors.items()}
    layers: list[Weights] = []
    for layer in range(architecture.num_layers):
        prefix = f"{architecture.prefix}.{layer}."
        names = [name for name in outside if name.startswith(prefix)]
        layers.append({name.removeprefix(prefix): outside.pop(name) for name in names})
    cache = KVCache(
        device,
        layer_shapes=architecture.kv_shapes,
        num_segments=num_segments,
        segment_rows=segment_rows,
        dtype=dtype,
        rope=architecture.rope,
    )
    weights: WeightSource = PassingWeights(layers) if passing else ResidentWeights(layers)
    return CausalLM(architecture, device, dtype, outside, weights, cache)


@contextmanager
def open_model(
    folder: Path, *, num_segments: int = 1, segment_rows: int = 160, passing: bool = True, device: Device | None = None
) -> Iterator[CausalLM]:
    """In float32."""
    device = device or CpuDevice()
    source = check_source(str(folder), "--model", "float32", device.torch_device.type)
    model = causal_lm(source, device, num_segments=num_segments, segment_rows=segment_rows, passing=passing)
    yield model
    model.close()
    device.close()


def tree_part(segment: Segment, prefix: Sequence[int], tokens: Sequence[int], shape: TreeShape) -> Part:
    """`tokens` at the nodes of `shape` behind `prefix`; the nodes have logits."""
    return Part(
        segment=segment,
        prefix=prefix,
        node_ids=torch.tensor(tokens, dtype=torch.int64),
        depths=shape.depths,
        tree_mask=torch.from_numpy(shape.ancestor_mask.copy()),
        num_logits=shape.num_nodes,
    )


def text_part(segment: Segment, tokens: Sequence[int], num_logits: int) -> Part:
    """`tokens` continue the committed rows; the last `num_logits` have logits."""
    no_nodes = torch.zeros(0, dtype=torch.int64)
    return Part(
        segment=segment,
        prefix=tokens,
        node_ids=no_nodes,
        depths=(),
        tree_mask=torch.zeros(0, 0, dtype=torch.bool),
        num_logits=num_logits,
    )


def tree_logits(model: CausalLM, prefix: Sequence[int], tokens: Sequence[int], shape: TreeShape) -> torch.Tensor:
    """[N, V] of a pass over one tree in the first segment."""
    return model.forward((tree_part(model.cache.segments[0], prefix, tokens, shape),))[0].logits


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Also that none is NaN."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < tolerance * expected.abs().max().clamp(min=1)
