"""What a benchmark ran on."""

import os
import platform
from pathlib import Path
from typing import Any

import psutil

from ..config import EngineSettings
from ..device import cuda


def describe_host() -> dict[str, Any]:
    """`busy` is the load of the last minute when the benchmark began, in runnable processes: not all of it ours."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": int(psutil.virtual_memory().total),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "busy": os.getloadavg()[0],
        "python": platform.python_version(),
    }


def describe_gpu() -> str | None:
    return cuda.name() if cuda.is_available() else None


def uses_gpu(settings: EngineSettings) -> bool:
    """Whether engines with these settings run on a GPU; an emulated link is the CPU device's."""
    return settings.device != "cpu" and settings.emulate_link_bytes_per_s is None and cuda.is_available()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
