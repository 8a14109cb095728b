"""The only file that names torch.cuda: registered host memory, one copy stream, events, graphs.

Order is kept by events alone. A copy waits (on the copy stream) for the event that `release` recorded on the compute stream;
compute waits (on the compute stream) for the event recorded behind the copy. The host waits for neither.
"""

import contextlib
import logging
import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from ..config import bytes_text
from ..errors import DeviceError, DeviceMemoryError
from .allocator import prefer_growing_segments
from .base import CopyTicket, Interval, Ticket
from .chunks import register_chunks
from .cuda_faults import kind_of, translate
from .faults import translated
from .host import HostMapping
from .numa import bus_id_of, near_cpus
from .small_uploads import SMALL_BYTES, choose_uploads
from .streams import beside, inserted

logger = logging.getLogger(__name__)

# Registered in chunks: one huge registration fails on some drivers. Large ones, as each takes its time.
REGISTER_CHUNK_BYTES = 4 * 2**30
# The device's clock drifts away from the host's by some ten microseconds a second, and the time between two events is a
# float32 of milliseconds: after minutes both are as long as what is measured with them.
CLOCK_VALID_S = 10.0
CAP_SLACK_BYTES = 2**29


class _Clock:
    """Ties events to the host's clock, by one that lies before all of them."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()
        self._event.synchronize()
        self.set_s = time.monotonic()

    def time_of(self, event: torch.cuda.Event) -> float:
        return self.set_s + float(self._event.elapsed_time(event)) / 1e3


class CudaMark(Ticket):
    __slots__ = ("clock", "event")

    def __init__(self, event: torch.cuda.Event, clock: _Clock) -> None:
        self.event, self.clock = event, clock


class CudaCopy(CopyTicket):
    __slots__ = ("clock", "dst", "ready", "started")

    def __init__(self, dst: torch.Tensor, started: torch.cuda.Event, ready: torch.cuda.Event, clock: _Clock) -> None:
        self.dst, self.started, self.ready, self.clock = dst, started, ready, clock


class RegisteredBuffer:
    """A HostMapping whose leading `pinned_bytes` are registered with CUDA, as many as the driver allows. What it refused stays
    pageable: copies from there are slower, not wrong."""

    def __init__(self, num_bytes: int, cuts: Sequence[int], cpus: frozenset[int] | None = None) -> None:
        """It comes to lie near `cpus`, or anywhere."""
        self._mapping = HostMapping(num_bytes, inherited=False)
        self._mapping.touch(cpus)
        self.tensor = self._mapping.tensor
        self.pinned_bytes = 0
        self._registered: list[int] = []
        # Memory that goes while it is registered is the driver's to crash on, so it does not depend on somebody's `close`.
        self._let_go = weakref.finalize(self, _let_go, self._registered, self._mapping)
        self._let_go.atexit = False
        try:
            self.pinned_bytes = register_chunks(num_bytes, cuts, REGISTER_CHUNK_BYTES, self._register)
        except BaseException:  # Ctrl-C, which in the middle of many GiB is likely
            self.close()
            raise
        if self.pinned_bytes < num_bytes:
            logger.info("CUDA registered %d of %d bytes of host memory; the rest is pageable", self.pinned_bytes, num_bytes)

    def close(self) -> None:
        self.tensor = torch.empty(0, dtype=torch.uint8)
        self._let_go()

    def _register(self, start: int, end: int) -> bool:
        address = self.tensor.data_ptr() + start
        if not _succeeded(torch.cuda.cudart().cudaHostRegister(address, end - start, 0)):
            return False
        self._registered.append(address)
        return True


def _let_go(registered: list[int], mapping: HostMapping) -> None:
    while registered:
        if not _succeeded(torch.cuda.cudart().cudaHostUnregister(registered.pop())):
            logger.warning("CUDA did not let go of host memory that it had registered")
    mapping.close()


def _succeeded(result: Any) -> bool:
    """Of a call of CUDA's runtime. A failure stays behind as the thread's last error, which the next kernel launch would
    report as its own. torch does not bind cudaGetLastError, but a launch of ours reads it just as well."""
    if int(result) == 0:
        return True
    _launch_anything()
    return False


def _launch_anything() -> None:
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda").add_(1)


class CudaDevice:
    host_addressable = False
    at_once = False
    replays = True

    def __init__(self, index: int = 0, *, small_uploads: str = "copy") -> None:
        if not torch.cuda.is_initialized():
            prefer_growing_segments(os.environ)
        if not torch.cuda.is_available() or index >= torch.cuda.device_count():
            raise DeviceError(
                f"no CUDA device {index}: {torch.cuda.device_count()} found",
                where="--device",
                cure="use --device cpu, or check the driver with nvidia-smi",
            )
        self.torch_device = torch.device("cuda", index)
        torch.cuda.set_device(self.torch_device)
        self.name = torch.cuda.get_device_name(index)
        self._copy_stream = torch.cuda.Stream()
        # One for recordings and for work beside a pass: libraries keep a workspace of tens of MiB for every stream that they
        # have run on. No stream has a lower priority than this one and the default one: who is to be first has a higher one.
        self._side_stream = torch.cuda.Stream()
        self._first_stream = torch.cuda.Stream(priority=-1)
        self._graph_pool = torch.cuda.graph_pool_handle()  # shared: graphs run one at a time, and keep their outputs
        self._clock = _Clock()
        self._near_cpus = _near_cpus(index)
        self._mapped = choose_uploads(self, small_uploads, self._copy_up)
        self.small_uploads: str | None = "mapped" if self._mapped else "copy"
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def alloc(self, num_bytes: int) -> torch.Tensor:
        try:
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.torch_device)
        except RuntimeError as error:
            if kind_of(error) is not DeviceMemoryError:
                raise
            raise DeviceMemoryError(
                f"the GPU has no room for {bytes_text(num_bytes)} more, {bytes_text(self.free_bytes())} are free",
                where=f"{self.name}, memory",
                cure="lower --gpu-memory, --resident-layers or --max-context",
            ) from error

    def pin(self, num_bytes: int, cuts: Sequence[int]) -> RegisteredBuffer:
        return RegisteredBuffer(num_bytes, cuts, self._near_cpus)

    def upload(self, host: torch.Tensor) -> torch.Tensor:
        if self._mapped is not None and 0 < host.nbytes <= SMALL_BYTES:
            return self._mapped.upload(host)
        return self._copy_up(host)

    def _copy_up(self, host: torch.Tensor) -> torch.Tensor:
        # Up to 64 KiB are taken along with the command: no sync, no turn behind a layer, and `host` may go at once. Larger
        # ones may wait for the stream, so a round has none of them.
        return host.to(self.torch_device, non_blocking=True)

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.cpu()

    def copy_async(self, dst: torch.Tensor, src: torch.Tensor, after: Ticket) -> CopyTicket:
        assert isinstance(after, CudaMark)
        started, ready = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(self._copy_stream):
            self._copy_stream.wait_event(after.event)
            started.record()
            dst.copy_(src, non_blocking=True)
            ready.record()
        return CudaCopy(dst, started, ready, self._clock)

    def wait(self, ticket: CopyTicket) -> torch.Tensor:
        assert isinstance(ticket, CudaCopy)
        torch.cuda.current_stream().wait_event(ticket.ready)
        return ticket.dst

    def release(self, buffer: torch.Tensor) -> Ticket:
        return self.mark()

    def mark(self) -> Ticket:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return CudaMark(event, self._clock)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        # Libraries set themselves up in the first run, which may not be captured, and on a stream that is not the default one.
        with inserted(self._side_stream, torch.cuda.current_stream(), torch.cuda.stream):
            work()
        graph = torch.cuda.CUDAGraph()
        # Other threads go on waiting for copies meanwhile; only this one's calls are captured and checked.
        with torch.cuda.graph(graph, pool=self._graph_pool, stream=self._side_stream, capture_error_mode="thread_local"):
            work()
        return graph.replay

    def first(self) -> contextlib.AbstractContextManager[None]:
        return inserted(self._first_stream, torch.cuda.current_stream(), torch.cuda.stream)

    def beside(self, after: Ticket) -> contextlib.AbstractContextManager[None]:
        return beside(self._side_stream, _end_event(after), torch.cuda.stream)

    def drain(self, ticket: Ticket) -> None:
        _end_event(ticket).synchronize()

    def drain_copies(self) -> None:
        self._copy_stream.synchronize()

    def passed(self, ticket: Ticket) -> bool:
        return bool(_end_event(ticket).query())

    def interval(self, ticket: Ticket) -> Interval:
        assert isinstance(ticket, CudaCopy | CudaMark)
        end_s = ticket.clock.time_of(_end_event(ticket))
        start_s = ticket.clock.time_of(ticket.started) if isinstance(ticket, CudaCopy) else end_s
        return Interval(start_s, end_s)

    def renew_clock(self) -> None:
        if time.monotonic() - self._clock.set_s > CLOCK_VALID_S:
            self._clock = _Clock()

    @contextlib.contextmanager
    def translated(self) -> Iterator[None]:
        # In here runs all that a text takes, and a thread that has not opened the device has another one as its current.
        with torch.cuda.device(self.torch_device), translated(partial(translate, self.name)):
            yield

    def free_bytes(self) -> int:
        # What torch has cached but not in use can be given out again.
        own = self.torch_device
        cached = torch.cuda.memory_reserved(own) - torch.cuda.memory_allocated(own)
        return int(torch.cuda.mem_get_info(own)[0]) + cached

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self.torch_device)

    def close(self) -> None:
        # Of a GPU that is lost, whoever closes it knows by now.
        with contextlib.suppress(RuntimeError), torch.cuda.device(self.torch_device):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # for whoever else is on this GPU, such as the next engine of a benchmark
            torch.cuda.reset_peak_memory_stats()  # what was measured on a device of its own is no part of a later run


def _end_event(ticket: Ticket) -> torch.cuda.Event:
    if isinstance(ticket, CudaCopy):
        return ticket.ready
    assert isinstance(ticket, CudaMark)
    return ticket.event


def _near_cpus(index: int) -> frozenset[int] | None:
    cpus = near_cpus(bus_id_of(torch.cuda.get_device_properties(index)))
    if cpus is not None and not cpus:
        logger.warning("host memory will be far from the GPU: this process may use no CPU near it; see `doctor`, and numactl")
    return cpus


def is_available() -> bool:
    return torch.cuda.is_available()


def name(index: int = 0) -> str:
    return torch.cuda.get_device_name(index)


def cap_memory(num_bytes: int) -> None:
    """From here on this process gets `num_bytes` of the current device from torch, whoever asks, and CAP_SLACK_BYTES: what is
    capped is what torch holds, free blocks and libraries' workspaces included, not what anybody asked it for."""
    total_bytes = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(min((num_bytes + CAP_SLACK_BYTES) / total_bytes, 1.0))


def version() -> str | None:
    """The CUDA version torch was built for, None for a CPU build."""
    return torch.version.cuda


def uuid(index: int) -> str | None:
    """The name under which the driver's management library knows CUDA device `index`, as their numbers differ; None where
    there is no such device."""
    if index >= torch.cuda.device_count():
        return None
    return f"GPU-{torch.cuda.get_device_properties(index).uuid}"
