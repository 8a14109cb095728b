"""Masks are made on the device, from nothing but parents."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload.device import Device
from offload.device.cpu import CpuDevice
from offload.model.masks import NodeMask, tree_mask
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


@given(shapes(), st.lists(st.integers(1, 7), min_size=12, max_size=12), st.sets(st.integers(0, 59)))
def test_a_mask_may_grow_by_any_numbers_of_nodes(shape: TreeShape, counts: list[int], forgotten: set[int]) -> None:
    """Parents and children may come at once. The root has no row here. What a square held before does not matter."""
    parents = [parent - 1 for parent in shape.parents[1:]]
    mask, sees = NodeMask(CpuDevice(), 60), torch.from_numpy(shape.ancestor_mask.copy())[1:, 1:]
    mask._square[1:] = True
    ends = [end for end in accumulate(counts) if end < len(parents)]
    for begin, end in zip([0, *ends], [*ends, len(parents)], strict=True):
        if begin in forgotten:
            mask.forget()
        mask.rows([*parents[:begin], *[-1] * (end - begin)], begin)  # of a pass that failed
        assert torch.equal(mask.rows(parents[:end], begin), sees[begin:end, :end])
