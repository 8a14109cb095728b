"""Tensors one after another, the next of which is read while one is worked on."""

import math
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import cycle

import torch

from .source import TensorFeed


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class ReadAhead:
    """Over `feed`, which nobody else may use meanwhile. Holds memory for two tensors, as large as the largest so far, and a
    thread, until `close`."""

    def __init__(self, feed: TensorFeed) -> None:
        self._feed = feed
        self._memories = [torch.empty(0, dtype=torch.uint8) for _ in range(2)]
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def each(
        self, wanted: Iterable[Wanted], progress: Callable[[int], None] | None = None
    ) -> Generator[tuple[Wanted, torch.Tensor], None, None]:
        """Each of `wanted` with its tensor, which is there until the next is asked for. `progress` gets its bytes. Who asks no
        more closes it, so that it reads no more."""
        queue, memories = iter(wanted), cycle(range(2))
        pending = self._begin(next(queue, None), next(memories))
        try:
            while pending is not None:
                read, pending = pending, None
                try:
                    one, tensor = read.result()
                finally:
                    del read  # its error knows this frame: in a circle, all that a caller holds would wait for the collector
                pending = self._begin(next(queue, None), next(memories))
                if progress is not None:
                    progress(one.num_bytes)
                yield one, tensor
        finally:
            if pending is not None:
                wait([pending])

    def _begin(self, wanted: Wanted | None, memory: int) -> "Future[tuple[Wanted, torch.Tensor]] | None":
        return self._pool.submit(self._read, wanted, memory) if wanted is not None else None

    def _read(self, wanted: Wanted, memory: int) -> tuple[Wanted, torch.Tensor]:
        if self._memories[memory].numel() < wanted.num_bytes:
            self._memories[memory] = torch.empty(0, dtype=torch.uint8)  # what was there goes first
            self._memories[memory] = torch.empty(wanted.num_bytes, dtype=torch.uint8)
        tensor = self._memories[memory][: wanted.num_bytes].view(wanted.dtype).view(wanted.shape)
        self._feed.fill({wanted.name: tensor})
        return wanted, tensor
