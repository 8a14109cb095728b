"""How far the conversion into a folder has come, so that one that was interrupted goes on: a file in that folder, until it is
finished.

{"schema_version": 1, "source": "<sha256>", "files": {name: {"bytes": 9, "sha256": "..."}}}
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Final

from ..errors import UsageError, reason
from .checkpoint import CONFIG_NAME, Checkpoint
from .header import parse_json_object, read_small_file
from .manifest import FileDigest, parse_digest, write_atomically

STATE_NAME: Final = "treestream.convert.json"
SCHEMA_VERSION: Final = 1
MAX_STATE_BYTES: Final = 16 * 2**20


def fingerprint(checkpoint: Checkpoint, method: str) -> str:
    """Of what is converted, and how: other names, sizes or times of its files make another."""
    stats = [(file.name, file.stat()) for file in checkpoint.files]
    files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return hashlib.sha256(json.dumps([method, files]).encode()).hexdigest()


@contextmanager
def begun(folder: Path, source: str) -> Iterator[dict[str, FileDigest]]:
    """Makes `folder`, or goes on with it, and keeps others from doing so meanwhile. Yields the files that it says are finished.
    UsageError for a folder with anything in it that is not a conversion of `source`, the fingerprint of one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise _refusal(f"cannot be made: {reason(error)}", folder, "name a folder that you may write to") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise _refusal("is being written to by another conversion", folder, "wait for that one") from error
        if not [name for name in os.listdir(folder) if not name.startswith(f".{STATE_NAME}.")]:  # written to when power failed
            write_state(folder, source, {})
        yield _read_state(folder, source)
    finally:
        os.close(descriptor)


def write_state(folder: Path, source: str, files: Mapping[str, FileDigest]) -> None:
    entries = {name: asdict(digest) for name, digest in files.items()}
    document = {"schema_version": SCHEMA_VERSION, "source": source, "files": entries}
    write_atomically(folder / STATE_NAME, json.dumps(document, indent=2) + "\n")


def _read_state(folder: Path, source: str) -> dict[str, FileDigest]:
    other = "name a folder that is empty or does not exist"
    if not os.path.lexists(folder / STATE_NAME):
        done = "holds a model" if os.path.lexists(folder / CONFIG_NAME) else "is not empty"
        raise _refusal(f"{done}, and no conversion that was interrupted", folder, other)
    try:
        state = parse_json_object(read_small_file(folder / STATE_NAME, MAX_STATE_BYTES))
        files = state.get("files")
        if state.get("schema_version") != SCHEMA_VERSION or not isinstance(files, dict):
            raise ValueError("is none of ours")
        found = {name: parse_digest(name, entry) for name, entry in files.items()}
    except (OSError, ValueError) as error:
        raise _refusal(f"has a {STATE_NAME} that {reason(error)}", folder, other) from error
    if state.get("source") != source:
        cure = "name another folder, or delete this one to begin again"
        raise _refusal("was begun with another model or in another way, or its files have changed since", folder, cure)
    return found


def _refusal(what: str, folder: Path, cure: str) -> UsageError:
    return UsageError(f"the folder {what}", where=f"--output {folder}", cure=cure)
