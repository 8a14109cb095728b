"""Reads tensors from a checkpoint's files into memory that the caller owns, in several threads, past the page cache.

Knows offsets, bytes and dtypes; neither models nor devices. Reads with pread and never maps a file: a disk that fails
is then an exception of the call that read from it, not a signal. A tensor is read in pieces:

    file          |---------|---------|---------|---------|   blocks of 4096 bytes
    piece              [begin ......... end)                   at most `piece_bytes`
    direct        |================= block buffer =========|   whole blocks, then the piece is copied to its place
    buffered           [=== in place ==)
"""

import ctypes
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Final

import torch

from ..errors import CheckpointError, DeviceError
from .checkpoint import Checkpoint
from .header import TensorInfo, quoted

PIECE_BYTES: Final = 16 * 2**20
BLOCK_BYTES: Final = 4096  # O_DIRECT's alignment; no disk that we know of has larger logical blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadJob:
    """`tensor` is to be read into `destination`: contiguous, on the CPU, of the tensor's shape. Its dtype may differ if
    both are floating: the values are then converted as `Tensor.copy_` does."""

    tensor: TensorInfo
    destination: torch.Tensor


class TensorReader:
    """Holds every file of a checkpoint open, and the threads that read them, until `close`.

    Peak memory beyond the destinations: `num_threads * (piece_bytes + 8 KiB)`, 64 MiB by default. One reader serves one
    calling thread at a time; a thread that reads ahead has a reader of its own.

    `direct` reads with O_DIRECT: the page cache does not compete with the weights for memory, and files that are in it
    already gain nothing. A file whose file system refuses O_DIRECT is read buffered.
    """

    def __init__(
        self, checkpoint: Checkpoint, *, num_threads: int = 4, direct: bool = True, piece_bytes: int = PIECE_BYTES
    ) -> None:
        """`piece_bytes` is a positive multiple of 4096. Raises DeviceError if a file cannot be opened any more."""
        if num_threads < 1 or piece_bytes < 1 or piece_bytes % BLOCK_BYTES:
            raise ValueError(f"num_threads {num_threads} or piece_bytes {piece_bytes} is out of range")
        self._piece_bytes = piece_bytes
        self._block_buffers: SimpleQueue[_BlockBuffer] = SimpleQueue()
        for _ in range(num_threads):
            self._block_buffers.put(_BlockBuffer(piece_bytes + 2 * BLOCK_BYTES))
        self._files = _open_files(checkpoint.files, direct)
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="tensor-reader")

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Waits for the threads and closes the files. A second call does nothing."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        while self._files:
            os.close(self._files.popitem()[1].descriptor)

    @property
    def num_direct_files(self) -> int:
        """How many of the files are read with O_DIRECT."""
        return sum(file.is_direct for file in self._files.values())

    def read(self, jobs: Sequence[ReadJob], progress: Callable[[int], None] | None = None) -> None:
        """Fills all destinations, which must not overlap. `progress` gets the bytes read since its last call, in the
        calling thread; the sum over a read is the sum of the tensors' bytes.

        Raises CheckpointError for a dtype that cannot be converted, before it reads anything, and DeviceError when the
        disk fails or a file has become shorter. After any exception, one of `progress` or a KeyboardInterrupt included,
        no thread writes any more, the destinations hold nothing of use and the reader can be used again.
        """
        pieces = [piece for job in jobs for piece in self._pieces(job)]
        pieces.sort(key=lambda piece: (piece.file.path, piece.offset_bytes))  # spinning and network disks read ahead
        futures: list[Future[int]] = []
        try:
            futures += [self._pool.submit(self._read_piece, piece) for piece in pieces]
            for future in as_completed(futures):
                num_bytes = future.result()
                if progress is not None:
                    progress(num_bytes)
        finally:
            for future in futures:
                future.cancel()
            wait(futures)

    def _pieces(self, job: ReadJob) -> Iterator["_Piece"]:
        _check_job(job)
        for begin in range(0, job.tensor.num_bytes, self._piece_bytes):
            num_bytes = min(self._piece_bytes, job.tensor.num_bytes - begin)
            yield _Piece(file=self._files[job.tensor.path], job=job, begin=begin, num_bytes=num_bytes)

    def _read_piece(self, piece: "_Piece") -> int:
        if not piece.file.is_direct and not piece.converts:
            _fill(piece.file, _view_memory(piece.address, piece.num_bytes), piece.offset_bytes, piece.num_bytes)
            return piece.num_bytes
        blocks = self._block_buffers.get()
        try:
            lead = piece.offset_bytes % piece.file.block_bytes
            _fill(piece.file, blocks.view, piece.offset_bytes - lead, lead + piece.num_bytes)
            if piece.converts:
                _convert(blocks, lead, piece)
            else:
                # ctypes lets go of the GIL for this, a memoryview assignment does not.
                ctypes.memmove(piece.address, blocks.address + lead, piece.num_bytes)
        finally:
            self._block_buffers.put(blocks)
        return piece.num_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    path: Path
    descriptor: int
    is_direct: bool

    @property
    def block_bytes(self) -> int:
        return BLOCK_BYTES if self.is_direct else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """`num_bytes` bytes from byte `begin` of a tensor. Holds the job, so that the memory outlives the reading of it."""

    file: _File
    job: ReadJob
    begin: int
    num_bytes: int

    @property
    def offset_bytes(self) -> int:
        return self.job.tensor.offset_bytes + self.begin

    @property
    def converts(self) -> bool:
        return self.job.tensor.dtype != self.job.destination.dtype

    @property
    def address(self) -> int:
        return self.job.destination.data_ptr() + self.begin


