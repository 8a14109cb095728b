"""Reads and checks the header of one safetensors file. Believes no byte of it; knows neither models nor indexes nor torch.

      0        8                8 + N                                    file size
      | N: u64 | JSON, N bytes  | tensor bytes, in any order, no gap      |

The checks are those of safetensors' own parser, and stricter: a key that occurs twice, a field that the format does not
have, an unprintable name and leading white space are refused. Files are read with pread, never mapped: a mapped file
that is truncated under us would end the process with SIGBUS.
"""

import json
import logging
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from ..errors import CheckpointError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

MAX_HEADER_BYTES: Final = 100_000_000  # safetensors' own limit
PREFIX_BYTES: Final = 8
MAX_LISTED: Final = 8

ITEM_BYTES: Final = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One tensor on disk: `num_bytes` bytes at `offset_bytes` from the start of `path`, aligned to nothing. `dtype_name` is as
    in safetensors."""

    name: str
    dtype_name: str
    shape: tuple[int, ...]
    path: Path
    offset_bytes: int
    num_bytes: int

    @property
    def dtype(self) -> "torch.dtype":
        from .dtypes import DTYPES  # torch, which planning does without

        return DTYPES[self.dtype_name]


def read_header(path: Path) -> tuple[TensorInfo, ...]:
    """The tensors of one file in the order of their bytes. Raises CheckpointError, which names all problems at once."""
    tensors, problems = scan_header(path)
    if problems:
        raise problems_error(problems, where=str(path), cure="download or write this file again")
    return tensors


def scan_header(path: Path) -> tuple[tuple[TensorInfo, ...], tuple[str, ...]]:
    """`read_header` for callers that check many files: returns (tensors, problems), one of them empty unless the file
    has no tensors at all. A problem is one line that begins with the file's name. Raises nothing."""
    try:
        header, file_bytes = _read_header_bytes(path)
        entries = parse_json_object(header)
        _check_metadata(entries.pop("__metadata__", {}))
    except OSError as error:
        return (), (f"{path.name}: cannot be read: {error.strerror}",)
    except ValueError as error:
        return (), (f"{path.name}: {error}",)
    data_start = PREFIX_BYTES + len(header)
    tensors: list[TensorInfo] = []
    problems: list[str] = []
    for name, entry in entries.items():
        try:
            tensors.append(_parse_entry(name, entry, path, data_start))
        except ValueError as error:
            problems.append(f"{path.name}: tensor {quoted(name)} {error}")
    if not problems:
        tensors.sort(key=lambda tensor: (tensor.offset_bytes, tensor.num_bytes))
        problems += [f"{path.name}: {problem}" for problem in _layout_problems(tensors, data_start, file_bytes)]
    return (() if problems else tuple(tensors)), tuple(problems)


def problems_error(problems: Sequence[str], *, where: str, cure: str) -> CheckpointError:
    """One three-line error for many problems. It lists the first eight; all of them go to the log at level debug."""
    for problem in problems:
        logger.debug("%s: %s", where, problem)
    listed = "; ".join(problems[:MAX_LISTED])
    rest = f"; and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
    noun = "problem" if len(problems) == 1 else "problems"
    return CheckpointError(f"{len(problems)} {noun} in the checkpoint: {listed}{rest}", where=where, cure=cure)


def quoted(name: str) -> str:
    """A name from a file, safe to print: ASCII, on one line, not endless."""
    return ascii(name if len(name) <= 120 else name[:117] + "...")


def read_small_file(path: Path, max_bytes: int) -> bytes:
    """A regular file as a whole. Raises ValueError if it is larger than `max_bytes` or is not regular, and OSError."""
    descriptor, file_bytes = open_regular(path)
    try:
        if file_bytes > max_bytes:
            raise ValueError(f"is {file_bytes:,} bytes long, more than the {max_bytes:,} that are allowed")
        return pread_exactly(descriptor, file_bytes, 0)
    finally:
        os.close(descriptor)


def parse_json_object(data: bytes) -> dict[str, object]:
    """Strict JSON: UTF-8, an object from the first byte on, no key twice at any depth, no NaN. Raises ValueError."""
    if not data.startswith(b"{"):
        raise ValueError("is not JSON: it does not begin with '{'")
    try:
        text = data.decode("utf-8")
        parsed = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 at byte {error.start:,}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError("is not JSON that we read: it is nested too deeply") from error
    assert isinstance(parsed, dict)  # it began with '{'
    return parsed


def is_count(value: object) -> bool:
    """Whether a JSON value is an integer that can be a size. Python's bool is an int and JSON's is not."""
    return type(value) is int and 0 <= value < 2**63


