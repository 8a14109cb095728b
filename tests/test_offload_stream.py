"""Streams on honest and adversarial devices yield the right bytes at the right time, and survive faults."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fakes import (
    NAN_BYTE,
    REFUSING,
    EagerDevice,
    FailingDevice,
    LateDevice,
    LosingDevice,
    RefusingDevice,
    RefusingLateDevice,
    WatchedDevice,
)
from layered import FORMS, MakeLayers, check_pass, open_placed, open_stream, save_layers, with_residents
from offload.bench.steps import link
from offload.calibrate.link import measure_copies, measure_idle_link
from offload.config import EngineSettings
from offload.device import Device, Ticket
from offload.device.cpu import CpuDevice
from offload.device.host import HostMapping
from offload.doctor.gather import time_copies
from offload.errors import DeviceError, DeviceMemoryError, HostMemoryError
from offload.streaming.pass_log import layer_timings
from offload.weights.codec import LayerDecoder, Tensors
from offload.weights.placement import RING_BUFFERS, Placement
from offload.weights.ring import BounceRing
from offload.weights.source import CheckpointFeed, Destinations
from offload.weights.through_host import Upload, load_through_host
from serving import until

# Coded layers are decoded into scratch, some of them from a base beside; those of other sizes, and mixed ones, are for the
# slow tests.
QUICK_FORMS = ("based", "coded", "equal")


@pytest.fixture(params=[form if form in QUICK_FORMS else pytest.param(form, marks=pytest.mark.slow) for form in sorted(FORMS)])
def make_layers(request: pytest.FixtureRequest, tmp_path: Path) -> MakeLayers:
    """Every test of a stream runs over layers of all forms."""
    return lambda num_layers: save_layers(tmp_path, num_layers, request.param)


def test_layers_that_the_device_keeps_as_they_are_stored_are_decoded_in_every_pass(device: Device, tmp_path: Path) -> None:
    layers = save_layers(tmp_path, 4, "kept")
    for resident in range(5):
        with open_stream(device, layers, resident, 2) as (stream, store):
            assert store.placement.coded == store.placement.resident and not store.resident
            for _ in range(3):
                check_pass(stream)
            stream.evict(with_residents(stream.placement, frozenset(sorted(store.placement.resident)[1:])), 2)
            check_pass(stream)


@pytest.mark.matrix
@pytest.mark.parametrize("num_layers", [1, 2, 5])
def test_every_residency_and_slot_count_yields_every_layer_unharmed(
    device: Device, make_layers: MakeLayers, num_layers: int
) -> None:
    layers = make_layers(num_layers)
    for resident in range(num_layers + 1):
        for slots in (1, 2, 3, 4):
            with open_stream(device, layers, resident, slots) as (stream, _):
                for _ in range(4):
                    check_pass(stream)


@pytest.mark.matrix
@pytest.mark.parametrize("disk", [1, 2, 4])
def test_layers_from_disk_are_the_same_as_from_memory(device: Device, make_layers: MakeLayers, disk: int) -> None:
    layers = make_layers(6)
    for resident in (0, 2):
        for slots in (1, 2, 3):
            with open_stream(device, layers, resident, slots, disk) as (stream, store):
                for _ in range(4):
                    check_pass(stream)
                assert store.host_bytes == layers.host_bytes(store.placement.host, ring=True)


@pytest.fixture(params=sorted(REFUSING))
def refusing(request: pytest.FixtureRequest) -> Iterator[RefusingDevice]:
    """A device that pins less than it is asked to: how much is up to the test."""
    device = REFUSING[request.param]()
    yield device
    device.close()


@pytest.mark.matrix
@pytest.mark.parametrize("disk", [0, 2])
@pytest.mark.parametrize("room", [0, 2, 3, 5, 8])
def test_layers_that_could_not_be_pinned_are_the_same_and_copied_from_what_could(
    refusing: RefusingDevice, make_layers: MakeLayers, room: int, disk: int
) -> None:
    """From no memory that is pinned to more than is needed; what is pinned goes to the ring first, and all of it is used."""
    layers, num_host = make_layers(7), 6 - disk
    refusing.room_bytes = room_bytes = room * layers.slot_bytes + 1
    for slots in (2, 3):
        with open_stream(refusing, layers, 1, slots, disk) as (stream, store):
            before = refusing.num_pageable_copies
            needs_ring, pageable = disk > 0 or bool(stream.placement.pageable), stream.placement.pageable
            assert not pageable or refusing.room_bytes < layers.slot_bytes
            if layers.form == "equal":
                assert len(pageable) == max(num_host - max(room - RING_BUFFERS * needs_ring, 0), 0)
            assert (stream.measure_move() is None) == (not pageable)
            for _ in range(4):
                check_pass(stream)
            under_way = stream.one_pass()
            list(islice(under_way, 3))
            under_way.close()
            check_pass(stream)
            assert refusing.num_pageable_copies == before or room == 0
            if needs_ring:
                assert store.host_bytes == layers.host_bytes(store.placement.host, ring=True)
            else:  # two of the homes have room for any layer
                assert 0 <= store.host_bytes - layers.stored_bytes(store.placement.host) < RING_BUFFERS * layers.slot_bytes
            assert store.pinned_bytes == room_bytes - refusing.room_bytes
        assert refusing.pinned == []


def test_pageable_layers_lie_far_from_each_other(make_layers: MakeLayers) -> None:
    """So that the ring is filled while the link copies layers that need none."""
    device = RefusingDevice()
    layers = make_layers(12)
    device.room_bytes = layers.host_bytes(range(6), ring=True)
    with open_stream(device, layers, 0, 2) as (stream, _):
        pageable = sorted(stream.placement.pageable)
        assert len(pageable) > 3 and sum(after - before == 1 for before, after in pairwise(pageable)) <= RING_BUFFERS


@pytest.mark.matrix
@pytest.mark.parametrize("room", [0, 2, 4])
def test_a_ring_that_the_host_has_no_room_for_takes_that_of_layers_which_stay_on_disk(
    refusing: RefusingDevice, make_layers: MakeLayers, room: int
) -> None:
    layers = make_layers(6)
    refusing.room_bytes = min(room * layers.slot_bytes, layers.stored_bytes(range(5)) - 1)
    all_bytes = layers.host_bytes(range(5), ring=True)  # the last layer is resident
    for most_bytes, on_disk in ((all_bytes - 1, RING_BUFFERS), (all_bytes, 0)):
        with open_stream(refusing, layers, 1, 2, most_host_bytes=most_bytes) as (stream, store):
            assert len(stream.placement.disk) == on_disk
            assert store.host_bytes == layers.host_bytes(store.placement.host, ring=True) <= most_bytes
            for _ in range(3):
                check_pass(stream)


@pytest.mark.matrix
@pytest.mark.parametrize("resident", [3, 6])
@pytest.mark.parametrize("room", [0, 2, 3, 4])
def test_a_layer_that_leaves_the_device_for_memory_that_is_not_pinned_goes_through_a_ring(
    refusing: RefusingDevice, make_layers: MakeLayers, room: int, resident: int
) -> None:
    """One by one until nothing is resident: the first of them that is not pinned makes layers move, with what they hold."""
    refusing.room_bytes = 2**40
    layers = make_layers(6)
    with open_stream(refusing, layers, resident, 2) as (stream, store):
        check_pass(stream)
        refusing.room_bytes = max(room * layers.slot_bytes - store.pinned_bytes, 0)
        before = refusing.num_pageable_copies
        num_leaving = 3 if resident == 6 else 1
        while store.placement.resident:
            leaving = frozenset(sorted(store.placement.resident)[-num_leaving:])
            so_far = refusing.num_pageable_copies
            stream.evict(with_residents(stream.placement, store.placement.resident - leaving), 2)
            if any(map(store.base, leaving)):  # which come once, through whatever memory there is
                before += refusing.num_pageable_copies - so_far
            num_leaving = 1
            assert stream.measure_move() is not None or not stream.placement.pageable
            for _ in range(3):
                check_pass(stream)
        assert stream.placement.pageable or room * layers.slot_bytes >= layers.stored_bytes(range(6))
        assert refusing.num_pageable_copies == before or room < RING_BUFFERS
        assert store.host_bytes == layers.host_bytes(range(6), ring=True) or not stream.placement.pageable
    assert refusing.pinned == []


@pytest.mark.parametrize("room", [0, 2, 3])
def test_layers_that_borrow_memory_go_through_the_ring_together(tmp_path: Path, room: int) -> None:
    """Also when the memory that they lie in becomes the ring's: 0, 2 and 4 are one, and the first that is pinned."""
    device = RefusingLateDevice()
    layers = save_layers(tmp_path, 5)
    device.room_bytes = room * layers.slot_bytes
    placement = Placement(num_layers=5, resident=frozenset(), borrowed={2: 0, 4: 0})
    with open_placed(device, layers, placement, 2) as (stream, store):
        for _ in range(3):
            assert [weights["a"][0].item() for weights in stream.one_pass()] == [0, 1, 0, 3, 0]
        assert {0, 2, 4} <= stream.placement.pageable or not {0, 2, 4} & stream.placement.pageable
        assert store.host_bytes == layers.host_bytes((0, 1, 3), ring=room < 3)
    device.close()


