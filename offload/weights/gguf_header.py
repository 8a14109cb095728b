"""Reads and checks the head of a GGUF file, or of all parts of one. Believes no byte of it; needs no torch.

      0      4         8               16                  24
      | GGUF | version | tensors: u64 | key-values: u64 | key-values | tensor entries | padding | tensor bytes |

A key-value is a string, a u32 type and the value. An entry is a name, a u32 number of dimensions, these as u64 with the
innermost first, a u32 type and a u64 offset from where tensor bytes begin; offsets are aligned. Source: ggml's docs/gguf.md,
versions 2 and 3. Stricter than ggml where a file could mean two things: a key twice, or a gap between tensors.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from ..coding.gguf_types import BLOCKS, TYPE_NAMES
from ..config import counted
from .gguf_cursor import Cursor, Value
from .header import open_regular, problems_error, quoted, shape_bytes

SUFFIX: Final = ".gguf"
MAX_KEYS: Final = 2**16
MAX_TENSORS: Final = 2**16
MAX_NAME_BYTES: Final = 255
MAX_DIMENSIONS: Final = 4
MAX_MISSING_LISTED: Final = 64
DEFAULT_ALIGNMENT: Final = 32

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """One tensor on disk: `num_bytes` bytes at `offset_bytes` from the start of `path`. `type_name` is one of BLOCKS. `shape`
    is as in torch, the innermost dimension last, which whole blocks make up."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    path: Path
    offset_bytes: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """`metadata` is that of the first file, by full keys. `tensors` are those of all `files`, in the order of their bytes."""

    metadata: Mapping[str, Value]
    tensors: tuple[GgufTensor, ...]
    files: tuple[Path, ...]


def read_gguf(path: Path, *, long_arrays: bool = True) -> GgufHeader:
    """The head of the file at `path`, or, where it is one of several parts, of them all. Without `long_arrays`, those of more
    than 1,024 items, such as the vocabulary, are a LongArray each. Raises CheckpointError, which names all problems at once."""
    files = part_paths(path)
    missing = [file.name for file in files if not os.path.exists(file)]
    if missing:
        listed, more = ", ".join(missing[:MAX_MISSING_LISTED]), len(missing) - MAX_MISSING_LISTED
        problem = f"{len(missing)} of {len(files)} files are missing: {listed}" + (f" and {more} more" if more > 0 else "")
        raise problems_error([problem], where=str(path.parent), cure="download the missing files into the same folder")
    parts: list[GgufHeader] = []
    problems: list[str] = []
    for file in files:
        part, found = scan_gguf(file, long_arrays=long_arrays)
        problems += found
        parts += [part] if part is not None else []
    problems = problems or _part_problems(parts)
    if problems:
        raise problems_error(
            problems, where=str(path), cure="download this file again, or take another that was made of the model"
        )
    tensors = tuple(tensor for part in parts for tensor in part.tensors)
    return GgufHeader(metadata=parts[0].metadata, tensors=tensors, files=files)


def part_paths(path: Path) -> tuple[Path, ...]:
    """All parts of the model that `path` is, or is a part of, by their names."""
    match = _PART.fullmatch(path.name)
    if match is None or int(match[3]) == 0:
        return (path,)
    return tuple(path.with_name(f"{match[1]}-{part:05d}-of-{match[3]}.gguf") for part in range(1, int(match[3]) + 1))


def scan_gguf(path: Path, *, long_arrays: bool = True) -> tuple[GgufHeader | None, tuple[str, ...]]:
    """`read_gguf` of one file for callers that check many: (header, ()) or (None, problems). A problem is one line that begins
    with the file's name. Raises nothing."""
    try:
        descriptor, file_bytes = open_regular(path)
        try:
            header, problems = _read(Cursor(descriptor, file_bytes, long_arrays=long_arrays), path, file_bytes)
        finally:
            os.close(descriptor)
    except OSError as error:
        return None, (f"{path.name}: cannot be read: {error.strerror}",)
    except ValueError as error:
        return None, (f"{path.name}: {error}",)
    return (None if problems else header), tuple(f"{path.name}: {problem}" for problem in problems)


