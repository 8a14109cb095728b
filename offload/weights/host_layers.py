"""The host memory of decoder layers: a home for each, and the buffers of a ring. Knows neither files nor what a layer holds."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..device import Device, HostBuffer
from ..device.host import move_by_threads
from .placement import RING_BUFFERS, spread_order


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """uint8 host memory. `is_pinned`: the device copies from it at the link's rate, being page-locked or its own."""

    memory: torch.Tensor
    is_pinned: bool


class HostLayers:
    """Owns host memory for layers, of which `stored_bytes` says how large each is.

    A home is as large as its layer. Only the first two may be larger: they are as large as any layer, so that a ring can take
    them over. `ring` is empty until there is need of one.
    """

    def __init__(self, device: Device, stored_bytes: Sequence[int]) -> None:
        self.ring: list[torch.Tensor] = []
        self._device, self._stored_bytes = device, stored_bytes
        self._homes: dict[int, Piece] = {}  # those of the first buffer come first, in its order: what is pinned is in front
        self._buffers: list[HostBuffer] = []

    @property
    def homes(self) -> dict[int, torch.Tensor]:
        """[stored_bytes[layer]] uint8 of every layer that has a home."""
        return {layer: piece.memory[: self._stored_bytes[layer]] for layer, piece in self._homes.items()}

    @property
    def num_bytes(self) -> int:
        return sum(buffer.tensor.numel() for buffer in self._buffers)

    @property
    def pinned_bytes(self) -> int:
        return sum(buffer.pinned_bytes for buffer in self._buffers)

    @property
    def pageable(self) -> frozenset[int]:
        return frozenset(layer for layer, piece in self._homes.items() if not piece.is_pinned)

    @property
    def roomy(self) -> list[torch.Tensor]:
        """Buffers, if there are any, that any layer fits into: what is staged in them comes before the homes are filled."""
        if self.ring:
            return self.ring
        pieces = [piece.memory for piece in self._own_pieces()[:RING_BUFFERS]]
        return [memory for memory in pieces if memory.numel() == max(self._stored_bytes)]

    @property
    def ring_cost_bytes(self) -> int:
        """What `make_ring` takes beyond what there is, if it keeps all homes."""
        return sum(self._ring_sizes(self._front()))

    def add(self, layers: Sequence[int]) -> None:
        """A home for each of `layers`; those that the device would not pin are spread evenly among them, so that the ring is
        filled while others are copied. HostMemoryError when there is no room: then nothing has changed."""
        ordered = [layers[place] for place in spread_order(len(layers))]
        may_need_ring = not self.ring and not self._device.host_addressable
        num_roomy = max(RING_BUFFERS - len(self._own_pieces()), 0) if may_need_ring else 0
        roomy = sorted(ordered, key=self._stored_bytes.__getitem__, reverse=True)[:num_roomy]  # the largest, to waste little
        others = [layer for layer in ordered if layer not in roomy]
        sizes = [max(self._stored_bytes)] * len(roomy) + [self._stored_bytes[layer] for layer in others]
        self._homes |= zip([*roomy, *others], self._pin(sizes), strict=True)

    def undo_add(self, layers: Sequence[int]) -> None:
        """Of the last `add`, which was of `layers`."""
        for layer in layers:
            del self._homes[layer]
        self._buffers.pop().close()

    def borrow(self, borrowed: Mapping[int, int]) -> None:
        """{borrower: owner}: the borrower's home is its owner's."""
        self._homes |= {borrower: self._homes[owner] for borrower, owner in borrowed.items()}

    def make_ring(self, *, keep: bool) -> frozenset[int]:
        """Find the ring its buffers: the memory of the first two homes, which is pinned if anything is, or new memory where
        there are no homes. Their layers move to new memory if `keep`; if not, they lose their homes, and are returned.
        HostMemoryError as in `add`."""
        front = self._front()
        new = self._pin(self._ring_sizes(front)) if keep else []
        moves = dict(zip(front, new, strict=False))
        for old, piece in moves.items():
            move_by_threads(piece.memory, old.memory[: piece.memory.numel()])
        left = frozenset() if keep else frozenset(layer for layer, piece in self._homes.items() if piece in front)
        self._homes = {layer: moves.get(piece, piece) for layer, piece in self._homes.items() if layer not in left}
        self.ring = [piece.memory for piece in (*front, *new[len(front) :])]
        return left

    def close(self) -> None:
        """Views of the memory are invalid afterwards."""
        self._homes.clear()
        self.ring.clear()
        while self._buffers:
            self._buffers.pop().close()

    def _front(self) -> dict[Piece, int]:
        """The first two homes, which a ring may take over, and a layer that lives in each."""
        layers = {piece: layer for layer, piece in reversed(self._homes.items())}
        return {piece: layers[piece] for piece in self._own_pieces()[:RING_BUFFERS]}

    def _ring_sizes(self, front: Mapping[Piece, int]) -> list[int]:
        """Of the new pieces that the layers in `front` move to, and of as many buffers as the ring lacks then."""
        missing = RING_BUFFERS - len(front)
        return [*(self._stored_bytes[layer] for layer in front.values()), *[max(self._stored_bytes)] * missing]

    def _own_pieces(self) -> list[Piece]:
        """Of the homes, without those that are borrowed."""
        return list(dict.fromkeys(self._homes.values()))

    def _pin(self, sizes: Sequence[int]) -> list[Piece]:
        """New memory in pieces of `sizes` bytes."""
        cuts = list(itertools.accumulate(sizes))
        buffer = self._device.pin(sum(sizes), cuts)
        self._buffers.append(buffer)
        return [
            Piece(buffer.tensor[cut - size : cut], self._device.host_addressable or cut <= buffer.pinned_bytes)
            for size, cut in zip(sizes, cuts, strict=True)
        ]
