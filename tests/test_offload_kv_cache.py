"""Rows of several sequences in one cache, of layers of one shape or of several: written, kept in order, saved and loaded."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fakes import WatchedDevice
from offload.device import Device
from offload.device.cpu import CpuDevice
from offload.errors import FitError
from offload.model.kv_cache import KVCache, Segment
from offload.model.rope import Rope

ROPE = Rope(kind="fixed", native_tokens=200, max_positions=200)
ALIKE, UNLIKE = [(2, 5)] * 3, [(2, 5), (1, 3), (2, 5), (1, 3), (4, 5)]


def cache_of(device: Device, shapes: Sequence[tuple[int, int]] = UNLIKE, **sizes: Any) -> KVCache:
    sizes = {"num_segments": 1, "segment_rows": 20, "dtype": torch.float32, "rope": ROPE, **sizes}
    return KVCache(device, layer_shapes=shapes, **sizes)


def append(cache: KVCache, values: dict[Segment, list[float]]) -> None:
    """A pass that writes these numbers to the segments, with the layer's number added, values negative. What each layer is
    given back has all rows of the segments."""
    new = torch.tensor([value for numbers in values.values() for value in numbers])
    rows = cache.appending([(segment, len(numbers)) for segment, numbers in values.items()])
    for layer, all_rows in enumerate(cache._memory.layers):
        key = (new + layer)[None, None, :, None].expand(1, all_rows[0].shape[1], len(new), all_rows[0].shape[-1])
        keys, found = rows.update(key, -key, layer)
        for segment, numbers in values.items():
            end = segment.start + segment.rows + len(numbers)
            assert torch.equal(keys[:, :, segment.start : end], -found[:, :, segment.start : end])
            assert keys[0, 0, segment.start + segment.rows : end, 0].tolist() == [number + layer for number in numbers]
    for segment, numbers in values.items():
        segment.appended(range(segment.rows, segment.rows + len(numbers)))


def held(cache: KVCache, segment: Segment) -> list[float]:
    """The numbers of the committed rows, which all layers agree on."""
    found = []
    for layer, (keys, values) in enumerate(cache._memory.layers):
        rows = slice(segment.start, segment.start + segment.length)
        assert torch.equal(keys[:, :, rows], -values[:, :, rows])
        found.append([number - layer for number in keys[0, -1, rows, -1].tolist()])
    assert all(numbers == found[0] for numbers in found)
    return found[0]


@pytest.mark.matrix
@pytest.mark.parametrize("shapes", [ALIKE, UNLIKE])
@given(data=st.data())
def test_commits_keep_the_chosen_rows_in_order_and_nothing_else(shapes: list[tuple[int, int]], data: st.DataObject) -> None:
    device = CpuDevice()
    cache = cache_of(device, shapes, num_segments=3, segment_rows=12)
    kept: list[list[float]] = [[], [], []]
    for turn in range(3):
        counts = [data.draw(st.integers(0, 12 - segment.rows)) for segment in cache.segments]
        fresh = [[float(100 * turn + 20 * number + step) for step in range(count)] for number, count in enumerate(counts)]
        append(cache, dict(zip(cache.segments, fresh, strict=True)))
        for segment, numbers, rows in zip(cache.segments, kept, fresh, strict=True):
            chosen = sorted(data.draw(st.sets(st.integers(0, len(rows) - 1)))) if rows else []
            segment.commit(chosen)
            numbers += [rows[row] for row in chosen]
            segment.poison_tail()
        assert [held(cache, segment) for segment in cache.segments] == kept
    device.close()


@pytest.mark.parametrize("shapes", [ALIKE, UNLIKE])
@given(data=st.data())
def test_rows_that_are_kept_stay_pending_behind_the_committed_ones(shapes: list[tuple[int, int]], data: st.DataObject) -> None:
    """In their order, with their values and positions; what is appended then comes behind them."""
    device = CpuDevice()
    cache = cache_of(device, shapes, num_segments=2, segment_rows=18)
    segment, committed, pending = cache.segments[1], list[float](), list[float]()
    for turn in range(3):
        count = data.draw(st.integers(0, 18 - segment.rows))
        fresh = [float(20 * turn + step) for step in range(count)]
        append(cache, {segment: fresh})
        numbers = pending + fresh
        chosen = sorted(data.draw(st.sets(st.integers(0, len(numbers) - 1)))) if numbers else []
        cut = data.draw(st.integers(0, len(chosen)))
        positions = [segment.pending_positions[row] for row in chosen[cut:]]
        segment.commit(chosen[:cut], chosen[cut:])
        committed, pending = committed + [numbers[row] for row in chosen[:cut]], [numbers[row] for row in chosen[cut:]]
        assert segment.pending_positions == tuple(positions)
        segment.poison_tail()
        segment.length += segment.pending  # to be looked at with the others
        assert held(cache, segment) == committed + pending
        segment.length -= segment.pending
    device.close()


def test_memory_is_one_buffer_for_layers_of_one_shape(device: Device) -> None:
    assert [buffer.shape for buffer in cache_of(device, ALIKE)._memory.buffers] == [(3, 2, 1, 2, 20, 5)]
    cache = cache_of(device, UNLIKE, num_segments=2)
    assert [buffer.shape[0] for buffer in cache._memory.buffers] == [2, 2, 1]
    assert cache.bytes_per_row == 4 * 2 * (2 * 10 + 2 * 3 + 20) == cache.segments[1].bytes_per_row
    assert [(segment.start, segment.capacity) for segment in cache.segments] == [(0, 20), (20, 20)]
    cache.close()
    assert cache._memory.buffers == [] and cache.segments[0].capacity == 0


def test_rows_beyond_a_segment_are_refused_with_the_counts(device: Device) -> None:
    cache = cache_of(device, num_segments=2)
    first, second = cache.segments
    append(cache, {first: [1.0] * 18})
    first.check_room(2)
    second.check_room(20)
    with pytest.raises(FitError, match="18 cached rows \\+ 3 new rows > 20"):
        first.check_room(3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shapes", [ALIKE, UNLIKE])
def test_rows_go_out_and_come_back_bit_for_bit_beside_what_is_there(
    device: Device, shapes: list[tuple[int, int]], dtype: torch.dtype
) -> None:
    source = cache_of(device, shapes, dtype=dtype, num_segments=2)
    for buffer in source._memory.buffers:
        buffer.copy_(torch.randn(buffer.shape))
    origin, goal = source.segments[1], source.segments[0]
    origin.length = 14
    saved = origin.save_rows(12)
    assert saved.nbytes == 12 * source.bytes_per_row
    for buffer in source._memory.buffers:
        buffer[..., :20, :] = 0
    goal.length = 4
    goal.load_rows(saved, 9)
    assert goal.length == 9
    for buffer in source._memory.buffers:
        assert not buffer[..., :4, :].any() and not buffer[..., 9:20, :].any()
        assert torch.equal(buffer[..., 4:9, :], buffer[..., 24:29, :])
    goal.load_rows(saved, 99)
    assert goal.length == 12
    goal.load_rows(saved, 5)
    assert goal.length == 12
    for buffer in source._memory.buffers:
        assert torch.equal(buffer[..., 4:12, :], buffer[..., 24:32, :])


def test_rows_come_back_in_one_copy_a_layer_and_none_is_under_way_when_it_is_broken_off() -> None:
    """Not one for the keys and one for the values of each head."""
    device = WatchedDevice()
    cache = cache_of(device, ALIKE)
    segment, buffer = cache.segments[0], cache._memory.buffers[0]
    buffer.copy_(torch.randn(buffer.shape))
    segment.length = 12
    saved, rows = segment.save_rows(12), buffer[..., :12, :].clone()
    buffer.zero_()
    for interrupt_at in range(1, 7):
        broken = WatchedDevice(interrupt_at)
        cache._memory.device, segment.length = broken, 0
        with pytest.raises(KeyboardInterrupt):
            segment.load_rows(saved, 12)
        assert broken.num_under_way == 0 and segment.length == 0
        broken.close()
    cache._memory.device = device
    device.calls.clear()
    segment.load_rows(saved, 12)
    assert device.calls == ["copy", "copied"] * 3 and torch.equal(buffer[..., :12, :], rows)
    device.close()


def test_a_text_that_its_family_computes_anew_has_no_rows_left_and_counts_them_all() -> None:
    device = CpuDevice()
    rope = Rope(kind="longrope", native_tokens=8, max_positions=100, starts_over=True)
    first, second = cache_of(device, rope=rope, num_segments=2).segments
    for segment in (first, second):
        segment.begin_text(5, 6)
        segment.length = 6
    first.grown(8)
    assert (first.length, first.counted_prompt) == (6, 5)
    first.grown(9)
    assert (first.length, first.counted_prompt) == (0, 9)
    first.length = 9
    first.grown(12)
    assert (first.length, first.counted_prompt) == (9, 9)
    assert (second.length, second.counted_prompt) == (6, 5)
    device.close()
