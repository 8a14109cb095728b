"""What the driver's management library tells of a GPU. The only file that knows NVML; every question may go unanswered."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any, TypeVar

from ..device.numa import node_of
from .facts import GpuActivity, GpuFacts, Holder

T = TypeVar("T")

# nvmlClocksEventReasons in nvml.h. Power capping (4) is how GPUs are run, so it is not among them.
SLOWDOWNS = {0x08: "hardware slowdown", 0x20: "software thermal limit", 0x40: "hardware thermal limit", 0x80: "power brake"}


@contextmanager
def open_nvml() -> Iterator[Any]:
    """The library's module, ready for questions; None where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def find_gpu(nvml: Any, uuid: str | None) -> Any:
    """The handle of the GPU with this `uuid`, or of the first GPU if `uuid` is None. None where there is no such GPU."""
    if uuid is not None:
        return _ask(nvml, nvml.nvmlDeviceGetHandleByUUID, uuid)
    return _ask(nvml, nvml.nvmlDeviceGetHandleByIndex, 0)


def read_gpu(nvml: Any, gpu: Any) -> GpuFacts | None:
    """The GPU as it is now; its activity is that of an idle card unless someone else uses it. None where not even its memory
    is told, as of a part of a GPU."""
    memory = _ask(nvml, nvml.nvmlDeviceGetMemoryInfo, gpu)
    if memory is None:
        return None
    pci = _ask(nvml, nvml.nvmlDeviceGetPciInfo, gpu)
    return GpuFacts(
        name=str(_ask(nvml, nvml.nvmlDeviceGetName, gpu) or "a GPU"),
        driver=str(_ask(nvml, nvml.nvmlSystemGetDriverVersion) or "unknown"),
        total_bytes=int(memory.total),
        free_bytes=int(memory.free),
        holders=_holders(nvml, gpu),
        max_generation=_ask(nvml, nvml.nvmlDeviceGetMaxPcieLinkGeneration, gpu),
        max_width=_ask(nvml, nvml.nvmlDeviceGetMaxPcieLinkWidth, gpu),
        card_generation=_ask(nvml, nvml.nvmlDeviceGetGpuMaxPcieLinkGeneration, gpu),
        max_sm_clock_mhz=_ask(nvml, nvml.nvmlDeviceGetMaxClockInfo, gpu, nvml.NVML_CLOCK_SM),
        numa_node=None if pci is None else node_of(str(pci.busId)),
        activity=read_activity(nvml, gpu, under_load=False),
    )


def read_activity(nvml: Any, gpu: Any, *, under_load: bool) -> GpuActivity:
    reasons = _ask(nvml, nvml.nvmlDeviceGetCurrentClocksThrottleReasons, gpu) or 0
    return GpuActivity(
        link_generation=_ask(nvml, nvml.nvmlDeviceGetCurrPcieLinkGeneration, gpu),
        link_width=_ask(nvml, nvml.nvmlDeviceGetCurrPcieLinkWidth, gpu),
        sm_clock_mhz=_ask(nvml, nvml.nvmlDeviceGetClockInfo, gpu, nvml.NVML_CLOCK_SM),
        slowdowns=tuple(name for bit, name in SLOWDOWNS.items() if reasons & bit),
        under_load=under_load,
    )


def _holders(nvml: Any, gpu: Any) -> tuple[Holder, ...]:
    """Other processes, largest first."""
    found: dict[int, Holder] = {}
    for ask in (nvml.nvmlDeviceGetComputeRunningProcesses, nvml.nvmlDeviceGetGraphicsRunningProcesses):
        for process in _ask(nvml, ask, gpu) or ():
            name = PurePath(str(_ask(nvml, nvml.nvmlSystemGetProcessName, process.pid) or "unknown")).name
            found[process.pid] = Holder(pid=process.pid, name=name, num_bytes=process.usedGpuMemory)
    found.pop(os.getpid(), None)
    return tuple(sorted(found.values(), key=lambda holder: -(holder.num_bytes or 0)))


def _ask(nvml: Any, call: Callable[..., T], *arguments: object) -> T | None:
    try:
        return call(*arguments)
    except nvml.NVMLError:
        return None
