"""Streams on honest and adversarial devices yield the right bytes at the right time, and survive faults."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pytest
import torch

from fakes import EagerDevice, FailingDevice, LateDevice
from offload.device import Device
from offload.device.cpu import CpuDevice
from offload.errors import DeviceError
from offload.streaming.schedule import spread_evenly
from offload.streaming.stream import LayerStream, layer_timings
from offload.weights.checkpoint import open_checkpoint
from offload.weights.layout import LayerLayout
from offload.weights.placement import RING_BUFFERS, Placement
from offload.weights.source import CheckpointSource
from offload.weights.store import WeightStore

LAYOUT = LayerLayout.pack([("a", (7,)), ("b", (3, 5))], torch.float32)
MakeCheckpoint = Callable[[int], Path]


@contextmanager
def open_stream(
    device: Device, folder: Path, num_layers: int, resident: int, slots: int, disk: int = 0
) -> Iterator[tuple[LayerStream, WeightStore]]:
    in_memory = spread_evenly(resident, num_layers)
    rest = [layer for layer in range(num_layers) if layer not in in_memory]
    placement = Placement(num_layers=num_layers, resident=in_memory, disk=frozenset(rest[:disk]))
    store = WeightStore(device, CheckpointSource(open_checkpoint(folder)), LAYOUT, "model.layers", placement)
    store.load()
    stream = LayerStream(device, store, slots)
    yield stream, store
    stream.close()
    store.close()


def check_pass(stream: LayerStream, num_layers: int) -> None:
    seen = 0
    for layer, weights in enumerate(stream.one_pass()):
        assert weights["a"].tolist() == [layer] * 7
        assert weights["b"].unique().tolist() == [layer + 0.5]
        seen += 1
    assert seen == num_layers


@pytest.mark.parametrize("num_layers", [1, 2, 5])
def test_every_residency_and_slot_count_yields_every_layer_unharmed(
    device: Device, layered_checkpoint: MakeCheckpoint, num_layers: int
) -> None:
    folder = layered_checkpoint(num_layers)
    for resident in range(num_layers + 1):
        for slots in (1, 2, 3, 4):
            with open_stream(device, folder, num_layers, resident, slots) as (stream, _):
                for _ in range(4):
                    check_pass(stream, num_layers)


@pytest.mark.parametrize("disk", [1, 2, 4])
def test_layers_from_disk_are_the_same_as_from_memory(device: Device, layered_checkpoint: MakeCheckpoint, disk: int) -> None:
    folder = layered_checkpoint(6)
    for resident in (0, 2):
        for slots in (1, 2, 3):
            with open_stream(device, folder, 6, resident, slots, disk) as (stream, store):
                for _ in range(4):
                    check_pass(stream, 6)
                assert store.host_bytes == (6 - resident - disk + RING_BUFFERS) * LAYOUT.num_bytes


def test_late_device_catches_weights_used_after_their_release(layered_checkpoint: MakeCheckpoint) -> None:
    with open_stream(LateDevice(), layered_checkpoint(4), 4, 0, 2) as (stream, _):
        kept = [weights["a"] for weights in stream.one_pass()]
        assert all(view.isnan().all() for view in kept)


def test_eager_device_catches_a_fetch_into_a_slot_in_use(layered_checkpoint: MakeCheckpoint) -> None:
    """The negative control of the adversarial devices: a stream that fetches one step early yields a wrong layer."""
    device = EagerDevice()
    with open_stream(device, layered_checkpoint(4), 4, 0, 2) as (stream, store):
        layers = stream.one_pass()
        first = next(layers)
        device.copy_async(stream._slots[0], store.source(2), device.mark())
        assert first["a"].tolist() == [2] * 7
        layers.close()


def test_a_pass_given_up_half_way_does_not_disturb_the_next(device: Device, layered_checkpoint: MakeCheckpoint) -> None:
    for disk in (0, 3):
        with open_stream(device, layered_checkpoint(5), 5, 1, 2, disk) as (stream, _):
            for taken in range(5):
                layers = stream.one_pass()
                list(islice(layers, taken))
                layers.close()
                check_pass(stream, 5)


@pytest.mark.parametrize("disk", [0, 2])
def test_a_layer_that_leaves_the_device_is_streamed_from_then_on(
    device: Device, layered_checkpoint: MakeCheckpoint, disk: int
) -> None:
    """Between passes and after one given up half-way, one by one, until nothing is resident."""
    folder = layered_checkpoint(6)
    for slots in (1, 2, 3):
        with open_stream(device, folder, 6, 3, slots, disk) as (stream, store):
            for _ in range(3):
                check_pass(stream, 6)
                layers = stream.one_pass()
                list(islice(layers, 2))
                layers.close()
                leaving = frozenset([max(store.placement.resident)])
                placement = Placement(
                    num_layers=6,
                    resident=store.placement.resident - leaving,
                    disk=store.placement.disk | leaving if disk else frozenset(),
                )
                stream.give_up(placement, slots)
                assert stream.bytes_per_pass == len(placement.streamed) * LAYOUT.num_bytes
                check_pass(stream, 6)
                check_pass(stream, 6)
            assert store.host_bytes == (len(store.placement.host) + (RING_BUFFERS if disk else 0)) * LAYOUT.num_bytes


def test_layers_that_leave_a_device_with_no_slots_become_slots(device: Device, layered_checkpoint: MakeCheckpoint) -> None:
    with open_stream(device, layered_checkpoint(4), 4, 4, 2) as (stream, _):
        check_pass(stream, 4)
        assert stream.num_slots == 0 == stream.bytes_per_pass
        stream.give_up(Placement(num_layers=4, resident=frozenset({0})), 2)
        for _ in range(3):
            check_pass(stream, 4)
        assert stream.num_slots == 2 and stream.bytes_per_pass == 3 * LAYOUT.num_bytes


def test_an_exception_in_a_copy_reaches_the_caller_and_the_stream_goes_on(layered_checkpoint: MakeCheckpoint) -> None:
    folder = layered_checkpoint(4)
    for fail_at in range(1, 9):
        device = FailingDevice(fail_at)
        with open_stream(device, folder, 4, 0, 2) as (stream, _):
            with pytest.raises(RuntimeError, match="the link broke"):
                for _ in range(3):
                    check_pass(stream, 4)
            check_pass(stream, 4)
            check_pass(stream, 4)


def test_a_disk_that_fails_is_reported_and_may_recover(layered_checkpoint: MakeCheckpoint) -> None:
    folder = layered_checkpoint(6)
    path = folder / "model.safetensors"
    contents = path.read_bytes()
    with open_stream(CpuDevice(), folder, 6, 0, 2, disk=6) as (stream, _):
        check_pass(stream, 6)
        with path.open("r+b") as file:
            file.truncate(len(contents) // 2)
        with pytest.raises(DeviceError, match="shorter"):
            for _ in range(3):
                check_pass(stream, 6)
        with path.open("r+b") as file:
            file.write(contents)
        recovered = False
        for _ in range(4):  # reads that failed earlier are reported, once each
            try:
                check_pass(stream, 6)
                recovered = True
            except DeviceError:
                assert not recovered
        assert recovered


def test_copies_overlap_with_compute(layered_checkpoint: MakeCheckpoint) -> None:
    """Layers of 20 ms on the link and 20 ms of compute: some copy is under way while some layer computes."""
    device = CpuDevice(link_bytes_per_s=LAYOUT.num_bytes / 0.02)
    with open_stream(device, layered_checkpoint(4), 4, 0, 2) as (stream, _):
        for _ in range(2):
            for _ in stream.one_pass():
                time.sleep(0.02)
        assert stream.log is not None
        timings = layer_timings(device, stream.log)
    copies = [timing.copy for timing in timings if timing.copy]
    computes = [timing.compute for timing in timings]
    assert any(a.start_s < b.end_s and b.start_s < a.end_s for a in copies for b in computes)


def test_an_emulated_link_is_as_slow_as_it_says_and_never_idles(layered_checkpoint: MakeCheckpoint) -> None:
    device = CpuDevice(link_bytes_per_s=LAYOUT.num_bytes / 0.005)
    with open_stream(device, layered_checkpoint(4), 4, 0, 2) as (stream, _):
        copies = []
        for _ in range(5):
            for _ in stream.one_pass():
                pass
            assert stream.log is not None
            copies += [use.copy for use in stream.log.uses]
        intervals = [device.interval(copy) for copy in copies if copy]
    assert all(interval.end_s - interval.start_s >= 0.005 - 1e-9 for interval in intervals)
    starts = [interval.start_s for interval in intervals]
    assert starts == sorted(starts)


def test_measured_link_rate_is_that_of_the_emulated_link(layered_checkpoint: MakeCheckpoint) -> None:
    rate = LAYOUT.num_bytes / 0.005
    with open_stream(CpuDevice(rate), layered_checkpoint(3), 3, 0, 2) as (stream, _):
        measured = stream.measure_link()
        assert measured is not None and measured <= rate * 1.0001
        check_pass(stream, 3)


def test_progress_tells_the_layers_of_the_pass_under_way(device: Device, layered_checkpoint: MakeCheckpoint) -> None:
    with open_stream(device, layered_checkpoint(5), 5, 2, 2) as (stream, _):
        assert (stream.progress().layers_done, stream.progress().num_layers) == (0, 5)
        for _ in range(2):
            seen = []
            for _ in stream.one_pass():
                progress = stream.progress()
                seen.append((progress.layers_done, progress.streamed_bytes // stream.layer_bytes))
            streamed = [layer not in spread_evenly(2, 5) for layer in range(5)]
            assert seen == [(layer, sum(streamed[:layer])) for layer in range(5)]
            assert stream.progress().layers_done == 5 and stream.progress().elapsed_s > 0


def test_a_copy_has_passed_when_it_has_landed(device: Device) -> None:
    source, target = torch.ones(8, dtype=torch.uint8), device.alloc(8)
    ticket = device.copy_async(target, source, device.mark())
    device.drain(ticket)
    assert device.passed(ticket) and device.passed(device.mark()) and target.tolist() == [1] * 8
    late = LateDevice()
    assert not late.passed(late.copy_async(target, source, late.mark()))
    late.close()