def without_memory_for_rings(device: RefusingDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    pin = device.pin

    def refuse_two(num_bytes: int, cuts: Sequence[int]) -> HostMapping:
        if len(cuts) == RING_BUFFERS:
            raise HostMemoryError("refused", where="host memory", cure="free memory")
        return pin(num_bytes, cuts)

    monkeypatch.setattr(device, "pin", refuse_two)


def test_a_store_that_finds_no_memory_for_its_ring_leaves_none_pinned(
    make_layers: MakeLayers, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = RefusingDevice()
    layers = make_layers(5)
    device.room_bytes = room_bytes = 2 * layers.slot_bytes
    without_memory_for_rings(device, monkeypatch)
    with pytest.raises(HostMemoryError), open_stream(device, layers, 0, 2):
        pass
    assert device.pinned == [] and device.room_bytes == room_bytes


def test_a_layer_that_cannot_leave_the_device_for_want_of_a_ring_stays_and_may_leave_later(
    make_layers: MakeLayers, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = RefusingDevice()
    layers = make_layers(5)
    device.room_bytes = 3 * layers.slot_bytes
    with open_stream(device, layers, 2, 2) as (stream, store):
        device.room_bytes, before_bytes = 0, store.host_bytes
        first, last = (with_residents(store.placement, {layer}) for layer in sorted(store.placement.resident))
        with monkeypatch.context() as patch:
            without_memory_for_rings(device, patch)
            for placement in (first, last):
                before = stream.placement
                with pytest.raises(HostMemoryError):
                    stream.evict(placement, 2)
                assert stream.placement == before and store.host_bytes == before_bytes
                check_pass(stream)
        stream.evict(last, 2)
        check_pass(stream)
        assert store.host_bytes == layers.host_bytes(store.placement.host, ring=True)
    assert device.pinned == []


def test_a_layer_whose_way_to_the_host_is_interrupted_stays_and_may_leave_later(
    make_layers: MakeLayers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_arguments: object) -> torch.Tensor:
        raise KeyboardInterrupt

    device = RefusingDevice()
    layers = make_layers(5)
    with open_stream(device, layers, 2, 2) as (stream, store):
        before_bytes, leaving = store.host_bytes, min(store.placement.resident)
        placement = with_residents(store.placement, store.placement.resident - {leaving})
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(device, "download", interrupted)
            patch.setattr(CheckpointFeed, "fill", interrupted)  # what was decoded is read once more
            stream.evict(placement, 2)
        assert store.host_bytes == before_bytes
        check_pass(stream)
        stream.evict(placement, 2)
        assert store.host_bytes == before_bytes + layers.stored_bytes([leaving])
        check_pass(stream)
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


def test_late_device_catches_weights_used_after_their_release(make_layers: MakeLayers) -> None:
    """Also out of the scratch memory, where the next layer is decoded."""
    with open_stream(LateDevice(), make_layers(4), 0, 2) as (stream, _):
        kept = [weights["a"] for weights in stream.one_pass()]
        assert all(view.isnan().all() for view in kept)


def test_eager_device_catches_a_fetch_into_a_slot_in_use(make_layers: MakeLayers) -> None:
    """The negative control of the adversarial devices: a stream that fetches one step early yields a wrong layer. A layer that
    was decoded needs its slot no more."""
    device, layers = EagerDevice(), make_layers(4)
    with open_stream(device, layers, 0, 2) as (stream, store):
        under_way = stream.one_pass()
        first = next(under_way)
        device.copy_async(stream._targets[0][2], store.source(2), device.mark())
        assert first["a"].tolist() == [2 if layers.codecs[0].decode is None else 0] * 7
        under_way.close()


def test_a_pass_given_up_half_way_does_not_disturb_the_next(device: Device, make_layers: MakeLayers) -> None:
    for disk in (0, 3):
        with open_stream(device, make_layers(5), 1, 2, disk) as (stream, _):
            for taken in range(5):
                under_way = stream.one_pass()
                list(islice(under_way, taken))
                under_way.close()
                check_pass(stream)


@pytest.mark.matrix
@pytest.mark.parametrize("disk", [0, 2])
def test_a_layer_that_leaves_the_device_is_streamed_from_then_on(device: Device, make_layers: MakeLayers, disk: int) -> None:
    """Between passes and after one given up half-way, one by one, until nothing is resident."""
    layers = make_layers(6)
    for slots in (1, 2, 3):
        with open_stream(device, layers, 3, slots, disk) as (stream, store):
            for _ in range(3):
                check_pass(stream)
                under_way = stream.one_pass()
                list(islice(under_way, 2))
                under_way.close()
                leaving = frozenset([max(store.placement.resident)])
                staying = store.placement.resident - leaving
                placement = Placement(
                    num_layers=6,
                    resident=staying,
                    coded=store.placement.coded & staying,
                    disk=store.placement.disk | leaving if disk else frozenset(),
                )
                stream.evict(placement, slots)
                assert stream.bytes_per_pass == layers.stored_bytes(placement.streamed)
                check_pass(stream)
                check_pass(stream)
            assert store.host_bytes == layers.host_bytes(store.placement.host, ring=disk > 0)


def test_layers_that_leave_a_device_with_no_slots_become_slots(device: Device, make_layers: MakeLayers) -> None:
    layers = make_layers(4)
    with open_stream(device, layers, 4, 2) as (stream, _):
        check_pass(stream)
        assert stream.num_slots == 0 == stream.bytes_per_pass
        stream.evict(with_residents(stream.placement, {0}), 2)
        for _ in range(3):
            check_pass(stream)
        assert stream.num_slots == 2 and stream.bytes_per_pass == layers.stored_bytes((1, 2, 3))


def test_an_exception_in_a_copy_reaches_the_caller_and_the_stream_goes_on(make_layers: MakeLayers) -> None:
    layers = make_layers(4)
    for fail_at in range(1, 9):
        device = FailingDevice(fail_at)
        with open_stream(device, layers, 0, 2) as (stream, _):
            with pytest.raises(RuntimeError, match="the link broke"):
                for _ in range(3):
                    check_pass(stream)
            check_pass(stream)
            check_pass(stream)


@pytest.mark.parametrize("disk", [0, 3])
def test_a_copy_whose_ticket_was_lost_has_landed_before_its_memory_is_used_again(make_layers: MakeLayers, disk: int) -> None:
    layers = make_layers(4)
    for lose_at in range(1, 9):
        device = LosingDevice(lose_at)
        with open_stream(device, layers, 0, 2, disk) as (stream, _):
            with pytest.raises(KeyboardInterrupt):
                for _ in range(3):
                    check_pass(stream)
            assert device.num_under_way == 0
            check_pass(stream)
            check_pass(stream)
        assert device.num_under_way == 0


def test_a_device_that_cannot_even_be_waited_for_leaves_nothing_of_the_old_pass(
    make_layers: MakeLayers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost() -> None:
        raise DeviceError("lost", where="device", cure="none")

    device = LateDevice()
    with open_stream(device, make_layers(6), 0, 2, disk=2) as (stream, _):
        check_pass(stream)
        under_way = stream.one_pass()
        list(islice(under_way, 3))
        with monkeypatch.context() as patch, pytest.raises(DeviceError):
            patch.setattr(device, "drain_copies", lost)
            under_way.close()
        check_pass(stream)
        check_pass(stream)


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
    buffers = [device.alloc(64) for _ in range(4)]
    uploads = [Upload(memory=(buffer,), lay_out=lambda host: [{"a": host}]) for buffer in buffers]
    feed: Any = BrokenFeed(fail_at)
    with pytest.raises(DeviceError, match="the disk broke"):
        load_through_host(device, uploads, staging, feed, None)
    assert device._sources == {} and device.pinned == []
    load_through_host(device, uploads, staging, feed, None)
    assert all(buffer.tolist() == [1] * 64 for buffer in buffers) and device.pinned == []
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
    size: Any = SimpleNamespace(settings=EngineSettings(model="x"), link_bytes=(64, 128))
    measuring: list[Callable[[], object]] = [
        lambda: measure_idle_link(device, 64, 2),
        lambda: measure_copies(device, [64], 2),
        lambda: time_copies(device, 64, lambda: None),
        lambda: link(size, 1.0),
    ]
    for measure in measuring:
        with pytest.raises(DeviceError, match="the link broke"):
            measure()
        assert device._sources == {} and device.pinned == []


def test_a_disk_that_fails_is_reported_and_may_recover(make_layers: MakeLayers) -> None:
    layers = make_layers(6)
    path = layers.folder / "model.safetensors"
    contents = path.read_bytes()
    with open_stream(CpuDevice(), layers, 0, 2, disk=6) as (stream, _):
        check_pass(stream)
        with path.open("r+b") as file:
            file.truncate(len(contents) // 2)
        with pytest.raises(DeviceError, match="shorter"):
            for _ in range(3):
                check_pass(stream)
        with path.open("r+b") as file:
            file.write(contents)
        recovered = False
        for _ in range(4):  # reads that failed earlier are reported, once each
            try:
                check_pass(stream)
                recovered = True
            except DeviceError:
                assert not recovered
        assert recovered


@pytest.mark.parametrize("slots", [2, 3, 4])
def test_a_layer_that_the_disk_has_not_brought_holds_back_no_layer_in_host_memory(
    device: Device, make_layers: MakeLayers, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once those behind it waited, though their slots were free and the link idle. What the ring has ready when a round begins
    is sent then, too."""
    fill, may_read, read = CheckpointFeed.fill, threading.Event(), threading.Semaphore(0)
    with open_stream(device, make_layers(6), 0, slots, disk=1) as (stream, store):

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
            check_pass(stream)
            check_pass(stream)
            under_way = stream.one_pass()
            next(under_way)
            under_way.close()


def test_copies_overlap_with_compute(make_layers: MakeLayers) -> None:
    """Layers of 20 ms on the link and 20 ms of compute: some copy is under way while some layer computes."""
    layers = make_layers(4)
    device = CpuDevice(link_bytes_per_s=layers.slot_bytes / 0.02)
    with open_stream(device, layers, 0, 2) as (stream, _):
        for _ in range(2):
            for _ in stream.one_pass():
                time.sleep(0.02)
        assert stream.log is not None
        timings = layer_timings(device, stream.log)
    copies = [timing.copy for timing in timings if timing.copy]
    computes = [timing.compute for timing in timings]
    assert any(a.start_s < b.end_s and b.start_s < a.end_s for a in copies for b in computes)


def test_an_emulated_link_is_as_slow_as_it_says_and_never_idles(make_layers: MakeLayers) -> None:
    layers = make_layers(4)
    device = CpuDevice(link_bytes_per_s=min(layers.stored_bytes([layer]) for layer in range(4)) / 0.005)
    with open_stream(device, layers, 0, 2) as (stream, _):
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


def test_measured_link_rate_is_that_of_the_emulated_link(make_layers: MakeLayers) -> None:
    layers = make_layers(3)
    rate = layers.slot_bytes / 0.005
    with open_stream(CpuDevice(rate), layers, 0, 2) as (stream, _):
        measured = stream.measure_link()
        assert measured is not None and measured <= rate * 1.0001
        check_pass(stream)


def test_progress_tells_the_layers_of_the_pass_under_way(device: Device, make_layers: MakeLayers) -> None:
    layers = make_layers(5)
    with open_stream(device, layers, 2, 2) as (stream, _):
        assert (stream.progress().layers_done, stream.progress().num_layers) == (0, 5)
        for _ in range(2):
            seen = []
            for _ in stream.one_pass():
                progress = stream.progress()
                seen.append((progress.layers_done, progress.streamed_bytes))
            streamed = stream.placement.streamed
            assert seen == [(done, layers.stored_bytes(layer for layer in streamed if layer < done)) for done in range(5)]
            assert stream.progress().layers_done == 5 and stream.progress().elapsed_s > 0


def test_a_copy_has_passed_when_it_has_landed(device: Device) -> None:
    source, target = torch.ones(8, dtype=torch.uint8), device.alloc(8)
    ticket = device.copy_async(target, source, device.mark())
    device.drain(ticket)
    assert device.passed(ticket) and device.passed(device.mark()) and target.tolist() == [1] * 8
    late = LateDevice()
    assert not late.passed(late.copy_async(target, source, late.mark()))
    late.close()


def test_a_decoded_layer_has_left_its_slot_before_it_is_used(tmp_path: Path) -> None:
    """The slot's next copy is under way, and what the layer computes with is none of the slot's memory."""
    layers, device = save_layers(tmp_path, 5, "coded"), LateDevice()
    with open_stream(device, layers, 0, 2) as (stream, _):
        under_way = stream.one_pass()
        for layer, weights in enumerate(under_way):
            slot = stream._targets[layer % 2][layer]
            assert sorted(stream._flying) == [0, 1], "the link has as much to do as it can hold"
            assert bool((slot == NAN_BYTE).all()), "the slot is free for anything"
            assert weights["a"].tolist() == [layer] * 7 and weights["b"].unique().tolist() == [layer + 0.5]
    device.close()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_layer_that_cannot_be_decoded_ends_its_pass_and_no_other(
    device: Device, tmp_path: Path, error: type[BaseException]
) -> None:
    """Wherever in two passes it is, with layers in memory and on disk."""
    layers, fail_at = save_layers(tmp_path, 4, "mixed"), [0]

    def failing(decode: LayerDecoder, stored: Tensors, parameters: Tensors) -> None:
        fail_at[0] -= 1
        if fail_at[0] == 0:
            raise error
        decode(stored, parameters)

    codecs = [replace(codec, decode=codec.decode and partial(failing, codec.decode)) for codec in layers.codecs]
    for disk in (0, 2):
        with open_stream(device, replace(layers, codecs=tuple(codecs)), 0, 2, disk) as (stream, _):
            for number in range(1, 7):
                fail_at[0] = number
                with pytest.raises(error):
                    for _ in range(2):
                        check_pass(stream)
                check_pass(stream)
                check_pass(stream)


def test_layers_are_decoded_in_one_memory_which_is_there_only_while_some_are_decoded_in_passes(make_layers: MakeLayers) -> None:
    """And all of the stream's memory goes with it."""
    layers, device = make_layers(4), WatchedDevice()
    most_bytes = max((codec.computed.num_bytes for codec in layers.codecs if codec.decode is not None), default=0)
    for resident, scratch_bytes in ((0, most_bytes), (2, most_bytes), (4, most_bytes if layers.form.endswith("kept") else 0)):
        with open_stream(device, layers, resident, 2) as (stream, _):
            assert stream.scratch_bytes == scratch_bytes
            check_pass(stream)
        assert stream.scratch_bytes == 0 and (device.held_bytes, device.num_under_way) == (0, 0)
    device.close()


def test_layers_that_cannot_leave_the_device_for_want_of_a_slot_stay_and_may_leave_later(tmp_path: Path) -> None:
    """Those that leave are smaller than the largest, which a slot must hold, so that slots are allocated."""
    layers, device = save_layers(tmp_path, 4, "uneven"), WatchedDevice()
    full = DeviceMemoryError("no room", where="device", cure="none")
    with open_stream(device, layers, 4, 2) as (stream, store):
        placement = Placement(num_layers=4, resident=frozenset({1}))
        device._interrupt_at, device._fault = len(device.calls) + 3, full  # the second slot
        with pytest.raises(DeviceMemoryError):
            stream.evict(placement, 2)
        assert stream.num_slots == 0 and store.host_bytes == 0 and not stream.placement.streamed
        check_pass(stream)
        stream.evict(placement, 2)
        assert stream.num_slots == 2
        check_pass(stream)
        check_pass(stream)
    device.close()
