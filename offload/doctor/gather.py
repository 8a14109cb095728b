"""Asks the machine: a few seconds, a few GiB of host memory, nothing left behind. Judges nothing."""

import os
import platform
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..device import Device, cuda, numa, open_device, pinned
from ..device.cgroup import cgroup_memory
from ..device.host import available_bytes
from ..errors import OffloadError
from ..planner.cost import GIB
from ..releases import installed, untested
from ..typed_model import TypedModel
from .decoding import time_decoding
from .facts import Check, CopyFacts, DecodeFacts, DiskFacts, Facts, GpuActivity, GpuFacts, HostFacts, need_of
from .model_checks import Inspected, compare_vocabularies, inspect_model, time_disk
from .nvml import find_gpu, open_nvml, read_activity, read_gpu

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
PAGE_BYTES = 4096
COPY_BYTES = 256 * 2**20
NUM_COPIES = 32  # a third of a second on a fast link, and enough for the link to leave its power saving
PIN_TEST_BYTES = 8 * GIB
PIN_TEST_SHARE = 4  # at most this part of what is available


def gather_facts(*, model: str | None, draft_model: str | None, device: str) -> Facts:
    """Facts for `--model`, `--draft-model` (None: not named) and `--device`. DeviceError for a CUDA device that is not among
    those there are."""
    usable = cuda.is_available() and device != "cpu"
    on_gpu = usable or device.startswith("cuda")  # sizes are those of the device asked for, though it be missing
    nothing = Inspected(checks=())
    target = nothing if model is None else inspect_model(model, "--model", "model", on_gpu=on_gpu)
    draft = nothing if draft_model is None else inspect_model(draft_model, "--draft-model", "draft", on_gpu=on_gpu)
    need = need_of(target.cost, draft.cost, on_gpu=on_gpu) if target.cost else None
    host = gather_host()
    test_bytes = min(need.host_bytes if need else PIN_TEST_BYTES, PIN_TEST_BYTES, host.available_bytes // PIN_TEST_SHARE)
    tests = _Tests(gpu=None)
    if device != "cpu":
        tests = _gather_gpu(device, usable, max(test_bytes, PAGE_BYTES), target.model)
    disk, disk_checks = _gather_disk(target)
    return Facts(
        device=device,
        host=host,
        gpu=tests.gpu,
        gpu_usable=usable,
        cuda_version=cuda.version(),
        copies=tests.copies,
        decoding=tests.decoding if isinstance(tests.decoding, DecodeFacts) else None,
        need=need,
        disk=disk,
        checks=(*target.checks, *tests.checks, *disk_checks, *draft.checks, *compare_vocabularies(target, draft)),
    )


def gather_host() -> HostFacts:
    group = cgroup_memory()
    memlock_bytes, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    nodes = numa.nodes()
    own_cpus = os.sched_getaffinity(0)
    return HostFacts(
        kernel=platform.release(),
        available_bytes=available_bytes(),
        cgroup_limit_bytes=group.limit_bytes if group else None,
        memlock_bytes=None if memlock_bytes == resource.RLIM_INFINITY else memlock_bytes,
        nodes=frozenset(nodes),
        own_nodes=frozenset(node for node, cpus in nodes.items() if cpus & own_cpus),
        versions={"python": platform.python_version(), **{name: installed(name) for name in PACKAGES}},
        untested=untested(),
    )


def time_copies(device: Device, num_bytes: int, while_copying: Callable[[], None]) -> CopyFacts:
    """Pins `num_bytes` and copies the first of them to the device, over and over; `while_copying` is called when copies are
    under way. FitError when there is no room for the test."""
    piece_bytes = min(num_bytes, COPY_BYTES)
    slot, start_s = device.alloc(piece_bytes), time.monotonic()
    with pinned(device, num_bytes, [*range(piece_bytes, num_bytes, piece_bytes), num_bytes]) as buffer:
        register_s = time.monotonic() - start_s
        source = buffer.tensor[:piece_bytes]
        device.drain(device.copy_async(slot, source, device.mark()))
        tickets = [device.copy_async(slot, source, device.mark()) for _ in range(NUM_COPIES)]
        while_copying()
        device.drain(tickets[-1])
        times_s = sorted(interval.end_s - interval.start_s for interval in map(device.interval, tickets))
        pinned_bytes = buffer.pinned_bytes
    return CopyFacts(
        tried_bytes=num_bytes,
        pinned_bytes=pinned_bytes,
        register_s=register_s,
        bytes_per_s=piece_bytes / max(times_s[NUM_COPIES // 2], 1e-9),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tests:
    """What a GPU was found to be and to do."""

    gpu: GpuFacts | None
    copies: CopyFacts | None = None
    decoding: DecodeFacts | Check | None = None

    @property
    def checks(self) -> tuple[Check, ...]:
        return (self.decoding,) if isinstance(self.decoding, Check) else ()


def _gather_gpu(device_name: str, usable: bool, test_bytes: int, model: TypedModel | None) -> _Tests:
    with open_nvml() as nvml:
        uuid = cuda.uuid(int(device_name.partition(":")[2] or 0)) if usable else None
        handle = find_gpu(nvml, uuid) if nvml is not None else None
        gpu = read_gpu(nvml, handle) if handle is not None else None
        if not usable:
            return _Tests(gpu=gpu)
        device, decoding = open_device(device_name), None
        busy: list[GpuActivity] = []

        def look() -> None:
            if handle is not None:
                busy.append(read_activity(nvml, handle, under_load=True))

        try:
            copies = time_copies(device, test_bytes, look)
            decoding = time_decoding(device, model) if model is not None else None
        except OffloadError:  # a GPU without room for the test; that it has none is a finding of its own
            copies = None
        finally:
            gpu = gpu or _without_driver(device)
            device.close()
        return _Tests(gpu=replace(gpu, activity=busy[-1]) if busy else gpu, copies=copies, decoding=decoding)


def _gather_disk(target: Inspected) -> tuple[DiskFacts | None, tuple[Check, ...]]:
    if target.checkpoint is None:
        return None, ()
    try:
        return time_disk(target.checkpoint), ()
    except OffloadError as error:
        return None, (Check(name="disk", value=f"{error.what}, {error.where}", cure=error.cure, exit_code=3),)


def _without_driver(device: Device) -> GpuFacts:
    """A CUDA device of which the management library tells nothing: a part of a GPU, or a container without the library."""
    silent = GpuActivity(link_generation=None, link_width=None, sm_clock_mhz=None, slowdowns=(), under_load=False)
    return GpuFacts(
        name=device.name,
        driver="unknown",
        total_bytes=device.free_bytes(),
        free_bytes=device.free_bytes(),
        holders=(),
        max_generation=None,
        max_width=None,
        card_generation=None,
        max_sm_clock_mhz=None,
        numa_node=None,
        activity=silent,
    )
