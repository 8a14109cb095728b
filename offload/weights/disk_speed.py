"""How fast a checkpoint's files are read, past the page cache where the file system allows it."""

import contextlib
import time
from dataclasses import dataclass

import torch

from .checkpoint import Checkpoint
from .reader import ReadJob, TensorReader


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSpeed:
    """`is_direct`: the page cache was passed by."""

    read_bytes: int
    read_s: float
    is_direct: bool


def measure_disk(checkpoint: Checkpoint, limit_s: float, limit_bytes: int) -> DiskSpeed:
    """Reads tensors in the order of the files until either limit is over. DeviceError when the disk fails."""
    tensors = sorted(checkpoint.tensors.values(), key=lambda tensor: (tensor.path, tensor.offset_bytes))
    buffer = torch.empty(max(tensor.num_bytes for tensor in tensors), dtype=torch.uint8)
    read_bytes = 0
    start_s = time.monotonic()

    def count(num_bytes: int) -> None:
        nonlocal read_bytes
        read_bytes += num_bytes
        if read_bytes >= limit_bytes or time.monotonic() - start_s >= limit_s:
            raise _Enough

    with TensorReader(checkpoint) as reader, contextlib.suppress(_Enough):
        is_direct = reader.num_direct_files > 0
        for tensor in tensors:
            destination = buffer[: tensor.num_bytes].view(tensor.dtype).view(tensor.shape)
            reader.read([ReadJob(tensor=tensor, destination=destination)], count)
    return DiskSpeed(read_bytes=read_bytes, read_s=time.monotonic() - start_s, is_direct=is_direct)


class _Enough(Exception):
    """Ends a reading that has lasted long enough; the reader stops its threads."""
