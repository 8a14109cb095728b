"""Streams on honest and adversarial devices yield the right bytes at the right time, and survive faults."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fakes import REFUSING, EagerDevice, FailingDevice, LateDevice, LosingDevice, RefusingDevice, RefusingLateDevice
from offload.bench.steps import link
from offload.calibrate.link import measure_copies, measure_link
from offload.config import EngineSettings
from offload.device import Device, Ticket
from offload.device.cpu import CpuDevice
from offload.device.host import HostMapping
from offload.doctor.gather import time_copies
from offload.errors import DeviceError, HostMemoryError
from offload.streaming.stream import LayerStream, layer_timings
from offload.weights.checkpoint import open_checkpoint
from offload.weights.layout import LayerLayout
from offload.weights.placement import RING_BUFFERS, Placement, spread_evenly
from offload.weights.ring import BounceRing
from offload.weights.source import CheckpointFeed, CheckpointSource, Destinations
from offload.weights.store import WeightStore, load_through_host
from serving import until

LAYOUT = LayerLayout.pack([("a", (7,)), ("b", (3, 5))], torch.float32)
MakeCheckpoint = Callable[[int], Path]


@contextmanager
def open_stream(
    device: Device,
    folder: Path,
    num_layers: int,
    resident: int,
    slots: int,
    disk: int = 0,
    most_host_layers: int | None = None,
) -> Iterator[tuple[LayerStream, WeightStore]]:
    in_memory = spread_evenly(resident, num_layers)
    rest = [layer for layer in range(num_layers) if layer not in in_memory]
    placement = Placement(num_layers=num_layers, resident=in_memory, disk=frozenset(rest[:disk]))
    most_bytes = None if most_host_layers is None else most_host_layers * LAYOUT.num_bytes
    source = CheckpointSource(open_checkpoint(folder))
    with ExitStack() as stack:
        store = WeightStore(device, source, LAYOUT, "model.layers", placement, most_host_bytes=most_bytes)
        stack.callback(store.close)
        store.take_host_memory()
        store.load()
        stream = LayerStream(device, store, slots)
        stack.callback(stream.close)
        yield stream, store


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


@pytest.fixture(params=sorted(REFUSING))
def refusing(request: pytest.FixtureRequest) -> Iterator[RefusingDevice]:
    """A device that pins less than it is asked to: how much is up to the test."""
    device = REFUSING[request.param]()
    yield device
    device.close()


@pytest.mark.parametrize("disk", [0, 2])
@pytest.mark.parametrize("room", [0, 2, 3, 5, 8])
def test_layers_that_could_not_be_pinned_are_the_same_and_copied_from_what_could(
    refusing: RefusingDevice, layered_checkpoint: MakeCheckpoint, room: int, disk: int
) -> None:
    """From no memory that is pinned to more than is needed; what is pinned goes to the ring first, and all of it is used."""
    folder, num_host = layered_checkpoint(7), 6 - disk
    refusing.room_bytes = room * LAYOUT.num_bytes + 1
    needs_ring = disk > 0 or room < num_host
    for slots in (2, 3):
        with open_stream(refusing, folder, 7, 1, slots, disk) as (stream, store):
            before = refusing.num_pageable_copies
            assert len(stream.placement.pageable) == max(num_host - max(room - RING_BUFFERS * needs_ring, 0), 0)
            assert (stream.measure_move() is None) == (not stream.placement.pageable)
            for _ in range(4):
                check_pass(stream, 7)
            layers = stream.one_pass()
            list(islice(layers, 3))
            layers.close()
            check_pass(stream, 7)
            assert refusing.num_pageable_copies == before or room == 0
            assert store.host_bytes == (num_host + RING_BUFFERS * needs_ring) * LAYOUT.num_bytes
            assert store.pinned_bytes == min(room * LAYOUT.num_bytes, store.host_bytes)
        assert refusing.pinned == []


def test_pageable_layers_lie_far_from_each_other(layered_checkpoint: MakeCheckpoint) -> None:
    """So that the ring is filled while the link copies layers that need none."""
    device = RefusingDevice()
    device.room_bytes = 8 * LAYOUT.num_bytes
    with open_stream(device, layered_checkpoint(12), 12, 0, 2) as (stream, _):
        pageable = sorted(stream.placement.pageable)
        assert len(pageable) == 6 and sum(after - before == 1 for before, after in pairwise(pageable)) <= RING_BUFFERS


@pytest.mark.parametrize("room", [0, 2, 4])
def test_a_ring_that_the_host_has_no_room_for_takes_that_of_layers_which_stay_on_disk(
    refusing: RefusingDevice, layered_checkpoint: MakeCheckpoint, room: int
) -> None:
    refusing.room_bytes = room * LAYOUT.num_bytes
    folder = layered_checkpoint(6)
    for most, on_disk in ((5, RING_BUFFERS), (5 + RING_BUFFERS, 0)):
        with open_stream(refusing, folder, 6, 1, 2, most_host_layers=most) as (stream, store):
            assert len(stream.placement.disk) == on_disk and store.host_bytes == most * LAYOUT.num_bytes
            for _ in range(3):
                check_pass(stream, 6)


@pytest.mark.parametrize("resident", [3, 6])
@pytest.mark.parametrize("room", [0, 2, 3, 4])
def test_a_layer_that_leaves_the_device_for_memory_that_is_not_pinned_goes_through_a_ring(
    refusing: RefusingDevice, layered_checkpoint: MakeCheckpoint, room: int, resident: int
) -> None:
    """One by one until nothing is resident: the first of them that is not pinned makes layers move, with what they hold."""
    refusing.room_bytes = 2**40
    folder = layered_checkpoint(6)
    with open_stream(refusing, folder, 6, resident, 2) as (stream, store):
        check_pass(stream, 6)
        refusing.room_bytes = max(room - store.pinned_bytes // LAYOUT.num_bytes, 0) * LAYOUT.num_bytes
        before = refusing.num_pageable_copies
        num_leaving = 3 if resident == 6 else 1
        while store.placement.resident:
            leaving = frozenset(sorted(store.placement.resident)[-num_leaving:])
            stream.give_up(replace(stream.placement, resident=store.placement.resident - leaving), 2)
            num_leaving = 1
            assert stream.measure_move() is not None or not stream.placement.pageable
            for _ in range(3):
                check_pass(stream, 6)
        assert stream.placement.pageable
        assert refusing.num_pageable_copies == before or room < RING_BUFFERS
        assert store.host_bytes == (6 + RING_BUFFERS) * LAYOUT.num_bytes
    assert refusing.pinned == []


@pytest.mark.parametrize("room", [0, 2, 3])
def test_layers_that_share_memory_go_through_the_ring_together(layered_checkpoint: MakeCheckpoint, room: int) -> None:
    """Also when the memory that they share becomes the ring's: 0, 2 and 4 are one, and the first that is pinned."""
    device = RefusingLateDevice()
    device.room_bytes = room * LAYOUT.num_bytes
    source, shared = CheckpointSource(open_checkpoint(layered_checkpoint(5))), {2: 0, 4: 0}
    placement = Placement(num_layers=5, resident=frozenset())
    store = WeightStore(device, source, LAYOUT, "model.layers", placement, shared)
    store.take_host_memory()
    store.load()
    stream = LayerStream(device, store, 2)
    for _ in range(3):
        assert [weights["a"][0].item() for weights in stream.one_pass()] == [0, 1, 0, 3, 0]
    assert {0, 2, 4} <= stream.placement.pageable or not {0, 2, 4} & stream.placement.pageable
    assert store.host_bytes == (3 + (RING_BUFFERS if room < 3 else 0)) * LAYOUT.num_bytes
    stream.close()
    store.close()
    device.close()


