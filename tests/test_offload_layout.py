"""Layer buffers: aligned, disjoint, shared with their views; host memory of exact size."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload.device.host import HostMapping, move_by_threads
from offload.weights.layout import ALIGNMENT_BYTES, LayerLayout, lay_out, views_of_each

shapes = st.lists(st.lists(st.integers(1, 9), max_size=3).map(tuple), min_size=1, max_size=6)


@given(shapes, st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_fields_are_aligned_disjoint_and_inside(sizes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    layout = LayerLayout.pack([(str(number), shape, dtype) for number, shape in enumerate(sizes)])
    end = 0
    for field in layout.fields:
        assert field.offset_bytes % ALIGNMENT_BYTES == 0 and field.offset_bytes >= end
        end = field.offset_bytes + field.num_bytes
    assert end <= layout.num_bytes < end + ALIGNMENT_BYTES
    assert layout.num_bytes - sum(math.prod(s) for s in sizes) * dtype.itemsize < ALIGNMENT_BYTES * len(sizes)


@given(shapes)
def test_views_write_through_to_the_buffer(sizes: list[tuple[int, ...]]) -> None:
    layout = LayerLayout.pack([(str(number), shape, torch.float32) for number, shape in enumerate(sizes)])
    buffer = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    for number, view in enumerate(layout.views(buffer).values()):
        view.fill_(number + 1)
    for number, (shape, view) in enumerate(zip(sizes, layout.views(buffer).values(), strict=True)):
        assert view.shape == shape and bool((view == number + 1).all())


@pytest.mark.parametrize("num_bytes", [0, 1, 4096, 1_000_003])
def test_host_memory_is_of_exact_size_and_writable(num_bytes: int) -> None:
    mapping = HostMapping(num_bytes)
    mapping.touch()
    assert mapping.tensor.numel() == num_bytes
    mapping.tensor.fill_(7)
    assert int(mapping.tensor.sum()) == 7 * num_bytes


@pytest.mark.parametrize("num_bytes", [0, 1, 7, 4096, 100_001])
def test_threads_move_every_byte(num_bytes: int) -> None:
    src = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8)
    dst = torch.zeros_like(src)
    move_by_threads(dst, src)
    assert torch.equal(dst, src)


def test_equal_layers_share_one_layout_and_its_views() -> None:
    small, large = {"a": (2,)}, {"a": (300,), "b": (1,)}
    layouts = lay_out([small, large, small], torch.float32)
    assert layouts[0] is layouts[2] and [layout.num_bytes for layout in layouts] == [256, 1536, 256]
    views = views_of_each(layouts, torch.zeros(1536, dtype=torch.uint8))
    assert views[0] is views[2] and [view["a"].numel() for view in views] == [2, 300, 2]
    assert views[0]["a"].data_ptr() == views[1]["a"].data_ptr()
