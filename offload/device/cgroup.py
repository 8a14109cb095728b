"""What the control groups of this process leave it of host memory, read from the files of both versions of them.

A group's use counts page cache: files that somebody read or wrote, such as a checkpoint that was just downloaded. The kernel
gives that back before it refuses memory to anyone, so it is not used up.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")  # a line for each hierarchy: number:controllers:path
_UNLIMITED_BYTES = 2**60  # the first version says "no limit" with a number near 2**63


@dataclass(frozen=True, slots=True)
class GroupMemory:
    """A group that has a limit, and what is left below it once page cache has been given back."""

    limit_bytes: int
    left_bytes: int


@dataclass(frozen=True, slots=True)
class _Files:
    """Where one version of control groups has what. Files above `high` slow a group down as much as a limit would."""

    folder: str
    controller: str  # as /proc/self/cgroup names it
    limits: tuple[str, ...]
    used: str
    reclaimable: tuple[str, ...]  # lines of memory.stat. Memory that is shared or in tmpfs is in none of them


_VERSIONS = (
    _Files(
        folder="",
        controller="",
        limits=("memory.max", "memory.high"),
        used="memory.current",
        reclaimable=("inactive_file", "active_file", "slab_reclaimable"),
    ),
    _Files(
        folder="memory",
        controller="memory",
        limits=("memory.limit_in_bytes",),
        used="memory.usage_in_bytes",
        reclaimable=("total_inactive_file", "total_active_file"),
    ),
)


def cgroup_memory() -> GroupMemory | None:
    """The group that leaves this process the least: its own, or one that it lies in. None where nothing is limited."""
    groups = [group for files in _VERSIONS for folder in _folders(files) if (group := _read(folder, files)) is not None]
    return min(groups, key=lambda group: group.left_bytes, default=None)


def _folders(files: _Files) -> Iterator[Path]:
    """The process's own group and all above it, as far as they can be seen. A container may see its own as the root, under a
    path that is the host's, or that begins above the root."""
    root = ROOT / files.folder
    path = PurePosixPath(_own_path(files.controller))
    if path.is_absolute() and ".." not in path.parts:
        for below in (path, *path.parents):
            yield root / below.relative_to("/")
    else:
        yield root


def _own_path(controller: str) -> str:
    lines = [line.split(":", 2) for line in _text(OWN_GROUPS).splitlines()]
    return next((line[2] for line in lines if len(line) == 3 and controller in line[1].split(",")), "")


def _read(folder: Path, files: _Files) -> GroupMemory | None:
    used_bytes = _number(_text(folder / files.used))
    found = (_number(_text(folder / name)) for name in files.limits)
    limits = [limit for limit in found if limit is not None and limit < _UNLIMITED_BYTES]
    if used_bytes is None or not limits:
        return None
    stat = dict(line.split(maxsplit=1) for line in _text(folder / "memory.stat").splitlines() if " " in line)
    reclaimable_bytes = sum(_number(stat.get(name, "")) or 0 for name in files.reclaimable)
    left_bytes = min(limits) - max(used_bytes - reclaimable_bytes, 0)
    return GroupMemory(min(limits), max(left_bytes, 0))


def _number(text: str) -> int | None:
    """None for "max", and for a file that is not there."""
    text = text.strip()
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""