def without_memory_for_rings(device: RefusingDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    pin = device.pin

    def refuse_two(num_bytes: int, cuts: Sequence[int]) -> HostMapping:
        if num_bytes == RING_BUFFERS * LAYOUT.num_bytes:
            raise HostMemoryError("refused", where="host memory", cure="free memory")
        return pin(num_bytes, cuts)

    monkeypatch.setattr(device, "pin", refuse_two)


def test_a_store_that_finds_no_memory_for_its_ring_leaves_none_pinned(
    layered_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = RefusingDevice()
    device.room_bytes = 2 * LAYOUT.num_bytes
    without_memory_for_rings(device, monkeypatch)
    with pytest.raises(HostMemoryError), open_stream(device, layered_checkpoint(5), 5, 0, 2):
        pass
    assert device.pinned == [] and device.room_bytes == 2 * LAYOUT.num_bytes


def test_a_layer_that_cannot_leave_the_device_for_want_of_a_ring_stays_and_may_leave_later(
    layered_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = RefusingDevice()
    device.room_bytes = 3 * LAYOUT.num_bytes
    with open_stream(device, layered_checkpoint(5), 5, 2, 2) as (stream, store):
        first, last = (replace(store.placement, resident=frozenset({layer})) for layer in sorted(store.placement.resident))
        with monkeypatch.context() as patch:
            without_memory_for_rings(device, patch)
            for placement in (first, last):
                before = stream.placement
                with pytest.raises(HostMemoryError):
                    stream.give_up(placement, 2)
                assert stream.placement == before and store.host_bytes == 3 * LAYOUT.num_bytes
                check_pass(stream, 5)
        stream.give_up(last, 2)
        check_pass(stream, 5)
        assert store.host_bytes == (4 + RING_BUFFERS) * LAYOUT.num_bytes
    assert device.pinned == []


def test_a_layer_whose_way_to_the_host_is_interrupted_stays_and_may_leave_later(
    layered_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(tensor: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    device = RefusingDevice()
    device.room_bytes = 5 * LAYOUT.num_bytes
    with open_stream(device, layered_checkpoint(5), 5, 2, 2) as (stream, store):
        placement = replace(store.placement, resident=frozenset({min(store.placement.resident)}))
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(device, "download", interrupted)
            stream.give_up(placement, 2)
        assert store.host_bytes == 3 * LAYOUT.num_bytes
        check_pass(stream, 5)
        stream.give_up(placement, 2)
        assert store.host_bytes == 4 * LAYOUT.num_bytes
        check_pass(stream, 5)
    assert device.pinned == []


def test_a_buffer_is_filled_again_only_when_its_copy_has_landed() -> None:
    """On a device where copies land as late as they may: the ring has to ask for it."""
    device = LateDevice()
    buffer, slot = torch.zeros(8, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8)
    ring = BounceRing(device, [buffer], (1, 2, 3), lambda layer, memory: memory.fill_(layer))
    for layer in (1, 2, 3, 1):
        ticket = device.copy_async(slot, ring.source(layer), device.mark())
        ring.sent(layer, ticket)
        while not ring.ready():  # with the next layer, in the same buffer
            time.sleep(0)
        assert device.wait(ticket).tolist() == [layer] * 8
    ring.close()
    device.close()


def test_a_ring_reports_what_a_fill_raises_and_goes_on() -> None:
    device = CpuDevice()

    def fill(layer: int, memory: torch.Tensor) -> None:
        if layer == 1:
            raise DeviceError("no layer", where="ring", cure="none")
        memory.fill_(layer)

    ring = BounceRing(device, [torch.zeros(8, dtype=torch.uint8) for _ in range(2)], (0, 1, 2), fill)
    assert ring.source(0).tolist() == [0] * 8
    with pytest.raises(DeviceError, match="no layer"):
        ring.source(1)
    assert ring.source(2).tolist() == [2] * 8
    ring.close()
    device.close()


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


@pytest.mark.parametrize("disk", [0, 3])
def test_a_copy_whose_ticket_was_lost_has_landed_before_its_memory_is_used_again(
    layered_checkpoint: MakeCheckpoint, disk: int
) -> None:
    folder = layered_checkpoint(4)
    for lose_at in range(1, 9):
        device = LosingDevice(lose_at)
        with open_stream(device, folder, 4, 0, 2, disk) as (stream, _):
            with pytest.raises(KeyboardInterrupt):
                for _ in range(3):
                    check_pass(stream, 4)
            assert device.num_under_way == 0
            check_pass(stream, 4)
            check_pass(stream, 4)
        assert device.num_under_way == 0


def test_a_device_that_cannot_even_be_waited_for_leaves_nothing_of_the_old_pass(
    layered_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost() -> None:
        raise DeviceError("lost", where="device", cure="none")

    device = LateDevice()
    with open_stream(device, layered_checkpoint(6), 6, 0, 2, disk=2) as (stream, _):
        check_pass(stream, 6)
        layers = stream.one_pass()
        list(islice(layers, 3))
        with monkeypatch.context() as patch, pytest.raises(DeviceError):
            patch.setattr(device, "drain_copies", lost)
            layers.close()
        check_pass(stream, 6)
        check_pass(stream, 6)


class BrokenFeed:
    """Fills what it is asked for, the `fail_at`-th time only in part."""

    def __init__(self, fail_at: int) -> None:
        self._left = fail_at

    def fill(self, destinations: Destinations, progress: object = None) -> None:
        self._left -= 1
        if self._left == 0:
            raise DeviceError("the disk broke", where="disk", cure="none")
        for view in destinations.values():
            view.fill_(1)


@pytest.mark.parametrize("num_staging", [0, 1, 2])
@pytest.mark.parametrize("fail_at", [1, 2, 4])
def test_a_disk_that_fails_while_weights_are_read_leaves_no_copy_under_way_and_nothing_pinned(
    num_staging: int, fail_at: int
) -> None:
    device = RefusingLateDevice()
    staging = [torch.empty(64, dtype=torch.uint8) for _ in range(num_staging)]
    buffers = [(device.alloc(64), lambda host: {"a": host}) for _ in range(4)]
    feed: Any = BrokenFeed(fail_at)
    with pytest.raises(DeviceError, match="the disk broke"):
        load_through_host(device, buffers, staging, feed, None)
    assert device._sources == {} and device.pinned == []
    load_through_host(device, buffers, staging, feed, None)
    assert all(buffer.tolist() == [1] * 64 for buffer, _ in buffers) and device.pinned == []
    device.close()


def test_an_error_while_the_link_is_measured_leaves_no_copy_under_way_and_nothing_pinned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(ticket: Ticket) -> None:
        raise DeviceError("the link broke", where="device", cure="none")

    device = RefusingLateDevice()
    monkeypatch.setattr(device, "drain", broken)
    monkeypatch.setattr(device, "drain_copies", lambda: [LateDevice.drain(device, ticket) for ticket in list(device._sources)])
    monkeypatch.setattr("offload.bench.steps.open_device", lambda *_: device)
    extent: Any = SimpleNamespace(settings=EngineSettings(model="x"), link_bytes=(64, 128))
    measuring: list[Callable[[], object]] = [
        lambda: measure_link(device, 64, 2),
        lambda: measure_copies(device, [64], 2),
        lambda: time_copies(device, 64, lambda: None),
        lambda: link(extent, 1.0),
    ]
    for measure in measuring:
        with pytest.raises(DeviceError, match="the link broke"):
            measure()
        assert device._sources == {} and device.pinned == []


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


@pytest.mark.parametrize("slots", [2, 3, 4])
def test_a_layer_that_the_disk_has_not_brought_holds_back_no_layer_in_host_memory(
    device: Device, layered_checkpoint: MakeCheckpoint, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once those behind it waited, though their slots were free and the link idle. What the ring has ready when a round begins
    is sent then, too."""
    fill, may_read, read = CheckpointFeed.fill, threading.Event(), threading.Semaphore(0)
    with open_stream(device, layered_checkpoint(6), 6, 0, slots, disk=1) as (stream, store):

        def slow(feed: CheckpointFeed, destinations: Destinations, progress: Any = None) -> None:
            may_read.wait()
            fill(feed, destinations, progress)
            read.release()

        monkeypatch.setattr(CheckpointFeed, "fill", slow)
        for _ in range(2):
            may_read.clear()
            stream.prefetch()
            assert sorted(stream._flying) == list(range(1, slots))
            may_read.set()
            read.acquire()
            until(lambda: store.ready(0))
            stream.prefetch()
            assert sorted(stream._flying) == list(range(slots))
            check_pass(stream, 6)
            check_pass(stream, 6)
            layers = stream.one_pass()
            next(layers)
            layers.close()


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
