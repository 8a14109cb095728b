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


def seen_by(sees: torch.Tensor, parents: Sequence[int], device: Device) -> torch.Tensor:
    """`sees` [M, M] bool, of nodes in the order of their rows, with n more below `parents` (-1: none): [M + n, M + n]. A parent
    may be among the new ones, before its child."""
    num_old, num_all = len(sees), len(sees) + len(parents)
    grown = torch.eye(num_all, dtype=torch.bool, device=sees.device)
    grown[:num_old, :num_old] = sees
    begin = num_old
    while begin < num_all:  # up to the first whose parent comes with it: mostly all at once
        end = next((node for node in range(begin, num_all) if parents[node - num_old] >= begin), num_all)
        below = parents[begin - num_old : end - num_old]
        rows = grown.index_select(0, device.upload(torch.tensor([max(parent, 0) for parent in below])))  # [k, M + n]
        if min(below) < 0:
            rows &= device.upload(torch.tensor([parent >= 0 for parent in below]))[:, None]
        grown[begin:end] |= rows
        begin = end
    return grown
