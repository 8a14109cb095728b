"""What CudaDevice asks of torch.cuda, with a stand-in for it: that an engine gets through, that host memory which was
registered is let go of once, and what happens when the driver refuses. What takes a GPU is in test_gpu.py."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from fakes import Tape
from offload.assemble import open_engine
from offload.config import EngineSettings
from offload.device import cuda
from offload.device.cuda import CudaDevice, RegisteredBuffer
from offload.errors import DeviceError
from planning import L40

Models = Callable[..., Path]
PROMPT = [5, 9, 33, 2, 71]
CHUNK_BYTES = 8192


class Runtime:
    """cudaHostRegister and cudaHostUnregister. Registration number `refuse_from` (from 0) and all after it fail."""

    def __init__(self) -> None:
        self.refuse_from, self.interrupt_at = 10**9, 10**9
        self.calls = self.errors_read = 0
        self.registered: dict[int, int] = {}

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        self.calls += 1
        if self.calls > self.interrupt_at:
            raise KeyboardInterrupt
        if self.calls > self.refuse_from:
            return 2  # out of memory
        assert flags == 0 and address not in self.registered
        self.registered[address] = num_bytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return 0


class Event:
    """Its time is the number of records so far."""

    count = 0

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing
        self.at: int | None = None

    def record(self) -> None:
        Event.count += 1
        self.at = Event.count

    def synchronize(self) -> None:
        assert self.at is not None

    def query(self) -> bool:
        return self.at is not None

    def elapsed_time(self, other: "Event") -> float:
        assert self.at is not None and other.at is not None and self.at <= other.at, "an event before the clock's"
        return float(other.at - self.at)


class Stream:
    def wait_event(self, event: Event) -> None:
        assert event.at is not None, "an event that was not recorded is no wait"

    def wait_stream(self, other: "Stream") -> None:
        assert other is not self


class Graph:
    """What was computed while it was captured, to be computed again."""

    replay: Callable[[], None]


@contextmanager
def capture(graph: Graph, *, pool: object, stream: Stream, capture_error_mode: str) -> Iterator[None]:
    assert capture_error_mode == "thread_local"
    with Tape() as tape:
        yield
    graph.replay = tape.replay


@contextmanager
def use(stream: Stream) -> Iterator[None]:
    yield


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    runtime, compute = Runtime(), Stream()
    stand_ins: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "set_device": lambda device: None,
        "get_device_name": lambda index: "a stand-in",
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": capture,
        "graph_pool_handle": lambda: (0, 1),
        "stream": use,
        "current_stream": lambda: compute,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_reserved": lambda: 3,
        "memory_allocated": lambda: 1,
        "max_memory_allocated": lambda: 7,
        "mem_get_info": lambda: (2**40, 2**40),
        "cudart": lambda: runtime,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)

    def read_error() -> None:
        runtime.errors_read += 1

    monkeypatch.setattr(cuda, "_launch_anything", read_error)
    monkeypatch.setattr(cuda, "REGISTER_CHUNK_BYTES", CHUNK_BYTES)
    return runtime


def open_device() -> CudaDevice:
    device = CudaDevice()
    device.torch_device = torch.device("cpu")
    return device


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_an_engine_runs_on_it_and_leaves_nothing_registered(
    runtime: Runtime, models: Models, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "CLOCK_VALID_S", 0.0)
    settings = EngineSettings(
        model=str(models()), draft_models=(str(models()),), device="cpu", tree="4x3:kary", resident_layers=1, slots=2
    )
    texts = []
    for device in (None, open_device()):
        with open_engine(settings, device=device, hardware=L40) as engine:
            request: dict[str, Any] = {"max_new_tokens": 24, "temperature": temperature, "ignore_eos": True}
            texts.append([engine.generate(PROMPT, **request).token_ids for _ in range(2)])
            if device is not None:
                assert sum(runtime.registered.values()) == engine.memory().host_pinned_bytes == engine.plan.bytes_per_pass
    assert texts[0] == texts[1]
    assert runtime.registered == {} and runtime.errors_read == 0


@pytest.mark.parametrize("refuse_from", [0, 1, 2])
def test_what_is_refused_stays_pageable_and_the_error_is_read(runtime: Runtime, refuse_from: int) -> None:
    runtime.refuse_from = refuse_from
    cuts = [CHUNK_BYTES, 2 * CHUNK_BYTES, 3 * CHUNK_BYTES]
    buffer = RegisteredBuffer(3 * CHUNK_BYTES, cuts)
    assert buffer.pinned_bytes == refuse_from * CHUNK_BYTES and len(runtime.registered) == refuse_from
    assert runtime.errors_read == 1 and buffer.tensor.numel() == 3 * CHUNK_BYTES
    buffer.close()
    buffer.close()
    assert runtime.registered == {}


def test_chunks_end_at_cuts_and_cover_everything(runtime: Runtime) -> None:
    cuts = [3000 * (number + 1) for number in range(11)]
    buffer = RegisteredBuffer(cuts[-1], cuts)
    start = buffer.tensor.data_ptr()
    ends = sorted(address - start + num_bytes for address, num_bytes in runtime.registered.items())
    assert ends == [9000, 18000, 27000, 33000] and buffer.pinned_bytes == 33000
    buffer.close()


def test_an_interruption_while_registering_leaves_nothing_registered(runtime: Runtime) -> None:
    runtime.interrupt_at = 2
    with pytest.raises(KeyboardInterrupt):
        RegisteredBuffer(4 * CHUNK_BYTES, [CHUNK_BYTES * number for number in (1, 2, 3, 4)])
    assert runtime.registered == {}


def test_a_device_that_is_not_there_is_refused(runtime: Runtime) -> None:
    with pytest.raises(DeviceError, match="no CUDA device 1"):
        CudaDevice(1)
