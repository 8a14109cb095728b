"""A file that is written from front to back, in whole blocks past the page cache: what is written once and read much later does
not push out what is in use, and a processor does not copy it twice. Knows no format."""

import errno
import fcntl
import mmap
import os
from pathlib import Path
from typing import Final

from .reader import BLOCK_BYTES

BUFFER_BYTES: Final = 16 * 2**20
_DIRECT: Final = getattr(os, "O_DIRECT", 0)


class BlockFile:
    """`path`, new or overwritten, whose first `head_bytes`, whole blocks, are written last. Holds 16 MiB. Where the file system
    refuses that, it is written through the page cache. OSError for whatever goes wrong."""

    def __init__(self, path: Path, head_bytes: int) -> None:
        assert head_bytes % BLOCK_BYTES == 0
        self._descriptor, self.is_direct = _open(path)
        self._buffer = mmap.mmap(-1, BUFFER_BYTES)  # which begins with a page
        self._held, self._end = 0, head_bytes  # bytes in the buffer, which go to the end of the file

    def write(self, data: memoryview) -> None:
        """Bytes, at the end."""
        while data:
            count = min(len(data), BUFFER_BYTES - self._held)
            self._buffer[self._held : self._held + count] = data[:count]
            self._held, data = self._held + count, data[count:]
            if self._held == BUFFER_BYTES:
                self._flush()

    def finish(self, head: bytes) -> None:
        """Writes `head`, of as many bytes as were announced. All is on the disk then, and not only on its way there."""
        num_bytes = self._end + self._held
        self._flush()
        self._end = 0
        self.write(memoryview(head))
        self._flush()
        os.ftruncate(self._descriptor, num_bytes)  # of the last block
        os.fsync(self._descriptor)

    def close(self) -> None:
        """A second call does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
            self._buffer.close()

    def _flush(self) -> None:
        whole = -(-self._held // BLOCK_BYTES) * BLOCK_BYTES
        with memoryview(self._buffer) as view:
            done = 0
            while done < whole:
                done += self._write_some(view[done:whole], self._end + done)
        self._end, self._held = self._end + whole, 0

    def _write_some(self, view: memoryview, offset: int) -> int:
        try:
            return os.pwrite(self._descriptor, view, offset)
        except OSError as error:
            if error.errno != errno.EINVAL or not self.is_direct:
                raise
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)  # some file systems take the flag and then cannot write
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
        self.is_direct = False
        return os.pwrite(self._descriptor, view, offset)


def _open(path: Path) -> tuple[int, bool]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    try:
        return os.open(path, flags | _DIRECT, 0o666), bool(_DIRECT)
    except OSError:  # of the file system, or an error that the next attempt has, too
        return os.open(path, flags, 0o666), False
