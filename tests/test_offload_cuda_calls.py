"""What CudaDevice asks of torch.cuda, with a stand-in for it: that an engine gets through, that host memory which was
registered is let go of once, and what happens when the driver refuses. What takes a GPU is in test_gpu.py."""

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import VOCAB_SIZE
from fakes import Tape
from offload.assemble import open_engine
from offload.config import EngineSettings
from offload.device import allocator, cuda, numa, small_uploads
from offload.device.chunks import register_chunks
from offload.device.cuda import CudaDevice, RegisteredBuffer
from offload.device.host import HostMapping
from offload.errors import DeviceError, DeviceMemoryError
from offload.model.attention import Block, tree_attention
from offload.model.transformers_api import carry
from offload.weights.placement import RING_BUFFERS
from planning import L40
from test_offload_drafters import open_with
from text_drafters import TextContext, TextDrafter

Models = Callable[..., Path]
PROMPT = [5, 9, 33, 2, 71]
CHUNK_BYTES = 8192
ACCELERATOR_ERROR = getattr(torch, "AcceleratorError", RuntimeError)  # since torch 2.8


class Runtime:
    """cudaHostRegister and cudaHostUnregister, for `room_bytes` at a time."""

    def __init__(self) -> None:
        self.room_bytes, self.interrupt_at = 2**40, 10**9
        self.calls = self.errors_read = 0
        self.registered: dict[int, int] = {}

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        self.calls += 1
        if self.calls > self.interrupt_at:
            raise KeyboardInterrupt
        assert flags == 0 and address not in self.registered
        if num_bytes + sum(self.registered.values()) > self.room_bytes:
            return 2  # out of memory
        self.registered[address] = num_bytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return 0


class Current(threading.local):
    """A thread's device: none until it says which, where torch has the first."""

    device: object = None

    def set(self, device: object) -> None:
        self.device = device

    @contextmanager
    def use(self, device: object) -> Iterator[None]:
        before, self.device = self.device, device
        yield
        self.device = before


current = Current()


class Event:
    """Its time is the number of records so far."""

    count = 0

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing
        self.at: int | None = None

    def record(self) -> None:
        assert current.device is not None, "recorded on the stream of whatever device is the thread's"
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
    def __init__(self, priority: int = 0) -> None:
        self.priority = priority
        self.waited: list[object] = []

    def wait_event(self, event: Event) -> None:
        assert event.at is not None, "an event that was not recorded is no wait"
        self.waited.append(event)

    def wait_stream(self, other: "Stream") -> None:
        assert other is not self
        self.waited.append(other)

    def synchronize(self) -> None:
        self.waited.clear()


class Graph:
    """What was computed while it was captured, to be computed again."""

    replay: Callable[[], None]


@contextmanager
def capture(graph: Graph, *, pool: object, stream: Stream, capture_error_mode: str) -> Iterator[None]:
    assert capture_error_mode == "thread_local"
    with Tape() as tape:
        yield
    graph.replay = tape.replay


streams: list[Stream] = []  # the current one last


@contextmanager
def use(stream: Stream) -> Iterator[None]:
    streams.append(stream)
    yield
    assert streams.pop() is stream


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    runtime = Runtime()
    streams[:] = [Stream()]
    stand_ins: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: False,
        "device_count": lambda: 1,
        "set_device": current.set,
        "device": current.use,
        "get_device_name": lambda index: "a stand-in",
        "get_device_properties": lambda index: SimpleNamespace(pci_domain_id=0, pci_bus_id=0x4A, pci_device_id=0),
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": capture,
        "graph_pool_handle": lambda: (0, 1),
        "stream": use,
        "current_stream": lambda: streams[-1],
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_reserved": lambda device: 3,
        "memory_allocated": lambda device: 1,
        "max_memory_allocated": lambda device: 7,
        "mem_get_info": lambda device: (2**40, 2**40),
        "cudart": lambda: runtime,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)

    def read_error() -> None:
        runtime.errors_read += 1

    monkeypatch.setattr(cuda, "_launch_anything", read_error)
    monkeypatch.setattr(os, "environ", dict(os.environ))
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


