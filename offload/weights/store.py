"""Where the decoder layers live: on the device (resident), in host memory, or on disk; the bases of those that come and go; and
the ring that brings what the device does not copy from where it lies."""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch

from ..device import Device, Ticket
from ..device.host import move_by_threads
from ..errors import HostMemoryError
from .bases import LayerBases
from .codec import LayerCodec, scratch_bytes
from .host_layers import HostLayers
from .layer_reader import LayerReader
from .layout import LayerLayout
from .placement import Placement
from .ring import BounceRing, RingFill
from .source import TensorFeed, TensorSource

Progress = Callable[[int], None]


class WeightStore:
    """Owns the memory of all decoder layers and fills it: the device's is taken at once, the host's by `take_host_memory`, and
    `load` fills both. Host memory held: what is stored of the host layers, plus a ring when some layers are on disk or could
    not be pinned (see HostLayers); peak while loading is that, the reader's buffers (see TensorReader), and a base where the
    host does not write to the device.

    `codecs` has one for each layer. `placement` says where layers came to lie: which are pageable, and which went to disk as a
    ring for those would have taken more than `most_host_bytes`. Layers are asked for in the order of passes.

    A layer that has a base is decoded from it and from what is stored of it. So where it is resident as it computes, it is read
    from `parameters`, the tensors as the model has them; other layers need none of those.
    """

    def __init__(
        self,
        device: Device,
        source: TensorSource,
        codecs: Sequence[LayerCodec],
        prefix: str,
        placement: Placement,
        most_host_bytes: int | None = None,
        parameters: TensorSource | None = None,
    ) -> None:
        self.codecs, self.stored_bytes = tuple(codecs), tuple(codec.stored.num_bytes for codec in codecs)
        self._device, self._source, self._most_host_bytes = device, source, most_host_bytes
        self._resident = {layer: device.alloc(self._resident_bytes(layer, placement)) for layer in sorted(placement.resident)}
        self._parameters, self._reader = parameters, LayerReader(device, source, self.codecs, prefix)
        self._bases = LayerBases(device, self.codecs)
        self._bases.take(placement.decoded)
        self._memory = HostLayers(device, self.stored_bytes)
        self._homes: dict[int, torch.Tensor] = {}
        self._ring: BounceRing | None = None
        self._files = ExitStack()  # what the ring reads from
        self.placement, self._through_ring = placement, frozenset(placement.through_ring)

    @property
    def slot_bytes(self) -> int:
        """What a slot must hold: the largest layer. Also if that is resident, as it may leave the device."""
        return max(self.stored_bytes)

    @property
    def scratch_bytes(self) -> int:
        """What a layer is decoded into must hold: the largest that is decoded, as in `slot_bytes`."""
        return scratch_bytes(self.codecs)

    @property
    def resident(self) -> dict[int, dict[str, torch.Tensor]]:
        """The parameters of the resident layers, used in place; of those that are kept as they compute."""
        kept = {layer: buffer for layer, buffer in self._resident.items() if layer not in self.placement.coded}
        return {layer: self.codecs[layer].computed.views(buffer) for layer, buffer in kept.items()}

    @property
    def coded(self) -> dict[int, dict[str, torch.Tensor]]:
        """What is stored of the resident layers that are decoded in every pass."""
        return {layer: self.codecs[layer].stored.views(self._resident[layer]) for layer in self.placement.coded}

    def base(self, layer: int) -> dict[str, torch.Tensor]:
        """What the device keeps of a layer that is not resident as it computes: nothing where it has no base."""
        return self._bases.views(layer)

    @property
    def drafting(self) -> list[Mapping[str, torch.Tensor]]:
        """What a base drafts with, layer by layer: where one is resident as it computes, that."""
        raw = self.resident
        return [raw[layer] if layer in raw else self.base(layer) for layer in range(self.placement.num_layers)]

    @property
    def base_bytes(self) -> int:
        """Device memory held for bases."""
        return self._bases.num_bytes

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
        if self.placement.disk:
            self._memory.make_ring(keep=True)  # first, as it is the ring that must be pinned
        self._memory.add(self.placement.host_owners)
        self._memory.borrow(self.placement.borrowed)
        self._settle(self.placement)

    def load(self, progress: Progress | None = None, slot: torch.Tensor | None = None) -> None:
        """Read every layer that has a place in memory, and every base. `progress` gets bytes read. Resident layers are decoded
        here, once, but for those that the placement keeps coded, and those that have a base. They land in `slot`, [slot_bytes]
        of the device that nobody uses yet, or in memory that is allocated for it."""
        placement, roomy, reader = self.placement, self._memory.roomy, self._reader
        raw = {layer: buffer for layer, buffer in self._resident.items() if layer not in placement.coded}
        has_base = {layer: buffer for layer, buffer in raw.items() if self.codecs[layer].base.fields}
        if has_base:
            assert self._parameters is not None, "layers with a base need the source of parameters"
            reader.read_raw(self._parameters, has_base, roomy, progress)
        decoded = {layer: buffer for layer, buffer in raw.items() if layer not in has_base and self._is_decoded(layer)}
        as_stored = {layer: buffer for layer, buffer in raw.items() if layer not in has_base | decoded}
        reader.read_raw(self._source, as_stored, roomy, progress)
        if decoded:
            slot = self._device.alloc(self.slot_bytes) if slot is None else slot
            reader.read_and_decode(decoded, slot, roomy, progress)
        coded = {layer: self._resident[layer] for layer in placement.coded}
        bases = self._bases.only(placement.decoded)
        reader.read_stored(placement.coded, coded, {}, bases, roomy, progress)
        homes = {layer: self._homes[layer] for layer in placement.host_owners}
        reader.read_stored(placement.streamed, {}, homes, bases, self._memory.ring, progress)

    def leaving(self, placement: Placement) -> list[torch.Tensor]:
        """The device buffers that layers would leave under `placement`."""
        return [buffer for layer, buffer in self._resident.items() if layer not in placement.resident]

    def evict(self, placement: Placement, spare: Sequence[torch.Tensor] = ()) -> None:
        """Go over to `placement`, which keeps fewer layers on the device; those that leave go to host memory, or back to disk.
        No copy may be under way. HostMemoryError when the host has no room, OutOfMemoryError when the device has none for a
        base, not even in `spare` buffers of those that leave: then the layers are where they were, as after an interruption
        while they are on their way."""
        leaving = sorted(self.placement.resident - placement.resident)
        to_host = [layer for layer in leaving if layer not in placement.disk]
        self.start_over()
        bases = self._bases.take(leaving, spare)
        try:
            self._memory.add(to_host)
        except BaseException:
            self._bases.drop(bases)
            raise
        try:
            self._bring_home(to_host, bases)
        except BaseException:  # Ctrl-C above all, as it takes a while
            self._undo(to_host, bases)
            raise
        try:
            self._settle(placement)
        except HostMemoryError:  # of a ring, before anything else has changed
            self._undo(to_host, bases)
            raise
        for layer in leaving:
            del self._resident[layer]

    def through_ring(self, layer: int) -> bool:
        """Whether `layer` comes by way of the ring, as it turned out when memory was taken."""
        return layer in self._through_ring

    def ready(self, layer: int) -> bool:
        """Whether `source(layer)` would return at once."""
        return layer not in self._through_ring or self._open_ring().ready()

    def source(self, layer: int) -> torch.Tensor:
        """[stored_bytes[layer]] uint8 host memory holding `layer`, from which the device copies at its full rate; blocks while
        the ring is being filled with it, and raises what that raised, as DeviceError for the disk."""
        if layer in self._through_ring:
            return self._open_ring().source(layer)[: self.stored_bytes[layer]]
        return self._homes[layer]

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

    def any_source(self) -> torch.Tensor:
        """Host memory of a layer's size to time copies from, pinned if any is. Its contents do not matter."""
        return self._memory.ring[0] if self._memory.ring else next(iter(self._homes.values()))

    def move_rate(self) -> float:
        """Bytes per second at which some pageable layer moves into the ring. Before the first pass, or after `start_over`."""
        assert self._ring is None
        home, start_s = self._homes[min(self.placement.pageable)], time.monotonic()
        move_by_threads(self._memory.ring[-1][: home.numel()], home)
        return home.numel() / max(time.monotonic() - start_s, 1e-9)

    def close(self) -> None:
        self.start_over()
        self._resident.clear()
        self._bases.close()
        self._homes.clear()
        self._memory.close()

    def _settle(self, placement: Placement) -> None:
        """Go by `placement`, with what the device would not pin, and with a ring for that. Nobody planned one: where the host
        has no room for it, layers stay on disk, and it has their memory."""
        memory = self._memory
        if memory.pageable and not memory.ring:
            planned_bytes = memory.num_bytes + memory.ring_cost_bytes
            has_room = self._most_host_bytes is None or planned_bytes <= self._most_host_bytes
            placement = replace(placement, disk=placement.disk | memory.make_ring(keep=has_room))
        self.placement = replace(placement, pageable=memory.pageable)
        self._through_ring = frozenset(self.placement.through_ring)
        self._homes = memory.homes

    def _open_ring(self) -> BounceRing:
        """It begins when it is first asked for, so that it does not compete with what is measured before the first pass."""
        if self._ring is None:
            feed = self._files.enter_context(self._source.open()) if self.placement.disk else None
            order, bring = self.placement.through_ring, partial(self._bring, feed)
            self._ring = BounceRing(self._device, self._memory.ring, order, bring)
        return self._ring

    def _bring(self, feed: TensorFeed | None, layer: int, buffer: torch.Tensor) -> None:
        home = self._homes.get(layer)
        if home is not None:
            move_by_threads(buffer[: home.numel()], home)
        else:
            assert feed is not None
            feed.fill(self._reader.place(layer, self.codecs[layer].stored, buffer).destinations(buffer))

    def _bring_home(self, layers: Sequence[int], bases: Sequence[int]) -> None:
        """Resident layers into their host memory, and the `bases` of those that are streamed from now on. Those that were
        decoded are read once more, as nothing encodes them."""
        homes = self._memory.homes
        for layer in layers:
            if not self._is_decoded(layer):
                self._download(self.codecs[layer].stored, self._resident[layer], homes[layer])
        decoded = {layer: homes[layer] for layer in layers if self._is_decoded(layer)}
        self._reader.read_stored({*decoded, *bases}, {}, decoded, self._bases.only(bases), self._memory.ring, None)

    def _undo(self, to_host: Sequence[int], bases: Sequence[int]) -> None:
        self._memory.undo_add(to_host)
        self._bases.drop(bases)

    def _download(self, layout: LayerLayout, buffer: torch.Tensor, home: torch.Tensor) -> None:
        """Tensor by tensor: a device may need as much host memory again for what it downloads at once."""
        places = layout.views(home)
        for name, tensor in layout.views(buffer).items():
            places[name].copy_(self._device.download(tensor))

    def _is_decoded(self, layer: int) -> bool:
        """Of a resident layer: its parameters are what the device keeps, and they are not what is stored."""
        return self.codecs[layer].decode is not None and layer not in self.placement.coded

    def _resident_bytes(self, layer: int, placement: Placement) -> int:
        return self.stored_bytes[layer] if layer in placement.coded else self.codecs[layer].computed.num_bytes
