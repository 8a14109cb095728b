"""Where the decoder layers live: on the device (resident), in host memory, or on disk; and the ring that brings what the device
does not copy from where it lies."""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch

from ..device import CopyTicket, Device, Ticket, pinned
from ..device.host import move_by_threads
from ..errors import HostMemoryError
from .host_layers import HostLayers
from .layout import LayerLayout
from .placement import RING_BUFFERS, Placement
from .ring import BounceRing, RingFill
from .source import Destinations, TensorFeed, TensorSource

Progress = Callable[[int], None]


class WeightStore:
    """Owns the memory of all decoder layers and fills it: the device's is taken at once, the host's by `take_host_memory`, and
    `load` fills both. Host memory held: the host layers, exactly, plus a ring when some layers are on disk or could not be
    pinned; peak while loading is that plus the reader's scratch (see TensorReader).

    `placement` says where layers came to lie: which are pageable, and which went to disk as a ring for those would have taken
    more than `most_host_bytes`. `shared` host layers, {borrower: owner}, have no memory of their own: the source says that
    their bytes are equal. Layers are asked for in the order of passes.
    """

    def __init__(
        self,
        device: Device,
        source: TensorSource,
        layout: LayerLayout,
        prefix: str,
        placement: Placement,
        shared: Mapping[int, int] | None = None,
        most_host_bytes: int | None = None,
    ) -> None:
        self.layout, self.shared = layout, dict(shared or {})
        self._device, self._source, self._prefix, self._most_host_bytes = device, source, prefix, most_host_bytes
        self._resident = {layer: device.alloc(layout.num_bytes) for layer in sorted(placement.resident)}
        self._memory = HostLayers(device, layout.num_bytes)
        self._ring: BounceRing | None = None
        self._files = ExitStack()  # what the ring reads from
        self.placement, self._through_ring = placement, frozenset(placement.through_ring)

    @property
    def resident(self) -> dict[int, dict[str, torch.Tensor]]:
        """Typed views of the resident layers, used in place."""
        return {layer: self.layout.views(buffer) for layer, buffer in self._resident.items()}

    @property
    def host_bytes(self) -> int:
        """Host memory held for weights, the ring included."""
        return self._memory.num_bytes

    @property
    def pinned_bytes(self) -> int:
        return self._memory.pinned_bytes

    def take_host_memory(self) -> None:
        """Homes for the layers in host memory, pinned as far as the device allows, and a ring where one is needed: `placement`
        is then what came of it. HostMemoryError when there is no room."""
        self._memory.add([layer for layer in self.placement.host if layer not in self.shared])
        self._memory.share(self.shared)
        self.placement = self._settled(self.placement)

    def load(self, progress: Progress | None = None) -> None:
        """Read every layer that has a place in memory. `progress` gets bytes read."""
        owned = {layer: self._memory.homes[layer].memory for layer in self.placement.host if layer not in self.shared}
        with self._source.open() as feed:
            self._load_resident(feed, self._memory.ring or list(owned.values())[:2], progress)
            feed.fill(self._destinations(owned), progress)

    def give_up(self, placement: Placement) -> list[torch.Tensor]:
        """Go over to `placement`, which keeps fewer layers on the device; those that leave go to host memory, or back to disk.
        Returns the device buffers that they leave. No copy may be under way. HostMemoryError when the host has no room: then
        the layers are where they were, as after an interruption while they are on their way."""
        leaving = sorted(self.placement.resident - placement.resident)
        to_host = [layer for layer in leaving if layer not in placement.disk]
        self.start_over()
        self._memory.add(to_host)
        try:
            for layer in to_host:
                self._download(layer)
        except BaseException:  # Ctrl-C above all, as it takes a while
            self._memory.take_back(to_host)
            raise
        try:
            self.placement = self._settled(placement)
        except HostMemoryError:  # of a ring, before anything else has changed
            self._memory.take_back(to_host)
            raise
        return [self._resident.pop(layer) for layer in leaving]

    def through_ring(self, layer: int) -> bool:
        """Whether `layer` comes by way of the ring, as it turned out when memory was taken."""
        return layer in self._through_ring

    def ready(self, layer: int) -> bool:
        """Whether `source(layer)` would return at once."""
        return layer not in self._through_ring or self._open_ring().ready()

    def source(self, layer: int) -> torch.Tensor:
        """[num_bytes] uint8 host memory holding `layer`, from which the device copies at its full rate; blocks while the ring
        is being filled with it, and raises what that raised, as DeviceError for the disk."""
        return self._open_ring().source(layer) if layer in self._through_ring else self._memory.homes[layer].memory

    def sent(self, layer: int, ticket: Ticket) -> None:
        """The copy out of `source(layer)` is `ticket`."""
        if layer in self._through_ring:
            self._open_ring().sent(layer, ticket)

    def start_over(self) -> None:
        """The next layer asked for is the first of a pass."""
        ring, self._ring = self._ring, None
        try:
            if ring is not None:
                ring.close()
        finally:
            self._files.close()

    def take_fills(self) -> list[RingFill]:
        """What the ring has brought since the last call, for the trace."""
        fills = self._ring.fills if self._ring is not None else deque[RingFill]()
        return [fills.popleft() for _ in range(len(fills))]

    def any_direct_layer(self) -> torch.Tensor:
        """Some layer's worth of host memory to time copies from; its contents do not matter."""
        return self._memory.ring[0] if self._memory.ring else next(iter(self._memory.homes.values())).memory

    def time_move(self) -> float:
        """Seconds to move some pageable layer into the ring. Before the first pass, or after `start_over`."""
        assert self._ring is None
        start_s = time.monotonic()
        move_by_threads(self._memory.ring[-1], self._memory.homes[min(self.placement.pageable)].memory)
        return time.monotonic() - start_s

    def close(self) -> None:
        self.start_over()
        self._resident.clear()
        self._memory.close()

    def _settled(self, placement: Placement) -> Placement:
        """`placement` with what the device would not pin; and a ring, if one is needed. Nobody planned one for layers that
        are not pinned: where there is no room for it, some of them stay on disk, and it has their memory."""
        memory = self._memory
        if not memory.ring and (placement.disk or memory.pageable):
            planned = memory.num_bytes + RING_BUFFERS * self.layout.num_bytes
            leaving: list[int] = []
            if not placement.disk and self._most_host_bytes is not None and planned > self._most_host_bytes:
                leaving = sorted(placement.host, key=lambda layer: layer not in memory.pageable)[:RING_BUFFERS]
            memory.make_ring(leaving)
            placement = replace(placement, disk=placement.disk.union(leaving))
        placement = replace(placement, pageable=memory.pageable)
        self._through_ring = frozenset(placement.through_ring)
        return placement

    def _open_ring(self) -> BounceRing:
        """It begins when it is first asked for, so that it does not compete with what is measured before the first pass."""
        if self._ring is None:
            feed = self._files.enter_context(self._source.open()) if self.placement.disk else None
            order, bring = self.placement.through_ring, partial(self._bring, feed)
            self._ring = BounceRing(self._device, self._memory.ring, order, bring)
        return self._ring

    def _bring(self, feed: TensorFeed | None, layer: int, buffer: torch.Tensor) -> None:
        if layer in self._memory.homes:
            move_by_threads(buffer, self._memory.homes[layer].memory)
        else:
            assert feed is not None
            feed.fill(self._views(layer, buffer))

    def _download(self, layer: int) -> None:
        """Tensor by tensor: a device may need as much host memory again for what it downloads at once."""
        places = self.layout.views(self._memory.homes[layer].memory)
        for name, tensor in self.layout.views(self._resident[layer]).items():
            places[name].copy_(self._device.download(tensor))

    def _views(self, layer: int, buffer: torch.Tensor) -> Destinations:
        return {f"{self._prefix}.{layer}.{name}": view for name, view in self.layout.views(buffer).items()}

    def _destinations(self, buffers: Mapping[int, torch.Tensor]) -> Destinations:
        return {name: view for layer, buffer in buffers.items() for name, view in self._views(layer, buffer).items()}

    def _load_resident(self, feed: TensorFeed, staging: list[torch.Tensor], progress: Progress | None) -> None:
        if self._device.host_addressable:
            feed.fill(self._destinations(self._resident), progress)
            return
        first, *copies = sorted(self._source.equal_layers.intersection(self._resident)) or [-1]
        made = {layer: buffer for layer, buffer in self._resident.items() if layer not in copies}
        if made:
            buffers = [(buffer, partial(self._views, layer)) for layer, buffer in made.items()]
            load_through_host(self._device, buffers, staging, feed, progress)
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
    if not staging:
        with pinned(device, max(buffer.numel() for buffer, _ in buffers)) as owned:
            load_through_host(device, buffers, [owned.tensor], feed, progress)
        return
    flying: list[CopyTicket] = []
    try:
        for number, (buffer, views) in enumerate(buffers):
            if number >= len(staging):
                device.drain(flying[number - len(staging)])
            host = staging[number % len(staging)][: buffer.numel()]
            feed.fill(views(host), progress)
            flying.append(device.copy_async(buffer, host, device.mark()))
    finally:
        device.drain_copies()
    for ticket in flying:
        device.wait(ticket)  # an error of a copy is raised here
