"""Who sees whom among the nodes of a tree, on the device: once for the tree of a plan, whose first nodes are views of it."""

import torch

from tree.shape import TreeShape

from ..device import Device


class TreeMasks:
    """Holds the mask of one tree, N x N bytes; target and draft share it. Any other tree gets a mask of its own."""

    def __init__(self, device: Device, shape: TreeShape | None = None) -> None:
        self._device = device
        self._shape: TreeShape | None = None
        self._mask = torch.empty(0, 0, dtype=torch.bool)
        self.hold(shape or TreeShape.root_only())

    def hold(self, shape: TreeShape) -> None:
        """The mask of `shape`, in place of what was held. Between rounds: it is too large to be uploaded in one without waiting
        for the layers that are under way."""
        self.close()  # the old one goes before the new one comes
        mask = self._device.alloc(shape.num_nodes**2).view(torch.bool).view(shape.num_nodes, shape.num_nodes)  # [N, N]
        self._mask = mask.copy_(torch.from_numpy(shape.ancestor_mask.copy()))
        self._shape = shape

    def of(self, shape: TreeShape, num_nodes: int | None = None) -> torch.Tensor:
        """[n, n] bool of the first `num_nodes` nodes of `shape`, of all if None: row v marks what node v sees.

        A view where the tree that is held begins with `shape`; else uploaded, and whoever asked keeps it as long as needed.
        """
        num_nodes = shape.num_nodes if num_nodes is None else num_nodes
        if self._shape is not None and shape.parents == self._shape.parents[: shape.num_nodes]:
            return self._mask[:num_nodes, :num_nodes]
        return self._device.upload(torch.from_numpy(shape.ancestor_mask[:num_nodes, :num_nodes].copy()))

    def close(self) -> None:
        """Give the memory back."""
        self._shape, self._mask = None, torch.empty(0, 0, dtype=torch.bool)
