"""Masks are made on the device, from nothing but parents."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload.device import Device
from offload.device.cpu import CpuDevice
from offload.model.masks import seen_by, tree_mask
from shapes import from_widths, shapes
from tree.shape import TreeShape


@given(shapes())
def test_a_mask_is_that_of_the_ancestors(shape: TreeShape) -> None:
    assert torch.equal(tree_mask(shape, CpuDevice()), torch.from_numpy(shape.ancestor_mask.copy()))


@pytest.mark.parametrize(
    "shape", [TreeShape.root_only(), TreeShape.chains(1, 63), TreeShape.chains(3, 64), from_widths((5, 2, 3))]
)
def test_deep_trees_are_seen_to_the_root(shape: TreeShape, device: Device) -> None:
    assert torch.equal(tree_mask(shape, device), torch.from_numpy(shape.ancestor_mask.copy()))


@given(shapes(), st.lists(st.integers(1, 7), min_size=12, max_size=12))
def test_a_mask_may_grow_by_any_numbers_of_nodes(shape: TreeShape, counts: list[int]) -> None:
    """Parents and children may come at once. The root has no row here."""
    device, parents = CpuDevice(), [parent - 1 for parent in shape.parents[1:]]
    sees = torch.zeros(0, 0, dtype=torch.bool)
    ends = [end for end in accumulate(counts) if end < len(parents)]
    for begin, end in zip([0, *ends], [*ends, len(parents)], strict=True):
        sees = seen_by(sees, parents[begin:end], device)
    assert torch.equal(sees, torch.from_numpy(shape.ancestor_mask.copy())[1:, 1:])
