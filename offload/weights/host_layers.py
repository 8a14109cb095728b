"""The host memory of decoder layers, in pieces of one layer: a home for each, and the buffers of a ring. Knows neither files
nor what a layer holds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..device import Device, HostBuffer
from ..device.host import move_by_threads
from .placement import RING_BUFFERS, spread_evenly


@dataclass(frozen=True, slots=True)
class Piece:
    """[layer_bytes] uint8. `is_direct`: the device copies from it at the link's rate, as it is pinned, or the device's own."""

    memory: torch.Tensor
    is_direct: bool


class HostLayers:
    """Owns host memory of exact size. `ring` is empty until there is need of one."""

    def __init__(self, device: Device, layer_bytes: int) -> None:
        self.homes: dict[int, Piece] = {}
        self.ring: list[torch.Tensor] = []
        self._device, self._layer_bytes = device, layer_bytes
        self._buffers: list[HostBuffer] = []

    @property
    def num_bytes(self) -> int:
        return sum(buffer.tensor.numel() for buffer in self._buffers)

    @property
    def pinned_bytes(self) -> int:
        return sum(buffer.pinned_bytes for buffer in self._buffers)

    @property
    def pageable(self) -> frozenset[int]:
        return frozenset(layer for layer, home in self.homes.items() if not home.is_direct)

    def add(self, layers: Sequence[int]) -> None:
        """A home for each of `layers`; what the device would not pin is spread evenly among them, so that the ring is filled
        while others are copied. HostMemoryError when there is no room: then nothing has changed."""
        pieces = self._pin(len(layers))
        direct = [piece for piece in pieces if piece.is_direct]
        others = [piece for piece in pieces if not piece.is_direct]
        places = spread_evenly(len(others), len(pieces))
        for order, layer in enumerate(layers):
            self.homes[layer] = (others if order in places else direct).pop()

    def take_back(self, layers: Sequence[int]) -> None:
        """Undo the last `add`, which was of `layers`."""
        for layer in layers:
            del self.homes[layer]
        self._buffers.pop().close()

    def share(self, shared: Mapping[int, int]) -> None:
        """{borrower: owner}: the borrower's home is its owner's."""
        self.homes |= {borrower: self.homes[owner] for borrower, owner in shared.items()}

    def make_ring(self, leaving: Sequence[int]) -> None:
        """Find the ring its buffers: the homes of the layers that are `leaving`, or new memory if none are. It is the ring that
        must be pinned: where the device refuses more, layers move out of homes that are. HostMemoryError as in `add`."""
        for piece in [self.homes.pop(layer) for layer in leaving] or self._pin(RING_BUFFERS):
            pinned = next((home for home in self.homes.values() if home.is_direct), None)
            if not piece.is_direct and pinned is not None:
                move_by_threads(piece.memory, pinned.memory)
                self.homes = {layer: piece if home is pinned else home for layer, home in self.homes.items()}
                piece = pinned
            self.ring.append(piece.memory)

    def close(self) -> None:
        """Views of the memory are invalid afterwards."""
        self.homes.clear()
        self.ring.clear()
        while self._buffers:
            self._buffers.pop().close()

    def _pin(self, num_pieces: int) -> list[Piece]:
        cuts = [self._layer_bytes * (order + 1) for order in range(num_pieces)]
        buffer = self._device.pin(self._layer_bytes * num_pieces, cuts)
        self._buffers.append(buffer)
        is_direct = [self._device.host_addressable or cut <= buffer.pinned_bytes for cut in cuts]
        memories = (buffer.tensor[cut - self._layer_bytes : cut] for cut in cuts)
        return [Piece(memory, direct) for memory, direct in zip(memories, is_direct, strict=True)]