class _BlockBuffer:
    """Page-aligned memory of one thread. The pages exist from their first use on."""

    def __init__(self, num_bytes: int) -> None:
        self.memory = mmap.mmap(-1, num_bytes)
        self.view = memoryview(self.memory)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))


def _check_job(job: ReadJob) -> None:
    tensor, destination = job.tensor, job.destination
    if destination.device.type != "cpu" or not destination.is_contiguous() or destination.shape != tensor.shape:
        # Not an assert: the reader writes to addresses, and a wrong one must not depend on python -O.
        raise ValueError(f"{quoted(tensor.name)} {tensor.shape} cannot be read into {tuple(destination.shape)}")
    both_floating = tensor.dtype.is_floating_point and destination.dtype.is_floating_point
    if tensor.dtype != destination.dtype and not both_floating:
        raise CheckpointError(
            f"tensor {quoted(tensor.name)} is {tensor.dtype}, which cannot be converted to {destination.dtype}",
            where=str(tensor.path),
            cure="use a checkpoint in float16, bfloat16 or float32",
        )


def _open_files(paths: Iterable[Path], direct: bool) -> dict[Path, _File]:
    files: dict[Path, _File] = {}
    try:
        for path in paths:
            files[path] = (_open_direct(path) if direct else None) or _open_buffered(path)
    except BaseException:
        for file in files.values():
            os.close(file.descriptor)
        raise
    return files


def _open_buffered(path: Path) -> _File:
    try:
        return _File(path=path, descriptor=os.open(path, os.O_RDONLY | os.O_CLOEXEC), is_direct=False)
    except OSError as error:
        raise _disk_error(path, 0, error.strerror) from error


def _open_direct(path: Path) -> _File | None:
    """None where O_DIRECT does not exist, is refused, or is accepted and then cannot read, as on some file systems."""
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        return None  # an error that has nothing to do with O_DIRECT comes again when the file is opened buffered
    try:
        os.preadv(descriptor, [mmap.mmap(-1, BLOCK_BYTES)], 0)
    except OSError:
        os.close(descriptor)
        return None
    return _File(path=path, descriptor=descriptor, is_direct=True)


def _view_memory(address: int, num_bytes: int) -> memoryview:
    return memoryview((ctypes.c_char * num_bytes).from_address(address)).cast("B")


def _fill(file: _File, view: memoryview, offset: int, num_bytes: int) -> None:
    """Reads at least `num_bytes` bytes from `offset` into the start of `view`, more if it is larger. A short read is
    continued from the last whole block, so that offset and address stay aligned."""
    needed = -(-num_bytes // file.block_bytes) * file.block_bytes
    done = 0
    while done < num_bytes:
        begin = done // file.block_bytes * file.block_bytes
        try:
            count = os.preadv(file.descriptor, [view[begin:needed]], offset + begin)
        except OSError as error:
            raise _disk_error(file.path, offset + begin, error.strerror) from error
        if begin + count <= done:
            raise _disk_error(file.path, offset + done, "the file has become shorter")
        done = begin + count


def _convert(blocks: _BlockBuffer, lead: int, piece: _Piece) -> None:
    """Writes the piece, which begins at byte `lead` of the buffer, to its place in the destination's dtype."""
    if lead:
        # A header may leave tensors at odd offsets, and torch reads from aligned addresses only.
        ctypes.memmove(blocks.address, blocks.address + lead, piece.num_bytes)
    dtype = piece.job.tensor.dtype
    source = torch.frombuffer(blocks.memory, dtype=dtype, count=piece.num_bytes // dtype.itemsize)
    # A thread starts without the caller's inference mode, outside of which inference tensors refuse to be written.
    with torch.inference_mode():
        piece.job.destination.view(-1).narrow(0, piece.begin // dtype.itemsize, source.numel()).copy_(source)


def _disk_error(path: Path, offset: int, reason: str | None) -> DeviceError:
    return DeviceError(
        f"cannot read the weights: {reason or 'unknown error'}",
        where=f"{path} at byte {offset:,}",
        cure="check the disk and the kernel's log; if the file has changed, start again",
    )
