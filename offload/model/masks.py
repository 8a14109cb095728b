"""Who sees whom among the nodes of a tree, made on the device from their parents: a mask has a square of them, and what is
uploaded while layers are under way waits for them."""

from collections.abc import Sequence

import torch

from tree.shape import TreeShape

from ..device import Device


def tree_mask(shape: TreeShape, device: Device) -> torch.Tensor:
    """[N, N] bool on the device: row v marks the root, v and every node between them.

    Every round doubles how far a node sees: what it sees, and what the last of those sees.
    """
    jump = device.upload(torch.tensor((0, *shape.parents[1:])))  # [N]: 1, 2, 4, ... levels up
    mask = torch.eye(shape.num_nodes, dtype=torch.bool, device=jump.device)
    for _ in range((shape.num_levels - 1).bit_length()):
        mask |= mask.index_select(0, jump)
        jump = jump.index_select(0, jump)
    return mask


class NodeMask:
    """Who sees whom among at most `most` nodes that come a few at a time: the rows of one square that lies on the device. They
    are written anew where nodes have been renumbered."""

    def __init__(self, device: Device, most: int) -> None:
        self._device = device
        # Row v + 1 marks all that node v sees, itself among them. Row 0 is that of the root, which has no column.
        self._square = device.alloc((most + 1) * most).view(torch.bool).view(most + 1, most)
        self._square[0] = False
        self._num_written = 0

    def forget(self) -> None:
        """The next nodes are others."""
        self._num_written = 0

    def rows(self, parents: Sequence[int], begin: int) -> torch.Tensor:
        """Those of nodes `begin`, begin + 1, ...: [n, M] bool, right until the next `forget`. `parents` are those of all M
        nodes, in the order of their rows (-1: none): a parent comes before its child. Those before `begin` that an earlier call
        had are the same still."""
        written, num_nodes = min(self._num_written, begin), len(parents)
        while written < num_nodes:  # up to the first whose parent comes with it: mostly all at once
            end = next((node for node in range(written + 1, num_nodes) if parents[node] >= written), num_nodes)
            above = self._device.upload(torch.tensor([parent + 1 for parent in parents[written:end]]))  # [k]
            new = self._square[written + 1 : end + 1]
            new.copy_(self._square.index_select(0, above))
            new.diagonal(written).fill_(True)
            written = end
        self._num_written = num_nodes
        return self._square[begin + 1 : num_nodes + 1, :num_nodes]
