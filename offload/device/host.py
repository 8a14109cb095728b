"""Host memory that is ours: one anonymous mapping of exact size, and what the machine has left.

torch's pinned allocator rounds every request up to a power of two (a 1632 MiB layer takes 2048), hence a mapping of our own.
"""

import contextlib
import ctypes
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import torch

from ..config import bytes_text
from ..errors import HostMemoryError

_MAX_TOUCH_THREADS = 16
_MAX_MOVE_THREADS = 8  # the other cores are left to those who compute meanwhile
_UNLIMITED_BYTES = 2**60  # the first version of control groups says "no limit" with a number near 2**63
_CGROUP_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


class HostMapping:
    """Anonymous private memory, page aligned, not rounded. Pageable; a device may register it. HostMemoryError when
    refused."""

    def __init__(self, num_bytes: int) -> None:
        self.pinned_bytes = 0
        self.tensor = torch.empty(0, dtype=torch.uint8)
        if num_bytes:
            try:
                mapping = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            except (OSError, OverflowError) as error:
                raise HostMemoryError(
                    f"the system refused {bytes_text(num_bytes)} of host memory: {error}",
                    where=f"host memory, {bytes_text(available_bytes())} available",
                    cure="lower --host-memory or --max-context, or free memory",
                ) from error
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with contextlib.suppress(OSError):  # a kernel built without them says EINVAL
                    mapping.madvise(mmap.MADV_HUGEPAGE)
            # The tensor owns the mapping: the memory goes when the last view goes.
            self.tensor = torch.frombuffer(mapping, dtype=torch.uint8)

    def touch(self) -> None:
        """Fault all pages in, by several threads: registering touched memory is several times faster."""
        _by_threads(_MAX_TOUCH_THREADS, self.tensor.numel(), lambda piece: zero(self.tensor[piece]))

    def close(self) -> None:
        self.tensor = torch.empty(0, dtype=torch.uint8)


def zero(tensor: torch.Tensor) -> None:
    """Write zeros without the GIL."""
    ctypes.memset(tensor.data_ptr(), 0, tensor.numel())


def move(dst: torch.Tensor, src: torch.Tensor) -> None:
    """Copy uint8 host memory without the GIL and on the calling thread only, so that it overlaps with compute."""
    assert dst.numel() == src.numel()
    ctypes.memmove(dst.data_ptr(), src.data_ptr(), src.numel())


def move_by_threads(dst: torch.Tensor, src: torch.Tensor) -> None:
    """`move` by several threads, as one alone is slower than a link."""
    _by_threads(_MAX_MOVE_THREADS, src.numel(), lambda piece: move(dst[piece], src[piece]))


def _by_threads(max_threads: int, num_bytes: int, work: Callable[[slice], None]) -> None:
    """`work` on pieces that together are [0, num_bytes), one for each thread."""
    num_threads = min(len(os.sched_getaffinity(0)), max_threads)
    step = max(-(-num_bytes // num_threads), 1)
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(work, (slice(start, start + step) for start in range(0, num_bytes, step))))


def available_bytes() -> int:
    """Host memory this process may still take: the lesser of what the machine and its control group have left."""
    available = int(psutil.virtual_memory().available)
    group = cgroup_memory()
    return available if group is None else min(available, max(group[0] - group[1], 0))


def cgroup_memory() -> tuple[int, int] | None:
    """(limit, usage) of this process's control group in bytes; None where nothing limits it."""
    for limit, usage in _CGROUP_LIMITS:
        try:
            limit_bytes, usage_bytes = int(Path(limit).read_text()), int(Path(usage).read_text())
        except (OSError, ValueError):  # no such group, or "max"
            continue
        if limit_bytes < _UNLIMITED_BYTES:
            return limit_bytes, usage_bytes
    return None
