"""Checkpoints of small layers whose values tell which layer they are, and streams over them."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from offload.device import Device
from offload.streaming.stream import LayerStream
from offload.weights.checkpoint import open_checkpoint
from offload.weights.layout import LayerLayout, lay_out
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
    layouts: tuple[LayerLayout, ...]

    @property
    def num_layers(self) -> int:
        return len(self.layouts)

    @property
    def slot_bytes(self) -> int:
        return max(layout.num_bytes for layout in self.layouts)

    def stored_bytes(self, layers: Iterable[int]) -> int:
        return sum(self.layouts[layer].num_bytes for layer in layers)

    def host_bytes(self, layers: Iterable[int], *, ring: bool) -> int:
        return self.stored_bytes(layers) + ring * RING_BUFFERS * self.slot_bytes


MakeLayers = Callable[[int], Layers]


def save_layers(folder: Path, num_layers: int, form: str = "equal") -> Layers:
    """In `form`, one of FORMS."""
    shapes = FORMS[form]
    tensors = {}
    for layer in range(num_layers):
        for name, shape in shapes(layer).items():
            tensors[f"{PREFIX}.{layer}.{name}"] = torch.full(shape, layer + (0.5 if name == "b" else 0.0))
    save_file(tensors, folder / "model.safetensors")
    layouts = lay_out([shapes(layer) for layer in range(num_layers)], torch.float32)
    return Layers(form=form, folder=folder, source=CheckpointSource(open_checkpoint(folder)), layouts=layouts)


def _equal(layer: int) -> dict[str, tuple[int, ...]]:
    return {"a": (7,), "b": (3, 5)}


def _uneven(layer: int) -> dict[str, tuple[int, ...]]:
    """Of three sizes, one of which is there once."""
    return {"a": (7,), "b": (150, 5) if layer == 1 else (100, 5) if layer % 2 else (3, 5)}


FORMS = {"equal": _equal, "uneven": _uneven}


@contextmanager
def open_stream(
    device: Device, layers: Layers, resident: int, slots: int, disk: int = 0, most_host_bytes: int | None = None
) -> Iterator[tuple[LayerStream, WeightStore]]:
    """With so many layers resident, and the first `disk` of the others on disk."""
    in_memory = spread_evenly(resident, layers.num_layers)
    rest = [layer for layer in range(layers.num_layers) if layer not in in_memory]
    placement = Placement(num_layers=layers.num_layers, resident=in_memory, disk=frozenset(rest[:disk]))
    with open_placed(device, layers, placement, slots, most_host_bytes) as opened:
        yield opened


@contextmanager
def open_placed(
    device: Device, layers: Layers, placement: Placement, slots: int, most_host_bytes: int | None = None
) -> Iterator[tuple[LayerStream, WeightStore]]:
    with ExitStack() as stack:
        store = WeightStore(device, layers.source, layers.layouts, PREFIX, placement, most_host_bytes)
        stack.callback(store.close)
        store.take_host_memory()
        store.load()
        stream = LayerStream(device, store, slots)
        stack.callback(stream.close)
        yield stream, store


def check_pass(stream: LayerStream) -> None:
    """Every layer once, in order, unharmed."""
    seen = 0
    for layer, weights in enumerate(stream.one_pass()):
        assert weights["a"].tolist() == [layer] * 7
        assert weights["b"].unique().tolist() == [layer + 0.5]
        seen += 1
    assert seen == stream.placement.num_layers
