"""Where the decoder layers live: on the device (resident), in one pinned host arena, or on disk behind a bounce ring."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from ..device import Device, HostBuffer, Ticket
from .disk import DiskRing
from .layout import LayerLayout
from .placement import Placement
from .source import Destinations, TensorFeed, TensorSource

Progress = Callable[[int], None]


class WeightStore:
    """Owns the memory of all decoder layers and fills it. Host memory held: one exact-size arena of the host layers, plus
    the ring when some layers are on disk; peak while loading is that plus the reader's scratch (see TensorReader).
    `shared` host layers, {borrower: owner}, have no memory of their own: the source says that their bytes are equal."""

    def __init__(
        self,
        device: Device,
        source: TensorSource,
        layout: LayerLayout,
        prefix: str,
        placement: Placement,
        shared: Mapping[int, int] | None = None,
    ) -> None:
        self.layout, self.placement, self.shared = layout, placement, dict(shared or {})
        self._device, self._source, self._prefix = device, source, prefix
        self._resident = {layer: device.alloc(layout.num_bytes) for layer in sorted(placement.resident)}
        owners = [layer for layer in placement.host if layer not in self.shared]
        cuts = [layout.num_bytes * (order + 1) for order in range(len(owners))]
        self._arena = device.pin(layout.num_bytes * len(owners), cuts)
        self._owned = {layer: self._arena.tensor[cut - layout.num_bytes : cut] for layer, cut in zip(owners, cuts, strict=True)}
        self._host = {**self._owned, **{layer: self._owned[owner] for layer, owner in self.shared.items()}}
        self._moved: list[HostBuffer] = []  # layers that were resident first, each in memory of its own
        self._ring: DiskRing | None = None

    @property
    def resident(self) -> dict[int, dict[str, torch.Tensor]]:
        """Typed views of the resident layers, used in place."""
        return {layer: self.layout.views(buffer) for layer, buffer in self._resident.items()}

    @property
    def host_bytes(self) -> int:
        """Host memory held for weights, the ring included."""
        return sum(buffer.tensor.numel() for buffer in self._host_buffers())

    @property
    def pinned_bytes(self) -> int:
        return sum(buffer.pinned_bytes for buffer in self._host_buffers())

    @property
    def pageable_bytes_per_pass(self) -> int:
        """Of the bytes that a pass copies, those from memory that the device was asked to pin and would not. None are where
        the device's memory is the host's, which pins nothing."""
        if self._device.host_addressable:
            return 0
        refused = sum(buffer.tensor.numel() - buffer.pinned_bytes for buffer in [self._arena, *self._moved])
        if self._ring is not None:
            ring, disk_bytes = self._ring.memory, len(self.placement.disk) * self.layout.num_bytes
            refused += disk_bytes * (ring.tensor.numel() - ring.pinned_bytes) // ring.tensor.numel()
        return refused

    @property
    def ring(self) -> DiskRing | None:
        return self._ring

    def load(self, progress: Progress | None = None) -> None:
        """Read every layer that has a place in memory; start reading ahead what has none. `progress` gets bytes read."""
        with self._source.open() as feed:
            self._load_resident(feed, progress)
            feed.fill(self._destinations(self._owned), progress)
        self._open_ring()

    def give_up(self, placement: Placement) -> list[torch.Tensor]:
        """Go over to `placement`, which keeps fewer layers on the device; those that leave go to host memory of their own, or
        back to disk. Returns the device buffers that they leave. No copy may be under way. HostMemoryError when the host has
        no room: then nothing has changed."""
        leaving = sorted(self.placement.resident - placement.resident)
        moved = {layer: self._host_copy(layer) for layer in leaving if layer not in placement.disk}
        self._moved += moved.values()
        self._host |= {layer: buffer.tensor for layer, buffer in moved.items()}
        reads_others = placement.disk != self.placement.disk
        self.placement = placement
        if reads_others:
            self._close_ring()
            self._open_ring()
        return [self._resident.pop(layer) for layer in leaving]

    def ready(self, layer: int) -> bool:
        """Whether `source(layer)` would return at once."""
        return layer in self._host or (self._ring is not None and self._ring.ready(layer))

    def source(self, layer: int) -> torch.Tensor:
        """[num_bytes] uint8 host memory holding `layer`; blocks while it is being read from disk."""
        if layer in self._host:
            return self._host[layer]
        assert self._ring is not None, f"layer {layer} is resident"
        return self._ring.source(layer)

    def sent(self, layer: int, ticket: Ticket) -> None:
        """The copy out of `source(layer)` is `ticket`."""
        if self._ring is not None and layer not in self._host:
            self._ring.sent(layer, ticket)

    def any_host_layer(self) -> torch.Tensor:
        """Some layer's worth of host memory to time copies from; its contents do not matter."""
        if self._host:
            return next(iter(self._host.values()))
        assert self._ring is not None, "every layer is resident"
        return self._ring.memory.tensor[: self.layout.num_bytes]

    def close(self) -> None:
        self._close_ring()
        self._host.clear()
        self._owned.clear()
        self._resident.clear()
        for buffer in [self._arena, *self._moved]:
            buffer.close()

    def _host_buffers(self) -> list[HostBuffer]:
        return [self._arena, *self._moved, *([self._ring.memory] if self._ring is not None else [])]

    def _open_ring(self) -> None:
        if self.placement.disk:
            order = tuple(sorted(self.placement.disk))
            self._ring = DiskRing(self._device, self._source, self.layout, order, self._views)

    def _close_ring(self) -> None:
        if self._ring is not None:
            self._ring.close()
            self._ring = None

    def _host_copy(self, layer: int) -> HostBuffer:
        """Tensor by tensor: a device may need as much host memory again for what it downloads at once."""
        copy = self._device.pin(self.layout.num_bytes, ())
        places = self.layout.views(copy.tensor)
        for name, tensor in self.layout.views(self._resident[layer]).items():
            places[name].copy_(self._device.download(tensor))
        return copy

    def _views(self, layer: int, buffer: torch.Tensor) -> Destinations:
        return {f"{self._prefix}.{layer}.{name}": view for name, view in self.layout.views(buffer).items()}

    def _destinations(self, buffers: Mapping[int, torch.Tensor]) -> Destinations:
        return {name: view for layer, buffer in buffers.items() for name, view in self._views(layer, buffer).items()}

    def _load_resident(self, feed: TensorFeed, progress: Progress | None) -> None:
        if self._device.host_addressable:
            feed.fill(self._destinations(self._resident), progress)
            return
        first, *copies = sorted(self._source.equal_layers.intersection(self._resident)) or [-1]
        made = {layer: buffer for layer, buffer in self._resident.items() if layer not in copies}
        if made:
            buffers = [(buffer, partial(self._views, layer)) for layer, buffer in made.items()]
            load_through_host(self._device, buffers, list(self._owned.values())[:2], feed, progress)
        for layer in copies:  # which takes a thousandth of making the same bytes again
            self._resident[layer].copy_(self._resident[first])
            if progress is not None:
                progress(sum(map(self._source.num_bytes, self._views(layer, self._resident[layer]))))


def load_through_host(
    device: Device,
    buffers: Sequence[tuple[torch.Tensor, Callable[[torch.Tensor], Destinations]]],
    staging: list[torch.Tensor],
    feed: TensorFeed,
    progress: Progress | None,
) -> None:
    """Fill device `buffers`, each by the views that it lays into a host buffer, through `staging` host buffers (arena memory
    whose own contents come later; one is made when there is none). One copy flies while the next buffer is read."""
    owned = None
    if not staging:
        owned = device.pin(max(buffer.numel() for buffer, _ in buffers), ())
        staging = [owned.tensor]
    flying: list[Ticket] = []
    for number, (buffer, views) in enumerate(buffers):
        if number >= len(staging):
            device.drain(flying[number - len(staging)])
        host = staging[number % len(staging)][: buffer.numel()]
        feed.fill(views(host), progress)
        flying.append(device.copy_async(buffer, host, device.mark()))
    for ticket in flying:
        device.drain(ticket)
    if owned is not None:
        owned.close()
