"""The mask of a plan's tree lies on the device once, and serves all trees that it begins with; others have their own."""

import pytest
import torch

from fakes import CountingDevice
from offload.device import Device
from offload.errors import HostMemoryError
from offload.model.masks import TreeMasks
from shapes import from_widths
from tree.shape import TreeShape

TREE, OTHER = from_widths((5, 2, 3)), from_widths((2, 6))


def test_the_mask_of_every_tree_is_its_own_and_that_of_a_cut_one_a_view(device: Device) -> None:
    masks = TreeMasks(device, TREE)
    whole = masks.of(TREE)
    levels = [TREE.truncated(num_levels) for num_levels in range(TREE.num_levels, 0, -1)]
    for cut in (*levels, TreeShape(TREE.parents[:9]), TreeShape(TREE.parents[:3])):
        mask = masks.of(cut)
        assert torch.equal(mask, torch.from_numpy(cut.ancestor_mask.copy()))
        assert mask.data_ptr() == whole.data_ptr()
    assert masks.of(TREE, 0).shape == (0, 0)
    for shape in (OTHER, TREE, OTHER.truncated(2), TREE):  # equal numbers of nodes are not enough
        assert torch.equal(masks.of(shape), torch.from_numpy(shape.ancestor_mask.copy()))


def test_the_mask_of_the_chosen_tree_is_held_whatever_else_is_asked_for() -> None:
    """Texts of one pass may have other trees, in any order."""
    device = CountingDevice()
    masks = TreeMasks(device, TREE)
    held = masks.of(TREE).data_ptr()
    for shape in (TREE.truncated(2), OTHER, TREE, TREE.truncated(3), OTHER):
        masks.of(shape)
    assert device.held_bytes == TREE.num_nodes**2 and masks.of(TREE).data_ptr() == held
    masks.hold(OTHER)
    assert device.held_bytes == OTHER.num_nodes**2
    assert masks.of(OTHER).data_ptr() == masks.of(OTHER.truncated(2)).data_ptr()
    masks.close()
    assert device.held_bytes == 0
    assert masks.of(TREE).shape == (TREE.num_nodes, TREE.num_nodes)
    device.close()


def test_a_mask_that_finds_no_room_is_made_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    device = CountingDevice()
    masks = TreeMasks(device, TREE)

    def refuse(num_bytes: int) -> torch.Tensor:
        raise HostMemoryError("full", where="x", cure="y")

    with monkeypatch.context() as patch, pytest.raises(HostMemoryError):
        patch.setattr(device, "alloc", refuse)
        masks.hold(OTHER)
    assert torch.equal(masks.of(OTHER), torch.from_numpy(OTHER.ancestor_mask.copy()))
    device.close()
