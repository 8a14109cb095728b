"""Who sees whom among the nodes of a tree, on the device: once for the tree of a plan, whose first levels are its views."""

import torch

from tree.shape import TreeShape

from ..device import Device


class TreeMasks:
    """Holds the mask of one tree, N x N bytes; target and draft share it."""

    def __init__(self, device: Device, shape: TreeShape | None = None) -> None:
        self._device = device
        self._shape: TreeShape | None = None
        self._mask = torch.empty(0, 0, dtype=torch.bool)
        self.hold(shape or TreeShape.root_only())

    def hold(self, shape: TreeShape) -> None:
        """The mask of `shape`, in place of what was held. Between rounds: it is too large to be uploaded in one without waiting
        for the layers that are under way."""
        self.close()  # the old one goes before the new one comes
        mask = self._device.alloc(shape.num_nodes**2).view(torch.bool).view(shape.num_nodes, shape.num_nodes)
        self._mask = mask.copy_(torch.from_numpy(shape.ancestor_mask.copy()))
        self._shape = shape

    def of(self, shape: TreeShape, num_nodes: int | None = None) -> torch.Tensor:
        """[n, n] bool of the first `num_nodes` nodes of `shape`, of all if None: row v marks what node v sees. Of the tree that
        is held, and of its first levels, a view; any other takes its place."""
        num_nodes = shape.num_nodes if num_nodes is None else num_nodes
        if self._shape is None or shape.parents != self._shape.parents[: shape.num_nodes]:
            self.hold(shape)
        return self._mask[:num_nodes, :num_nodes]

    def close(self) -> None:
        """Give the memory back."""
        self._shape, self._mask = None, torch.empty(0, 0, dtype=torch.bool)
