"""Where the tensors of a model come from: the files of a checkpoint, or anything else that can fill memory by name."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

import torch

from .checkpoint import Checkpoint
from .reader import ReadJob, TensorReader

Destinations = Mapping[str, torch.Tensor]


class TensorFeed(Protocol):
    """An open source. One feed serves one thread."""

    def fill(self, destinations: Destinations, progress: Callable[[int], None] | None = None) -> None:
        """Write the tensors named into memory: contiguous, on the CPU, of their shapes, of their dtype or of another if both
        are float. `progress` gets the source's bytes since its last call."""

    def __enter__(self) -> "TensorFeed": ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


class TensorSource(Protocol):
    @property
    def equal_layers(self) -> frozenset[int]:
        """Layers that all have the same bytes. In host memory that is too small, some borrow another's; no disk holds them."""

    def num_bytes(self, name: str) -> int:
        """Size of a tensor where it comes from."""

    def dtype(self, name: str) -> torch.dtype: ...

    def open(self) -> TensorFeed: ...


@dataclass(frozen=True, slots=True)
class CheckpointSource:
    """A TensorSource over safetensors files."""

    checkpoint: Checkpoint
    equal_layers: frozenset[int] = frozenset()

    def num_bytes(self, name: str) -> int:
        return self.checkpoint.tensors[name].num_bytes

    def dtype(self, name: str) -> torch.dtype:
        return self.checkpoint.tensors[name].dtype

    def open(self) -> "CheckpointFeed":
        return CheckpointFeed(self.checkpoint)


class CheckpointFeed(TensorReader):
    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self._tensors = checkpoint.tensors

    def __enter__(self) -> "CheckpointFeed":
        return self

    def fill(self, destinations: Destinations, progress: Callable[[int], None] | None = None) -> None:
        """Errors as in TensorReader.read."""
        jobs = [ReadJob(tensor=self._tensors[name], destination=view) for name, view in destinations.items()]
        self.read(jobs, progress)


def borrowed_layers(host: Collection[int], equal: frozenset[int], room: int) -> dict[int, int]:
    """Which of the `host` layers borrow another's memory, {borrower: owner}, so that at most `room` layers are held. Only
    layers in `equal` borrow, and no more of them than must; fewer layers than asked for when that is all there are."""
    candidates = sorted(equal.intersection(host))
    too_many = min(max(len(host) - room, 0), max(len(candidates) - 1, 0))
    return dict.fromkeys(candidates[len(candidates) - too_many :], candidates[0]) if too_many else {}
