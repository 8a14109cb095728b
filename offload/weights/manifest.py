"""SHA-256 of every weight file, written once and compared later: safetensors itself does not notice a flipped bit.

{"schema_version": 1, "files": {"model-00001-of-00015.safetensors": {"bytes": 9852591960, "sha256": "..."}}}
"""

import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from ..errors import DeviceError, IntegrityError, ModelError, UsageError
from .checkpoint import Checkpoint
from .header import is_count, parse_json_object, quoted, read_small_file

MANIFEST_NAME: Final = "treestream.manifest.json"
SCHEMA_VERSION: Final = 1
MAX_MANIFEST_BYTES: Final = 16 * 2**20
CHUNK_BYTES: Final = 4 * 2**20
NUM_THREADS: Final = 4

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileDigest:
    """`bytes` is the file's size, `sha256` its lower-case hex digest. The names are those of the JSON."""

    bytes: int
    sha256: str


def manifest_path(model: Path) -> Path:
    """Where the manifest of a model is: in its folder, or beside its file."""
    return model.with_name(f"{model.name}.{MANIFEST_NAME}") if model.is_file() else model / MANIFEST_NAME


def write_manifest(checkpoint: Checkpoint, path: Path, progress: Progress | None = None) -> None:
    """Reads all files of the checkpoint and writes `path` in one step: a reader sees the old contents or the new.

    `progress` gets the bytes read since its last call, from several threads but never from two at once. Raises
    DeviceError when a file cannot be read and UsageError when `path` cannot be written.
    """
    digests = digest_files(checkpoint.files, progress)
    try:
        write_atomically(path, manifest_text(digests))
    except OSError as error:
        raise UsageError(
            f"cannot write the manifest: {error.strerror}",
            where=str(path),
            cure="name a file in a folder that is writable and has space",
        ) from error


def manifest_text(digests: Mapping[str, FileDigest]) -> str:
    """Of a manifest of files by name."""
    files = {name: asdict(digest) for name, digest in digests.items()}
    return json.dumps({"schema_version": SCHEMA_VERSION, "files": files}, indent=2, sort_keys=True) + "\n"


def check_manifest(checkpoint: Checkpoint, path: Path, progress: Progress | None = None) -> None:
    """Reads all files of the checkpoint and compares them with `path`. `progress` as in `write_manifest`; a file of the
    wrong size is not read.

    Raises IntegrityError, which names all differences, ModelError for a manifest that is missing or malformed, and
    DeviceError when a file cannot be read.
    """
    expected = _read_manifest(path)
    files = {file.name: file for file in checkpoint.files}
    problems = [f"{quoted(name)} is missing" for name in expected.keys() - files.keys()]
    problems += [f"{quoted(name)} is not in the manifest" for name in files.keys() - expected.keys()]
    sizes = {name: _file_bytes(file) for name, file in files.items() if name in expected}
    problems += [
        f"{quoted(name)} has {size:,} bytes, the manifest says {expected[name].bytes:,}"
        for name, size in sizes.items()
        if size != expected[name].bytes
    ]
    comparable = [files[name] for name, size in sizes.items() if size == expected[name].bytes]
    problems += [
        f"{quoted(name)} has other contents than when the manifest was written"
        for name, digest in digest_files(comparable, progress).items()
        if digest != expected[name]
    ]
    if problems:
        raise IntegrityError(
            f"{len(problems)} of {len(expected.keys() | files.keys())} files differ: {'; '.join(sorted(problems))}",
            where=f"{checkpoint.folder}, compared with {path}",
            cure="download these files again; if you changed them on purpose, write a new manifest",
        )


def _read_manifest(path: Path) -> dict[str, FileDigest]:
    try:
        manifest = parse_json_object(read_small_file(path, MAX_MANIFEST_BYTES))
        version = manifest.get("schema_version")
        if not is_count(version) or version != SCHEMA_VERSION:
            raise ValueError(f"does not have schema_version {SCHEMA_VERSION}")
        files = manifest.get("files")
        if not isinstance(files, dict):
            raise ValueError("has no files")
        return {name: parse_digest(name, entry) for name, entry in files.items()}
    except (OSError, ValueError) as error:
        reason = f"cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
        raise ModelError(
            f"the manifest {reason}",
            where=str(path),
            cure="write one of a checkpoint that you trust: `verify --write-manifest`",
        ) from error


def parse_digest(name: str, entry: object) -> FileDigest:
    """What the manifest has at `name`. ValueError continues the sentence "the manifest ..."."""
    if not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"}:
        raise ValueError(f"has an entry {quoted(name)} without exactly bytes and sha256")
    size, sha256 = entry["bytes"], entry["sha256"]
    if not is_count(size) or not isinstance(sha256, str) or len(sha256) != 64 or set(sha256) - set("0123456789abcdef"):
        raise ValueError(f"has an entry {quoted(name)} whose bytes or sha256 is malformed")
    return FileDigest(bytes=size, sha256=sha256)


def digest_files(files: Sequence[Path], progress: Progress | None) -> Mapping[str, FileDigest]:
    """By file name. Several files at a time: hashlib lets go of the GIL. Memory: 4 MiB for each of 4 threads."""
    lock = threading.Lock()
    stopped = threading.Event()

    def report(num_bytes: int) -> None:
        if progress is not None:
            with lock:
                progress(num_bytes)

    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="manifest") as pool:
        try:
            digests = list(pool.map(lambda file: _digest_file(file, report, stopped), files))
        finally:
            stopped.set()  # after an exception, Ctrl-C included, the others need not read their gigabytes to the end
    return {file.name: digest for file, digest in zip(files, digests, strict=True)}


def _digest_file(file: Path, report: Progress, stopped: threading.Event) -> FileDigest:
    digest = hashlib.sha256()
    num_bytes = 0
    chunk = bytearray(CHUNK_BYTES)
    view = memoryview(chunk)
    try:
        with open(file, "rb", buffering=0) as stream:
            while not stopped.is_set() and (count := stream.readinto(chunk)):
                digest.update(view[:count])
                num_bytes += count
                report(count)
    except OSError as error:
        raise _disk_error(file, num_bytes, error) from error
    return FileDigest(bytes=num_bytes, sha256=digest.hexdigest())


def _file_bytes(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise _disk_error(file, 0, error) from error


def _disk_error(file: Path, offset: int, error: OSError) -> DeviceError:
    return DeviceError(
        f"cannot read the weights: {error.strerror}",
        where=f"{file} at byte {offset:,}",
        cure="check the disk and the kernel's log",
    )


def write_atomically(path: Path, text: str) -> None:
    """A reader of `path` sees what it was or all of `text`, which is ASCII; so does who comes after a crash."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "w", encoding="ascii") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would lock other users of the checkpoint out
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
