"""Host memory that is ours: one anonymous mapping of exact size, and what the machine has left.

torch's pinned allocator rounds every request up to a power of two (a 1632 MiB layer takes 2048), hence a mapping of our own.
"""

import contextlib
import ctypes
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import psutil
import torch

from ..config import bytes_text
from ..errors import HostMemoryError
from .cgroup import cgroup_memory

_MAX_TOUCH_THREADS = 16
_MAX_MOVE_THREADS = 8  # the other cores are left to those who compute meanwhile


class HostMapping:
    """Anonymous private memory, page aligned, not rounded. Pageable; a device may register it. HostMemoryError when refused.

    Children of fork get it if `inherited`. What a device reads must not be: where a child has a page, too, writing to it gives
    this process another one, and the device goes on reading the old.
    """

    def __init__(self, num_bytes: int, *, inherited: bool = True) -> None:
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
            _advise(mapping, "MADV_HUGEPAGE")
            _advise(mapping, "MADV_DONTDUMP")  # a core file has no use for weights
            if not inherited:
                _advise(mapping, "MADV_DONTFORK")
            # The tensor owns the mapping: the memory goes when the last view goes.
            self.tensor = torch.frombuffer(mapping, dtype=torch.uint8)

    def touch(self, cpus: frozenset[int] | None = None) -> None:
        """Fault all pages in, by several threads: registering touched memory is several times faster. A page comes to lie near
        the CPU that touches it first: one of `cpus`, or any."""
        _by_threads(_MAX_TOUCH_THREADS, self.tensor.numel(), lambda piece: zero(self.tensor[piece]), cpus)

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


def _by_threads(max_threads: int, num_bytes: int, work: Callable[[slice], None], cpus: frozenset[int] | None = None) -> None:
    """`work` on pieces that together are [0, num_bytes), one for each thread, which run on `cpus` only, or on any."""
    num_threads = min(len(cpus or os.sched_getaffinity(0)), max_threads)
    step = max(-(-num_bytes // num_threads), 1)
    with ThreadPoolExecutor(num_threads, initializer=_run_on, initargs=(cpus,)) as pool:
        list(pool.map(work, (slice(start, start + step) for start in range(0, num_bytes, step))))


def _run_on(cpus: frozenset[int] | None) -> None:
    if cpus:
        with contextlib.suppress(OSError):  # they were taken away meanwhile
            os.sched_setaffinity(0, cpus)  # of the calling thread


def available_bytes() -> int:
    """Host memory this process may still take: the lesser of what the machine and its control groups have left."""
    available = int(psutil.virtual_memory().available)
    group = cgroup_memory()
    return available if group is None else min(available, group.left_bytes)


def _advise(mapping: mmap.mmap, advice: str) -> None:
    if hasattr(mmap, advice):  # Linux's
        with contextlib.suppress(OSError):  # a kernel built without says EINVAL
            mapping.madvise(getattr(mmap, advice))