def _read(cursor: Cursor, path: Path, file_bytes: int) -> tuple[GgufHeader, list[str]]:
    """The header and what is wrong with its tensors. Raises ValueError and OSError."""
    if (magic := cursor.raw(4)) != b"GGUF":
        raise ValueError(f"begins with {quoted(repr(magic))} in place of 'GGUF': not a GGUF file")
    version = cursor.u32()
    if version not in (2, 3):
        kind = "a big-endian file" if version & 0xFFFF == 0 else f"version {version}"
        raise ValueError(f"is {kind}: we read versions 2 and 3, little endian")
    num_tensors, num_keys = cursor.u64(), cursor.u64()
    if num_tensors > MAX_TENSORS or num_keys > MAX_KEYS:
        raise ValueError(
            f"declares {num_tensors:,} tensors and {num_keys:,} keys, more than the {MAX_TENSORS:,} and {MAX_KEYS:,}"
            " that are allowed"
        )
    metadata = _read_metadata(cursor, num_keys)
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise ValueError(f"has the alignment {quoted(str(alignment))}, which is no power of two")
    entries = [_read_entry(cursor) for _ in range(num_tensors)]
    data_start = -(-cursor.at // alignment) * alignment
    tensors, problems = _parse_entries(entries, path, data_start, alignment)
    if not problems:
        problems = _layout_problems(tensors, data_start, alignment, file_bytes)
    return GgufHeader(metadata=MappingProxyType(metadata), tensors=tuple(tensors), files=(path,)), problems


def _read_metadata(cursor: Cursor, num_keys: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for _ in range(num_keys):
        key = cursor.string()
        if not key or not key.isprintable():
            raise ValueError(f"has a key with unprintable characters or none: {quoted(key)}")
        if key in metadata:
            raise ValueError(f"has the key {quoted(key)} twice")
        try:
            metadata[key] = cursor.value()
        except ValueError as error:
            raise ValueError(f"metadata {quoted(key)} {error}") from error
    return metadata


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """A tensor's entry as it stands in the file."""

    name: str
    dimensions: tuple[int, ...]  # the innermost first
    type_number: int
    offset_bytes: int


def _read_entry(cursor: Cursor) -> _Entry:
    name = cursor.string()
    num_dimensions = cursor.u32()
    if num_dimensions > MAX_DIMENSIONS:  # what follows could not be found
        raise ValueError(f"tensor {quoted(name)} has {num_dimensions:,} dimensions, more than {MAX_DIMENSIONS}")
    dimensions = tuple(cursor.u64() for _ in range(num_dimensions))
    return _Entry(name=name, dimensions=dimensions, type_number=cursor.u32(), offset_bytes=cursor.u64())


def _parse_entries(
    entries: Sequence[_Entry], path: Path, data_start: int, alignment: int
) -> tuple[list[GgufTensor], list[str]]:
    """(tensors in the order of their bytes, problems). Types that we do not read are one problem each, not one a tensor."""
    tensors: dict[str, GgufTensor] = {}
    problems: list[str] = []
    unread: dict[int, list[str]] = {}
    for entry in entries:
        type_name = TYPE_NAMES.get(entry.type_number, "")
        if type_name not in BLOCKS:
            unread.setdefault(entry.type_number, []).append(entry.name)
            continue
        try:
            if entry.name in tensors:
                raise ValueError("is there twice")
            tensors[entry.name] = _parse_entry(entry, type_name, path, data_start, alignment)
        except ValueError as error:
            problems.append(f"tensor {quoted(entry.name)} {error}")
    problems += [
        f"{counted(len(names), 'tensor')} such as {quoted(names[0])} of type {TYPE_NAMES.get(number, 'unknown')} ({number}),"
        f" which we do not read: we read {', '.join(BLOCKS)}"
        for number, names in unread.items()
    ]
    return sorted(tensors.values(), key=lambda tensor: (tensor.offset_bytes, tensor.num_bytes)), problems


def _parse_entry(entry: _Entry, type_name: str, path: Path, data_start: int, alignment: int) -> GgufTensor:
    """Raises ValueError whose message continues the sentence "tensor 'name' ..."."""
    if not entry.name or not entry.name.isprintable() or len(entry.name.encode()) > MAX_NAME_BYTES:
        raise ValueError(f"has a name with unprintable characters, none, or more than {MAX_NAME_BYTES} bytes")
    if any(size >= 2**63 for size in entry.dimensions):
        raise ValueError(f"has a dimension of {max(entry.dimensions):,}")
    block = BLOCKS[type_name]
    row = entry.dimensions[0] if entry.dimensions else 1
    if row % block.num_weights:
        raise ValueError(f"has rows of {row:,} weights, which blocks of {block.num_weights} ({type_name}) do not make up")
    num_bytes = shape_bytes([row // block.num_weights, *entry.dimensions[1:]], block.num_bytes)
    if entry.offset_bytes >= 2**63:
        raise ValueError(f"has the offset {entry.offset_bytes:,}")
    if entry.offset_bytes % alignment:
        raise ValueError(f"has the offset {entry.offset_bytes:,}, which is not aligned to {alignment}")
    return GgufTensor(
        name=entry.name,
        type_name=type_name,
        shape=entry.dimensions[::-1],
        path=path,
        offset_bytes=data_start + entry.offset_bytes,
        num_bytes=num_bytes,
    )


def _layout_problems(tensors: Sequence[GgufTensor], data_start: int, alignment: int, file_bytes: int) -> list[str]:
    """`tensors` are sorted by offset; they must follow each other, with nothing between them but padding."""
    problems: list[str] = []
    end, before = data_start, "the head"
    for tensor in tensors:
        if tensor.offset_bytes < end:
            problems.append(f"tensor {quoted(tensor.name)} overlaps {before} at byte {tensor.offset_bytes:,}")
        elif tensor.offset_bytes - end >= alignment:
            problems.append(f"bytes {end:,} to {tensor.offset_bytes:,} belong to no tensor")
        if tensor.offset_bytes + tensor.num_bytes >= end:
            end, before = tensor.offset_bytes + tensor.num_bytes, f"tensor {quoted(tensor.name)}"
    if tensors and end > file_bytes:
        problems.append(
            f"is truncated: its tensors end at byte {end:,} and the file has {file_bytes:,}: an interrupted download?"
        )
    return problems


def _part_problems(parts: Sequence[GgufHeader]) -> list[str]:
    """Whether all parts of one model are there, each once and in its place."""
    problems: list[str] = []
    owners: dict[str, str] = {}
    for number, part in enumerate(parts):
        file = part.files[0].name
        count, place = part.metadata.get("split.count", 1), part.metadata.get("split.no", 0)
        if count not in (len(parts), 0) or place != number:
            problems.append(
                f"{file}: says that it is part {quoted(str(place))} (from 0) of {quoted(str(count))}, and its name does not"
            )
        for tensor in part.tensors:
            if tensor.name in owners:
                problems.append(f"{file}: tensor {quoted(tensor.name)} is in {owners[tensor.name]}, too")
            owners[tensor.name] = file
    declared = parts[0].metadata.get("split.tensors.count", len(owners))
    if declared != len(owners) and not problems:
        problems.append(
            f"{parts[0].files[0].name}: declares {quoted(str(declared))} tensors in all parts, which have {len(owners):,}"
        )
    return problems
