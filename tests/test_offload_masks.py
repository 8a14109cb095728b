"""The mask of a plan's tree lies on the device once, and serves all that are its first levels."""

import pytest
import torch

from fakes import CountingDevice
from offload.device import Device
from offload.errors import HostMemoryError
from offload.model.masks import TreeMasks
from tree.shape import TreeShape

TREE, OTHER = TreeShape.from_widths((5, 2, 3)), TreeShape.from_widths((2, 6))


def test_the_mask_of_every_tree_is_its_own_and_that_of_a_cut_one_a_view(device: Device) -> None:
    masks = TreeMasks(device, TREE)
    whole = masks.of(TREE)
    for num_levels in range(TREE.num_levels, 0, -1):
        cut = TREE.truncated(num_levels)
        mask = masks.of(cut)
        assert torch.equal(mask, torch.from_numpy(cut.ancestor_mask.copy()))
        assert mask.data_ptr() == whole.data_ptr()
    assert masks.of(TREE, 0).shape == (0, 0)
    for shape in (OTHER, TREE, OTHER.truncated(2), TREE):  # equal numbers of nodes are not enough
        assert torch.equal(masks.of(shape), torch.from_numpy(shape.ancestor_mask.copy()))


def test_one_mask_is_held_whatever_was_asked_for() -> None:
    device = CountingDevice()
    masks = TreeMasks(device, TREE)
    for shape in (TREE.truncated(2), OTHER, TREE, TREE.truncated(3), OTHER):
        masks.of(shape)
    assert device.held_bytes == OTHER.num_nodes**2
    masks.close()
    assert device.held_bytes == 0
    assert masks.of(TREE).shape == (TREE.num_nodes, TREE.num_nodes)
    device.close()


def test_a_mask_that_finds_no_room_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    device = CountingDevice()
    masks = TreeMasks(device, TREE)

    def refuse(num_bytes: int) -> torch.Tensor:
        raise HostMemoryError("full", where="x", cure="y")

    with monkeypatch.context() as patch, pytest.raises(HostMemoryError):
        patch.setattr(device, "alloc", refuse)
        masks.of(OTHER)
    assert torch.equal(masks.of(OTHER), torch.from_numpy(OTHER.ancestor_mask.copy()))
    device.close()