def test_a_thread_that_did_not_open_it_runs_on_it_too(runtime: Runtime, models: Models) -> None:
    settings = EngineSettings(model=str(models()), device="cpu", tree="none", resident_layers=1, slots=2)
    with open_engine(settings, device=open_device(), hardware=L40) as engine, ThreadPoolExecutor(max_workers=1) as pool:
        expected = engine.generate(PROMPT, max_new_tokens=6, ignore_eos=True).token_ids
        engine.forget()
        assert pool.submit(engine.generate, PROMPT, max_new_tokens=6, ignore_eos=True).result().token_ids == expected
        pool.submit(engine.close).result()


@pytest.mark.parametrize("room_layers", [2, 0])
def test_drafts_grow_beside_a_pass_that_comes_first(runtime: Runtime, models: Models, room_layers: int) -> None:
    """Between its layers where the host waits for those, and else behind them all. Either order may use what came before it."""
    device, calls, drafter = open_device(), list[str](), TextDrafter(VOCAB_SIZE)
    default = streams[-1]
    runtime.room_bytes = room_layers * 2**20

    def grow_ahead(context: TextContext) -> int:
        stream = streams[-1]
        assert stream is device._side_stream and isinstance(stream.waited[-1], Event), "it may see what the pass does"
        calls.append("grow")
        return 3

    def compute(*_: object) -> None:
        first = streams[-1]
        assert first.priority == -1 and default in first.waited
        calls.append("layer")

    with open_with(models(num_layers=3), drafter, device=device, resident_layers=1, slots=2) as engine:
        engine.loop._plan = replace(engine.plan, ahead_steps=2)
        for layer in engine.loop._target._layers:
            layer.register_forward_hook(compute)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TextContext, "grow_ahead", grow_ahead)
            report = engine.generate(PROMPT, max_new_tokens=12, ignore_eos=True)
        in_ring = bool(engine.plan.placement.through_ring)
        assert in_ring is (room_layers == 0)
    one_pass = ["layer"] * 3 + ["grow"] * 2 if not in_ring else ["grow", "layer", "grow", "layer", "layer"]
    assert calls == one_pass * len(report.stats.passes)
    assert default.waited[-1] is device._first_stream and device._side_stream.waited == []
    assert report.stats.wasted_nodes == 6 * len(report.stats.passes)


@pytest.mark.parametrize("num_registered", range(6))
def test_as_much_as_the_driver_allows_is_registered_and_each_error_is_read(runtime: Runtime, num_registered: int) -> None:
    """Layers of which a chunk holds four: where five do not fit, four may, then two, then one."""
    layer_bytes = CHUNK_BYTES // 4
    runtime.room_bytes = num_registered * layer_bytes + layer_bytes // 2
    buffer = RegisteredBuffer(6 * layer_bytes, [layer_bytes * (number + 1) for number in range(6)])
    assert buffer.pinned_bytes == sum(runtime.registered.values()) == num_registered * layer_bytes
    assert runtime.errors_read == runtime.calls - len(runtime.registered) > 0
    assert buffer.tensor.numel() == 6 * layer_bytes
    buffer.close()
    buffer.close()
    assert runtime.registered == {}


def test_chunks_end_at_cuts_and_cover_everything(runtime: Runtime) -> None:
    cuts = [3000 * (number + 1) for number in range(11)]
    buffer = RegisteredBuffer(cuts[-1], cuts)
    start = buffer.tensor.data_ptr()
    ends = sorted(address - start + num_bytes for address, num_bytes in runtime.registered.items())
    assert ends == [6000, 12000, 18000, 24000, 30000, 33000] and buffer.pinned_bytes == 33000
    buffer.close()


@given(sizes=st.lists(st.integers(1, 50), max_size=12), most_bytes=st.integers(0, 120), room_bytes=st.integers(0, 400))
def test_attempts_come_to_an_end_with_all_leading_pieces_that_there_is_room_for(
    sizes: list[int], most_bytes: int, room_bytes: int
) -> None:
    cuts = list(itertools.accumulate(sizes))
    done: list[tuple[int, int]] = []

    def register(start: int, end: int) -> bool:
        assert start in {0, *cuts} and end in cuts and start < end
        assert end - start <= most_bytes or cuts.index(end) == ([0, *cuts].index(start))
        if end <= room_bytes:
            done.append((start, end))
        return end <= room_bytes

    pinned_bytes = register_chunks(sum(sizes), cuts, most_bytes, register)
    assert pinned_bytes == max((cut for cut in cuts if cut <= room_bytes), default=0)
    assert [0, *(end for _, end in done)] == [*(start for start, _ in done), pinned_bytes]


