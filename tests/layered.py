"""Checkpoints of small layers whose values tell which layer they are, and streams over them."""

from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from fakes import XorSource, pad_codec, xor_codec
from offload.device import Device
from offload.streaming.stream import LayerStream
from offload.weights.checkpoint import open_checkpoint
from offload.weights.codec import LayerCodec, identities
from offload.weights.placement import RING_BUFFERS, Placement, spread_evenly
from offload.weights.source import CheckpointSource, TensorSource
from offload.weights.store import WeightStore

PREFIX = "model.layers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """Layers of a checkpoint: `a`, filled with the number of the layer, and `b`, with that and a half."""

    form: str
    folder: Path
    source: TensorSource
    parameters: TensorSource
    codecs: tuple[LayerCodec, ...]

    @property
    def num_layers(self) -> int:
        return len(self.codecs)

    @property
    def slot_bytes(self) -> int:
        return max(codec.stored.num_bytes for codec in self.codecs)

    def stored_bytes(self, layers: Iterable[int]) -> int:
        return sum(self.codecs[layer].stored.num_bytes for layer in layers)

    def host_bytes(self, layers: Iterable[int], *, ring: bool) -> int:
        return self.stored_bytes(layers) + ring * RING_BUFFERS * self.slot_bytes


MakeLayers = Callable[[int], Layers]


def save_layers(folder: Path, num_layers: int, form: str = "equal") -> Layers:
    """In `form`, one of FORMS."""
    shapes, is_coded = FORMS[form]
    tensors = {}
    for layer in range(num_layers):
        for name, shape in shapes(layer).items():
            tensors[f"{PREFIX}.{layer}.{name}"] = torch.full(shape, layer + (0.5 if name == "b" else 0.0))
    save_file(tensors, folder / "model.safetensors")
    raw = identities([shapes(layer) for layer in range(num_layers)], torch.float32)
    code = pad_codec if form.startswith("based") else xor_codec
    codecs = tuple(code(codec.computed, layer) if is_coded(layer) else codec for layer, codec in enumerate(raw))
    parameters = CheckpointSource(open_checkpoint(folder))
    source = XorSource(parameters, PREFIX, codecs)
    return Layers(form=form, folder=folder, source=source, parameters=parameters, codecs=codecs)


def _equal(layer: int) -> dict[str, tuple[int, ...]]:
    return {"a": (7,), "b": (3, 5)}


def _uneven(layer: int) -> dict[str, tuple[int, ...]]:
    """Of three sizes, one of which is there once."""
    return {"a": (7,), "b": (150, 5) if layer == 1 else (100, 5) if layer % 2 else (3, 5)}


# Shapes by layer, and whether a layer is stored in code.
FORMS: dict[str, tuple[Callable[[int], dict[str, tuple[int, ...]]], Callable[[int], bool]]] = {
    "equal": (_equal, lambda layer: False),
    "uneven": (_uneven, lambda layer: False),
    "coded": (_uneven, lambda layer: True),
    "kept": (_uneven, lambda layer: True),  # and the device keeps what is resident as it is stored
    "mixed": (_uneven, lambda layer: layer % 3 != 1),
    "based": (_uneven, lambda layer: True),  # the device keeps a base of those that are streamed
    "based, kept": (_uneven, lambda layer: layer != 2),  # and of those that are resident and coded; one layer has none
}


@contextmanager
def open_stream(
    device: Device, layers: Layers, resident: int, slots: int, disk: int = 0, most_host_bytes: int | None = None
) -> Iterator[tuple[LayerStream, WeightStore]]:
    """With so many layers resident, and the first `disk` of the others on disk."""
    in_memory = spread_evenly(resident, layers.num_layers)
    rest = [layer for layer in range(layers.num_layers) if layer not in in_memory]
    decoded = {layer for layer in in_memory if layers.codecs[layer].decode is not None}
    coded = frozenset(decoded if layers.form.endswith("kept") else ())
    placement = Placement(num_layers=layers.num_layers, resident=in_memory, coded=coded, disk=frozenset(rest[:disk]))
    with open_placed(device, layers, placement, slots, most_host_bytes) as opened:
        yield opened


@contextmanager
def open_placed(
    device: Device, layers: Layers, placement: Placement, slots: int, most_host_bytes: int | None = None
) -> Iterator[tuple[LayerStream, WeightStore]]:
    with ExitStack() as stack:
        store = WeightStore(device, layers.source, layers.codecs, PREFIX, placement, most_host_bytes, layers.parameters)
        stack.callback(store.close)
        store.take_host_memory()
        stream = LayerStream(device, store, slots)
        stack.callback(stream.close)
        store.load(slot=stream.any_slot)
        yield stream, store


def with_residents(placement: Placement, resident: Set[int]) -> Placement:
    """`placement` with fewer, kept as they are."""
    return replace(placement, resident=frozenset(resident), coded=placement.coded & resident)


def check_pass(stream: LayerStream) -> None:
    """Every layer once, in order, unharmed."""
    seen = 0
    for layer, weights in enumerate(stream.one_pass()):
        assert weights["a"].tolist() == [layer] * 7
        assert weights["b"].unique().tolist() == [layer + 0.5]
        seen += 1
    assert seen == stream.placement.num_layers
