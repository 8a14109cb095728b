"""What a pass is given: the tokens of its rows, where they stand in the text, and who sees whom. Pure, but for the upload."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..device import Device
from ..model.attention import pass_mask


@dataclass(frozen=True, slots=True)
class PassInputs:
    """All on the device; N rows, T of them and of the cache before them."""

    token_ids: torch.Tensor  # [N] int64
    positions: torch.Tensor  # [N] int64
    mask: torch.Tensor  # [1, 1, N, T] bool


def pass_inputs(
    device: Device,
    cached_rows: int,
    prefix: Sequence[int],
    node_ids: torch.Tensor,
    depths: Sequence[int],
    tree_mask: torch.Tensor,
) -> PassInputs:
    """Committed tokens `prefix`, which continue the cache, and right behind them the n >= 0 nodes of a tree: tokens `node_ids`
    [n], levels `depths`, and `tree_mask` [n, n] bool, which is on the device."""
    root = cached_rows + len(prefix)
    positions = torch.cat([torch.arange(cached_rows, root), root + torch.tensor(depths, dtype=torch.int64)])
    prefix_ids = device.upload(torch.tensor(prefix, dtype=torch.int64))
    return PassInputs(
        torch.cat([prefix_ids, device.upload(node_ids)]),
        device.upload(positions),
        pass_mask(cached_rows, len(prefix), tree_mask),
    )