def test_layers_behind_what_the_driver_registers_go_through_what_it_did(runtime: Runtime, models: Models) -> None:
    settings = EngineSettings(model=str(models(num_layers=6)), device="cpu", tree="none", resident_layers=1, slots=2)
    texts = []
    for room_layers in (5, 3, 0):
        with open_engine(settings, device=open_device(), hardware=L40) as engine:
            layer_bytes = engine.loop._stream.slot_bytes
        runtime.room_bytes = room_layers * layer_bytes
        with open_engine(settings, device=open_device(), hardware=L40) as engine:
            texts.append(engine.generate(PROMPT, max_new_tokens=12, ignore_eos=True).token_ids)
            assert sum(runtime.registered.values()) == engine.memory().host_pinned_bytes == room_layers * layer_bytes
            assert len(engine.plan.placement.pageable) == (0 if room_layers == 5 else 5 - max(room_layers - RING_BUFFERS, 0))
        assert runtime.registered == {}
        runtime.room_bytes = 2**40
    assert texts[0] == texts[1] == texts[2]


def test_an_interruption_while_registering_leaves_nothing_registered(runtime: Runtime) -> None:
    runtime.interrupt_at = 2
    with pytest.raises(KeyboardInterrupt):
        RegisteredBuffer(4 * CHUNK_BYTES, [CHUNK_BYTES * number for number in (1, 2, 3, 4)])
    assert runtime.registered == {}


def test_the_clock_is_set_anew_when_asked_to_and_no_ticket_changes_its_own(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "CLOCK_VALID_S", 0.0)
    device = open_device()
    old = device.mark()
    assert device.interval(old) == device.interval(old)
    num_events = Event.count
    device.interval(old)
    assert Event.count == num_events, "asking for a time records nothing and waits for nothing"
    first = device.interval(old)
    device.renew_clock()
    assert Event.count == num_events + 1 and device.interval(old) == first
    monkeypatch.setattr(cuda, "CLOCK_VALID_S", 3600.0)
    device.renew_clock()
    assert Event.count == num_events + 1, "one that is still right is kept"


