"""Layers read from a source into their places, on the device and in host memory. Does not know why a layer belongs where."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..device import Device
from .codec import LayerCodec
from .layout import LayerLayout
from .source import Destinations, TensorFeed, TensorSource
from .through_host import Upload, load_through_host

Progress = Callable[[int], None]
Buffers = Mapping[int, torch.Tensor]  # uint8, by layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Memory for the tensors of `layout`, whose names in a source begin with `prefix`. `is_home`: in host memory, not the
    device's."""

    prefix: str
    layout: LayerLayout
    memory: torch.Tensor
    is_home: bool = False

    def destinations(self, memory: torch.Tensor) -> Destinations:
        return {f"{self.prefix}.{name}": view for name, view in self.layout.views(memory).items()}


def fill_places(
    device: Device,
    feed: TensorFeed,
    groups: Sequence[Sequence[Place]],
    staging: Sequence[torch.Tensor],
    progress: Progress | None,
) -> None:
    """The places of a group are read at once: what is coded while it is read is so once. Where the host cannot write to the
    device, what belongs there goes through `staging`, buffers that nobody needs and that are used if all fit into them."""
    at_once: list[Destinations] = []
    uploads: list[Upload] = []
    for group in groups:
        if device.host_addressable or all(place.is_home for place in group):
            at_once += [place.destinations(place.memory) for place in group]
        else:
            uploads.append(upload_of(group))
    if uploads:
        most_bytes = max(upload.num_bytes for upload in uploads)
        roomy = [buffer for buffer in staging if buffer.numel() >= most_bytes]
        load_through_host(device, uploads, roomy, feed, progress)
    for destinations in each_once(at_once):
        feed.fill(destinations, progress)


def upload_of(group: Sequence[Place], then: Callable[[], None] | None = None) -> Upload:
    """Of the places of `group` that are on the device; those in host memory are read along."""
    on_device = [place for place in group if not place.is_home]
    sizes = [place.memory.numel() for place in on_device]
    at_home = [place.destinations(place.memory) for place in group if place.is_home]

    def lay_out(host: torch.Tensor) -> list[Destinations]:
        pieces = zip(on_device, host.split(sizes), strict=True)
        return each_once([*at_home, *(place.destinations(staged) for place, staged in pieces)])

    return Upload(memory=tuple(place.memory for place in on_device), lay_out=lay_out, then=then)


def each_once(wanted: Sequence[Destinations]) -> list[Destinations]:
    """All that is wanted, in as few readings as can be: a tensor that goes to two places is in two of them."""
    readings: list[dict[str, torch.Tensor]] = [{}]
    for destinations in wanted:
        for name, view in destinations.items():
            place = next((place for place, reading in enumerate(readings) if name not in reading), len(readings))
            if place == len(readings):
                readings.append({})
            readings[place][name] = view
    return list(readings)


class LayerReader:
    """Reads decoder layers, of which `codecs` has one each. `staging`, everywhere, are host buffers that nobody needs."""

    def __init__(self, device: Device, source: TensorSource, codecs: Sequence[LayerCodec], prefix: str) -> None:
        self._device, self._source, self._codecs, self._prefix = device, source, codecs, prefix

    def place(self, layer: int, layout: LayerLayout, memory: torch.Tensor, *, is_home: bool = False) -> Place:
        return Place(prefix=f"{self._prefix}.{layer}", layout=layout, memory=memory, is_home=is_home)

    def read_raw(
        self, source: TensorSource, buffers: Buffers, staging: Sequence[torch.Tensor], progress: Progress | None
    ) -> None:
        """What layers compute with, from a `source` that has it, into device memory."""
        if not buffers:
            return
        places = {layer: self.place(layer, self._codecs[layer].computed, buffer) for layer, buffer in buffers.items()}
        first, *copies = sorted(source.equal_layers.intersection(buffers)) or [-1]
        if self._device.host_addressable:
            copies = []
        with source.open() as feed:
            groups = [[place] for layer, place in places.items() if layer not in copies]
            fill_places(self._device, feed, groups, staging, progress)
        for layer in copies:  # which takes a thousandth of making the same bytes again
            buffers[layer].copy_(buffers[first])
            _count_copied(source, places[layer], progress)

    def read_and_decode(
        self, buffers: Buffers, slot: torch.Tensor, staging: Sequence[torch.Tensor], progress: Progress | None
    ) -> None:
        """The same, decoded on the device from what is stored: by way of `slot`, which any layer fits into."""
        uploads: list[Upload] = []
        for layer, buffer in buffers.items():
            codec = self._codecs[layer]
            assert codec.decode is not None
            stored = slot[: codec.stored.num_bytes]
            decode = partial(codec.decode, codec.stored.views(stored), codec.computed.views(buffer))
            uploads.append(upload_of([self.place(layer, codec.stored, stored)], decode))
        with self._source.open() as feed:
            load_through_host(self._device, uploads, staging, feed, progress)

    def read_stored(
        self,
        layers: Collection[int],
        buffers: Buffers,
        homes: Buffers,
        bases: Buffers,
        staging: Sequence[torch.Tensor],
        progress: Progress | None,
    ) -> None:
        """Of `layers`: what is stored into device memory and `homes`, and bases into theirs, as far as there is any for them.
        The bases of layers that are equal are read once."""
        first, *copies = sorted(self._source.equal_layers.intersection(layers, bases)) or [-1]
        groups: list[list[Place]] = []
        for layer in sorted(layers):
            codec, group = self._codecs[layer], list[Place]()
            if layer in buffers:
                group.append(self.place(layer, codec.stored, buffers[layer]))
            if layer in homes:
                group.append(self.place(layer, codec.stored, homes[layer], is_home=True))
            if layer in bases and layer not in copies:
                group.append(self.place(layer, codec.base, bases[layer]))
            if group:
                groups.append(group)
        if groups:
            with self._source.open() as feed:
                fill_places(self._device, feed, groups, staging, progress)
        for layer in copies:
            bases[layer].copy_(bases[first])
            _count_copied(self._source, self.place(layer, self._codecs[layer].base, bases[layer]), progress)


def _count_copied(source: TensorSource, place: Place, progress: Progress | None) -> None:
    """As if it had been read."""
    if progress is not None:
        progress(sum(source.num_bytes(f"{place.prefix}.{field.name}") for field in place.layout.fields))
