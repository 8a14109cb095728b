"""Loading takes memory before time, and gives all of it back when it is broken off, wherever that is."""

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from fakes import EagerDevice, WatchedDevice, XorSource, layer_fault, xor_codec
from offload.assemble import open_engine
from offload.config import EngineSettings
from offload.device.cpu import CpuDevice
from offload.errors import DeviceMemoryError, FitError
from offload.source import ModelSource, check_source
from offload.typed_model import TypedModel
from offload.weights.codec import LayerCodec, identities
from offload.weights.source import CheckpointFeed, Destinations
from planning import L40

Models = Callable[..., Path]
NUM_POINTS = 10


def pair(models: Models, **changes: object) -> EngineSettings:
    """A target of six layers, of which one is resident, and a draft."""
    settings: dict[str, Any] = {
        "model": str(models(num_layers=6)),
        "draft_models": (str(models(num_layers=1, seed=1)),),
        "tree": "3x4:kary",
        "device": "cpu",
        "resident_layers": 1,
        "slots": 2,
        **changes,
    }
    return EngineSettings(**settings)


def layer_bytes_of(settings: EngineSettings) -> int:
    with open_engine(settings, hardware=L40) as engine:
        return engine.loop._stream.slot_bytes


@contextmanager
def fills_noted(device: WatchedDevice) -> Iterator[None]:
    """Reading is called for, too, and in the middle of it nothing is whole."""
    fill = CheckpointFeed.fill

    def noted(feed: CheckpointFeed, destinations: Destinations, progress: Callable[[int], None] | None = None) -> None:
        device.called("fill")
        fill(feed, destinations, progress)
        device.called("filled")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointFeed, "fill", noted)
        yield


def load(settings: EngineSettings, device: WatchedDevice) -> None:
    with fills_noted(device), open_engine(settings, device=device, hardware=L40):
        pass


def test_the_devices_memory_is_taken_first_then_the_hosts_and_only_then_is_anything_read(models: Models) -> None:
    device = WatchedDevice()
    load(pair(models), device)
    order = [call for call in device.calls if call in ("allocated", "pin", "fill")]
    first_fill = order.index("fill")
    assert order[:first_fill] == [*["allocated"] * order.count("allocated"), *["pin"] * order[:first_fill].count("pin")]
    assert order.count("allocated") > 8 and order[:first_fill].count("pin") >= 1


def test_a_device_that_is_too_small_is_refused_before_anything_is_read_or_pinned(models: Models) -> None:
    """Whichever of its buffers it is that finds no room."""
    settings, device = pair(models), WatchedDevice()
    load(settings, device)
    full = DeviceMemoryError("no room", where="device", cure="none")
    for number, call in enumerate(device.calls, start=1):
        if call == "alloc":
            small = WatchedDevice(number, full)
            with pytest.raises(FitError, match="no room"):
                load(settings, small)
            assert set(small.calls) <= {"alloc", "allocated"}


@pytest.mark.parametrize("host_layers", [None, 4])
def test_an_interruption_at_ten_points_of_loading_leaves_nothing(models: Models, host_layers: int | None) -> None:
    """With all layers in host memory, and with a ring in front of a disk."""
    settings = pair(models)
    if host_layers is not None:
        settings = pair(models, host_memory_bytes=host_layers * layer_bytes_of(settings))
    whole = WatchedDevice()
    load(settings, whole)
    threads, num_calls = set(threading.enumerate()), len(whole.calls)
    points = sorted({round(1 + (num_calls - 1) * part / (NUM_POINTS - 1)) for part in range(NUM_POINTS)})
    assert len(points) == NUM_POINTS and {"alloc", "pin", "fill", "copy"} <= set(whole.calls)
    gc.collect()
    gc.disable()
    try:
        for point in points:
            device = WatchedDevice(point)
            try:
                load(settings, device)
            except KeyboardInterrupt:
                pass
            else:
                raise AssertionError("it was not interrupted")
            assert (device.held_bytes, device.num_under_way) == (0, 0), device.calls[-1]
            assert set(threading.enumerate()) <= threads
    finally:
        gc.enable()


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedModel(TypedModel):
    """All of its layers are stored in code."""

    @property
    def codecs(self) -> tuple[LayerCodec, ...]:
        raw = identities(self.architecture.layer_shapes, self.dtype)
        return tuple(xor_codec(codec.computed, layer) for layer, codec in enumerate(raw))


def check_coded(name: str, flag: str, dtype: str, device_type: str, **_flags: object) -> ModelSource:
    source = check_source(name, flag, dtype, device_type)
    model = CodedModel(architecture=source.architecture, dtype=source.model.dtype)
    return replace(source, model=model, tensors=XorSource(source.tensors, source.architecture.prefix, model.codecs))


@pytest.mark.matrix
@pytest.mark.parametrize("resident", [0, 2, 6])
@pytest.mark.parametrize("make_device", [pytest.param(EagerDevice, marks=pytest.mark.slow), WatchedDevice])
def test_a_pair_whose_layers_are_stored_in_code_writes_the_same_text(
    models: Models, monkeypatch: pytest.MonkeyPatch, make_device: Callable[[], CpuDevice], resident: int
) -> None:
    """With what the plan has counted for it, from memory and from disk, also when layers leave a device that is full."""
    settings, prompt, read = pair(models, resident_layers=resident), [3, 1, 4, 1, 5], list[tuple[int, int]]()
    with open_engine(settings, hardware=L40) as engine:
        expected = engine.generate(prompt, max_new_tokens=12, ignore_eos=True).token_ids
    monkeypatch.setattr("offload.source.check_source", check_coded)
    with open_engine(settings, hardware=L40, device=make_device(), progress=lambda *done: read.append(done)) as engine:
        plan, stream = engine.plan, engine.loop._stream
        assert plan.device_ledger.get("decoded layer", 0) == stream.scratch_bytes and bool(stream.scratch_bytes) == (
            resident < 6
        )
        assert sum(plan.host_ledger.values()) == plan.bytes_per_pass == stream.bytes_per_pass
        assert engine.generate(prompt, max_new_tokens=12, ignore_eos=True).token_ids == expected
        if resident:
            with layer_fault(engine, 1, lambda: len(engine.plan.placement.resident) == resident):
                assert engine.generate(prompt, max_new_tokens=12, ignore_eos=True).token_ids == expected
            assert engine.plan.device_ledger["decoded layer"] == stream.scratch_bytes
        ring_bytes = 2 * stream.slot_bytes
    assert read[-1][0] == read[-1][1]
    with open_engine(replace(settings, host_memory_bytes=ring_bytes), hardware=L40, device=make_device()) as engine:
        assert engine.generate(prompt, max_new_tokens=12, ignore_eos=True).token_ids == expected
        assert engine.plan.placement.disk or resident == 6