def test_every_round_begins_with_a_clock_that_is_right(
    runtime: Runtime, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, calls = open_device(), list[str]()
    settings = EngineSettings(model=str(models()), device="cpu", tree="none", resident_layers=1, slots=2)
    with open_engine(settings, device=device, hardware=L40) as engine:
        monkeypatch.setattr(device, "renew_clock", lambda: calls.append("clock"))
        prefetch = engine.loop._stream.prefetch
        monkeypatch.setattr(engine.loop._stream, "prefetch", lambda: (calls.append("copies"), prefetch()))
        engine.generate(PROMPT, max_new_tokens=3, ignore_eos=True)
    assert [name for name, _ in itertools.groupby(calls)] == ["clock", "copies"] * 3


def test_host_memory_is_touched_near_the_device(runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes, the first with the CPUs of this process; the device on the one or the other."""
    own, touched = os.sched_getaffinity(0), list[frozenset[int] | None]()
    for node, cpus in enumerate((own, {max(own) + 1})):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(",".join(map(str, cpus)))
    (tmp_path / "0000:4a:00.0").mkdir()
    monkeypatch.setattr(numa, "NODES", tmp_path)
    monkeypatch.setattr(numa, "PCI_DEVICES", tmp_path)
    monkeypatch.setattr(HostMapping, "touch", lambda self, cpus: touched.append(cpus))
    for node in (0, 1, -1):
        (tmp_path / "0000:4a:00.0" / "numa_node").write_text(f"{node}\n")
        open_device().pin(4096, ()).close()
    assert touched == [own, frozenset(), None]


def test_attention_leaves_the_process_its_kernels(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Baselines run in a process that has opened a device, and so may others."""
    seen: list[bool] = []
    compute = torch.nn.functional.scaled_dot_product_attention

    def note(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return compute(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", note)
    rows, all_rows = torch.ones(1, 2, 3, 8), slice(3)
    mask = carry({None: (Block(all_rows, all_rows, torch.ones(1, 1, 3, 3, dtype=torch.bool)),)}, torch.device("cpu"))
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        for enabled in (True, False):
            torch.backends.cuda.enable_cudnn_sdp(enabled)
            open_device().close()
            tree_attention(torch.nn.Module(), rows, rows, rows, mask)
            assert torch.backends.cuda.cudnn_sdp_enabled() == enabled
            with pytest.raises(RuntimeError):
                tree_attention(torch.nn.Module(), rows, rows[..., :4, :5], rows, mask)
            assert torch.backends.cuda.cudnn_sdp_enabled() == enabled
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    assert seen == [False] * 4


def test_an_engine_whose_small_tensors_are_mapped_writes_the_same_text_and_says_so(
    runtime: Runtime, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped_bytes: list[int] = []

    def map_memory(num_bytes: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        mapped_bytes.append(num_bytes)
        memory = torch.zeros(num_bytes, dtype=torch.uint8)
        return memory, memory

    monkeypatch.setattr(small_uploads, "map_host_memory", map_memory)
    settings = EngineSettings(model=str(models()), draft_models=(str(models()),), device="cpu", tree="4x3:kary", slots=2)
    texts = []
    for way in ("copy", "mapped"):
        device = CudaDevice(small_uploads=way)
        device.torch_device = torch.device("cpu")
        with open_engine(settings, device=device, hardware=L40) as engine:
            report = engine.generate(PROMPT, max_new_tokens=24, ignore_eos=True)
        texts.append(report.token_ids)
        assert report.to_json()["plan"]["small_uploads"] == way  # type: ignore[index]
    assert texts[0] == texts[1] and len(mapped_bytes) == 1


def test_pinned_memory_is_described_to_torch_as_the_device_sees_it() -> None:
    host = torch.empty(4096, dtype=torch.uint8)
    described = small_uploads._OnDevice(host).__cuda_array_interface__
    assert described == {"data": (host.data_ptr(), False), "shape": (4096,), "typestr": "|u1", "version": 3}


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ..."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    ACCELERATOR_ERROR("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
]
LOST = [
    "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported",
    "CUDA error: unspecified launch failure",
    "CUDA error: uncorrectable ECC error encountered",
    "CUDA error: misaligned address",
    "CUDA error: device-side assert triggered",
    "CUDA error: the launch timed out and was terminated",
    "CUDA error: unknown error",
    "CUDA error: CUDA-capable device(s) is/are busy or unavailable",
    "CUDA error: no CUDA-capable device is detected",
    "CUDA error: Invalid access of peer GPU memory over nvlink or a hardware error",
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx( handle, opa, opb, m, n, k, ...)`",
    "CUDA driver error: device not ready, GPU is lost or device lost",
]
OURS = [
    RuntimeError("CUDA error: invalid argument"),
    RuntimeError("CUDA error: operation not permitted when stream is capturing"),
    RuntimeError("CUDA error: no kernel image is available for execution on the device"),
    RuntimeError("The size of tensor a (3) must match the size of tensor b (4) at non-singleton dimension 0"),
    ValueError("CUDA error: out of memory"),
    KeyboardInterrupt(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_memory_that_libraries_and_graphs_run_out_of_is_the_devices(runtime: Runtime, error: Exception) -> None:
    with pytest.raises(DeviceMemoryError) as caught, open_device().translated():
        raise error
    assert len(str(caught.value).splitlines()) == 3 and caught.value.exit_code == 4


@pytest.mark.parametrize("kind", [RuntimeError, ACCELERATOR_ERROR])
@pytest.mark.parametrize("words", LOST, ids=str)
def test_a_gpu_that_is_lost_is_a_device_error(runtime: Runtime, words: str, kind: type[Exception]) -> None:
    with pytest.raises(DeviceError, match="the GPU failed") as caught, open_device().translated():
        raise kind(words)
    assert len(str(caught.value).splitlines()) == 3 and caught.value.exit_code == 7


@pytest.mark.parametrize("error", OURS, ids=str)
def test_faults_of_ours_are_not_the_gpus(runtime: Runtime, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, open_device().translated():
        raise error
    assert caught.value is error


def test_a_pass_for_which_a_library_has_no_memory_is_run_with_less(runtime: Runtime, models: Models) -> None:
    """As torch's own exception would be: the tree becomes smaller, the text stays."""
    settings = EngineSettings(model=str(models()), draft_models=(str(models()),), device="cpu", tree="4x3:kary", slots=2)
    texts = []
    for fails in (False, True):
        with open_engine(settings, device=open_device(), hardware=L40) as engine:
            forward, nodes = engine.loop._target.forward, engine.plan.tree.num_nodes

            def full(parts: Any, *, fails: bool = fails, nodes: int = nodes, forward: Any = forward, **others: Any) -> Any:
                if fails and parts[0].num_rows >= nodes:
                    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
                return forward(parts, **others)

            engine.loop._target.forward = full  # type: ignore[method-assign]
            texts.append(engine.generate([5], max_new_tokens=16, ignore_eos=True).token_ids)
            assert (engine.plan.tree.num_nodes < nodes) is fails
    assert texts[0] == texts[1]


def test_a_gpu_lost_while_loading_or_in_a_pass_is_exit_7_however_it_is_closed(
    runtime: Runtime, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    settings = EngineSettings(model=str(models()), device="cpu", tree="none", slots=2)
    with pytest.raises(DeviceError), open_engine(settings, device=open_device(), hardware=L40) as engine:
        monkeypatch.setattr(torch.cuda, "synchronize", lost)
        monkeypatch.setattr(engine.loop._target, "forward", lambda *_, **__: lost())
        engine.generate(PROMPT, max_new_tokens=3)
    device = open_device()
    monkeypatch.setattr(device, "copy_async", lambda *_: lost())
    with pytest.raises(DeviceError):
        open_engine(settings, device=device, hardware=L40)


def test_segments_grow_unless_the_user_has_settings_or_cuda_runs(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    names, wanted = (allocator.NAME, allocator.NEW_NAME), "expandable_segments:True"
    for version, name in (((2, 6, 0), names[0]), ((2, 8, 1), names[0]), ((2, 9, 0), names[1]), ((2, 13), names[1])):
        environment: dict[str, str] = {}
        allocator.prefer_growing_segments(environment, version)
        assert environment == {name: wanted}
    for name in names:
        environment = {name: "max_split_size_mb:64"}
        allocator.prefer_growing_segments(environment)
        assert environment == {name: "max_split_size_mb:64"}
    for running in (False, True):
        for name in names:
            os.environ.pop(name, None)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda running=running: running)
        open_device()
        assert (wanted in [os.environ.get(name) for name in names]) is not running


def test_an_interruption_at_any_registration_of_loading_leaves_nothing_registered(runtime: Runtime, models: Models) -> None:
    settings = EngineSettings(
        model=str(models(num_layers=3)),
        draft_models=(str(models(num_layers=1)),),
        device="cpu",
        tree="4x3:kary",
        resident_layers=1,
    )

    def load() -> None:
        with open_engine(settings, device=open_device(), hardware=L40):
            pass

    load()
    num_calls = runtime.calls
    assert num_calls > 4 and runtime.registered == {}
    for number in range(1, num_calls):
        runtime.calls, runtime.interrupt_at = 0, number
        with pytest.raises(KeyboardInterrupt):
            load()
        assert runtime.calls == number + 1 and runtime.registered == {}


def test_registered_memory_that_nobody_closed_is_let_go_of(runtime: Runtime, models: Models) -> None:
    """As when Ctrl-C comes before anybody has it, or an error before somebody closes it."""
    device = open_device()

    def broken_off() -> None:
        device.pin(3 * CHUNK_BYTES, [CHUNK_BYTES, 2 * CHUNK_BYTES])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    assert runtime.calls > 0 and runtime.registered == {}


def test_a_device_that_is_not_there_is_refused(runtime: Runtime) -> None:
    with pytest.raises(DeviceError, match="no CUDA device 1"):
        CudaDevice(1)