def _read_header_bytes(path: Path) -> tuple[bytes, int]:
    """(the JSON part, size of the file). Raises ValueError and OSError."""
    descriptor, file_bytes = open_regular(path)
    try:
        if file_bytes < PREFIX_BYTES:
            raise ValueError(f"is {file_bytes} bytes long, too short for a safetensors file: an interrupted download?")
        header_bytes = int.from_bytes(pread_exactly(descriptor, PREFIX_BYTES, 0), "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise ValueError(
                f"declares a header of {header_bytes:,} bytes, more than the {MAX_HEADER_BYTES:,} that are"
                " allowed: not a safetensors file?"
            )
        if PREFIX_BYTES + header_bytes > file_bytes:
            raise ValueError(
                f"declares a header that ends at byte {PREFIX_BYTES + header_bytes:,} but is {file_bytes:,}"
                " bytes long: an interrupted download?"
            )
        return pread_exactly(descriptor, header_bytes, PREFIX_BYTES), file_bytes
    finally:
        os.close(descriptor)


def open_regular(path: Path) -> tuple[int, int]:
    # Without O_NONBLOCK, opening a FIFO that somebody put in the folder would wait for its writer for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise ValueError("is not a regular file")
    return descriptor, status.st_size


def pread_exactly(descriptor: int, num_bytes: int, offset: int) -> bytes:
    parts: list[bytes] = []
    missing = num_bytes
    while missing:
        part = os.pread(descriptor, missing, offset + num_bytes - missing)
        if not part:
            raise ValueError(f"became shorter while it was read: {missing:,} of {num_bytes:,} bytes are gone")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    unique: dict[str, object] = {}
    for key, value in pairs:
        if key in unique:
            raise ValueError(f"has the key {quoted(key)} twice")
        unique[key] = value
    return unique


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"is not JSON: it contains {constant}")


def _check_metadata(metadata: object) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("has a __metadata__ that does not map strings to strings")


def _parse_entry(name: str, entry: object, path: Path, data_start: int) -> TensorInfo:
    """Raises ValueError whose message continues the sentence "tensor 'name' ..."."""
    if not name.isprintable():
        raise ValueError("has a name with unprintable characters")
    if not isinstance(entry, dict):
        raise ValueError("is not described by an object")
    if entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"has the fields {quoted(', '.join(entry))} in place of dtype, shape, data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise ValueError("has a dtype that is not a string")
    if dtype not in ITEM_BYTES:
        raise ValueError(f"has dtype {quoted(dtype)}, which we do not read")
    if not isinstance(shape, list) or not all(is_count(size) for size in shape):
        raise ValueError("has a shape that is not a list of counts")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_count(offset) for offset in offsets):
        raise ValueError("has data_offsets that are not two counts")
    begin, end = offsets
    num_bytes = shape_bytes(shape, ITEM_BYTES[dtype])
    if end - begin != num_bytes:
        raise ValueError(f"has {num_bytes:,} bytes by shape and dtype but the data_offsets {begin}, {end}")
    return TensorInfo(
        name=name,
        dtype_name=dtype,
        shape=tuple(shape),
        path=path,
        offset_bytes=data_start + begin,
        num_bytes=num_bytes,
    )


def shape_bytes(shape: Iterable[int], itemsize: int) -> int:
    """The product, refused as soon as it leaves 63 bits: a long list of large sizes would cost quadratic time."""
    num_bytes = itemsize
    for size in shape:
        num_bytes *= size
        if num_bytes >= 2**63:
            raise ValueError("has a shape of 2**63 bytes or more")
    return num_bytes


def _layout_problems(tensors: Sequence[TensorInfo], data_start: int, file_bytes: int) -> list[str]:
    """`tensors` are sorted by offset; together they must cover the data part exactly once."""
    problems: list[str] = []
    end = data_start
    before = "the header"
    for tensor in tensors:
        if tensor.offset_bytes < end:
            problems.append(f"tensor {quoted(tensor.name)} overlaps {before} at byte {tensor.offset_bytes:,}")
        elif tensor.offset_bytes > end:
            problems.append(f"bytes {end:,} to {tensor.offset_bytes:,} belong to no tensor")
        if tensor.offset_bytes + tensor.num_bytes >= end:
            end, before = tensor.offset_bytes + tensor.num_bytes, f"tensor {quoted(tensor.name)}"
    if end > file_bytes:
        problems.append(
            f"is truncated: the header declares {end:,} bytes and the file has {file_bytes:,}: an interrupted download?"
        )
    elif end < file_bytes:
        problems.append(f"has {file_bytes - end:,} bytes after its last tensor: not written by safetensors")
    return problems
