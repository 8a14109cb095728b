"""A checkpoint folder into another one, whose matrices are coded without loss: file by file and tensor by tensor, in memory for
two matrices and a code. Whenever it is interrupted, files that were finished are kept.

The new folder has no config.json until all else is there: it is a model when it is whole.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Final

import torch

from ..coding.config_fields import LOSSLESS_METHOD
from ..coding.lossless import lossless_codec
from ..coding.lossless_encode import Encoder
from ..coding.lossless_packing import VERSION
from ..coding.tensor_codec import part_name
from ..config import bytes_text
from ..errors import FitError, ModelError, UsageError, reason
from .checkpoint import CONFIG_NAME, INDEX_NAME, SINGLE_NAME, Checkpoint
from .conversion_state import STATE_NAME, begun, fingerprint, write_state
from .dtypes import DTYPE_NAMES
from .encoding_source import encode_into, encoding_of, may_be_coded
from .header import TensorInfo, read_header
from .manifest import MANIFEST_NAME, FileDigest, digest_files, manifest_text, write_atomically
from .read_ahead import ReadAhead, Wanted
from .safetensors_writer import Entry, SafetensorsWriter, sync_folder
from .source import CheckpointSource

CODED_SHARE: Final = 0.72  # of a matrix that is coded, for the guess of what is needed on the disk
NUM_TRIED: Final = 4  # matrices, before anything is written
# What a model folder has beside weights, config and index.
COMPANIONS: Final = ("*.json", "*.jinja", "*.txt", "*.model", "*.md", "*.tiktoken", "LICENSE*", "NOTICE*", "USE_POLICY*")
MAX_COMPANION_BYTES: Final = 256 * 2**20

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """`matrices` are the names of those tensors of `checkpoint` that a code is tried for: the decoder layers'."""

    checkpoint: Checkpoint
    matrices: Collection[str]
    output: Path

    @property
    def candidates(self) -> list[TensorInfo]:
        tensors = (self.checkpoint.tensors[name] for name in self.matrices)
        return [tensor for tensor in tensors if may_be_coded(tensor.shape, tensor.dtype)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """What has become of it. `num_kept` files were there from an earlier attempt."""

    raw_bytes: int
    stored_bytes: int
    num_coded: int
    num_tensors: int
    num_files: int
    num_kept: int


def convert(conversion: Conversion, progress: Progress | None = None) -> Converted:
    """Does it, or does the rest of it. `progress` gets the bytes of the checkpoint's tensors that are done since its last call.

    UsageError for an output that is something else, ModelError where there is nothing to gain, FitError when the disk is full,
    DeviceError when it fails."""
    checkpoint, output = conversion.checkpoint, conversion.output
    if output.resolve() == checkpoint.folder.resolve():
        cure = "name another folder: the model is left as it is"
        raise UsageError("the output is the model itself", where=f"--output {output}", cure=cure)
    _check_gain(conversion)
    with _writing(output), begun(output, source := fingerprint(checkpoint, f"{LOSSLESS_METHOD} {VERSION}")) as said:
        kept = _proved(output, said)
        _check_space(conversion, kept)
        finished = dict(kept)
        with CheckpointSource(checkpoint).open() as feed, Encoder() as encoder, closing(ReadAhead(feed)) as ahead:
            for file in checkpoint.files:
                tensors = read_header(file)
                if file.name in kept:
                    _report(progress, sum(tensor.num_bytes for tensor in tensors))
                    continue
                _convert_file(conversion, file.name, tensors, ahead, encoder, progress)
                finished |= digest_files([output / file.name], None)
                write_state(output, source, finished)
        _finish(checkpoint, output, finished)
    return _converted(checkpoint, output, len(kept))


def _check_gain(conversion: Conversion) -> None:
    """Tries the largest matrices: what holds for them holds for the model."""
    largest = sorted(conversion.candidates, key=lambda tensor: tensor.num_bytes, reverse=True)
    with (
        CheckpointSource(conversion.checkpoint).open() as feed,
        Encoder() as encoder,
        closing(ReadAhead(feed)) as ahead,
        closing(ahead.each(map(_wanted, largest[:NUM_TRIED]))) as tensors,
    ):
        if any(encoding_of(one.name, tensor, encoder) is not None for one, tensor in tensors):
            return
    dtypes = {str(conversion.checkpoint.tensors[name].dtype).removeprefix("torch.") for name in conversion.matrices}
    raise ModelError(
        f"there is nothing to gain: the weights are {' and '.join(sorted(dtypes))}, and no code makes them shorter",
        where=str(conversion.checkpoint.folder),
        cure="use the model as it is; bfloat16, and float16 that was cast from it, can be coded",
    )


def _proved(output: Path, said: Mapping[str, FileDigest]) -> dict[str, FileDigest]:
    """Those of the files that are `said` to be finished that have the contents that they had."""
    there = [output / name for name in said if (output / name).is_file()]
    return {name: digest for name, digest in digest_files(there, None).items() if digest == said[name]}


def _check_space(conversion: Conversion, kept: Mapping[str, FileDigest]) -> None:
    candidates = {tensor.name for tensor in conversion.candidates}
    left = [tensor for tensor in conversion.checkpoint.tensors.values() if tensor.path.name not in kept]
    needed = sum(tensor.num_bytes * (CODED_SHARE if tensor.name in candidates else 1) for tensor in left)
    stale = [path for path in conversion.output.glob("*.safetensors*") if path.name not in kept]
    free = shutil.disk_usage(conversion.output).free + sum(path.stat().st_size for path in stale)
    if needed > free:
        raise FitError(
            f"the converted model takes about {bytes_text(needed)} of disk, {bytes_text(free)} are free",
            where=f"--output {conversion.output}",
            cure="free space there, or name a folder on another disk",
        )


def _convert_file(
    conversion: Conversion,
    name: str,
    tensors: Sequence[TensorInfo],
    ahead: ReadAhead,
    encoder: Encoder,
    progress: Progress | None,
) -> None:
    entries = chain.from_iterable(map(_possible_entries, tensors))
    names = {tensor.name: tensor.dtype_name for tensor in tensors}
    with (
        SafetensorsWriter(conversion.output / name, entries) as writer,
        closing(ahead.each(map(_wanted, tensors), progress)) as each,
    ):
        for one, tensor in each:
            tried = one.name in conversion.matrices and may_be_coded(one.shape, one.dtype)
            encoding = encoding_of(one.name, tensor, encoder) if tried else None
            if encoding is None:
                writer.add(one.name, names[one.name], tensor)
                continue
            parts = {part.name: torch.empty(part.shape, dtype=part.dtype) for part in encoding.codec.parts}
            encode_into(one.name, tensor, encoding, parts, encoder)
            for part, stored in parts.items():
                writer.add(part_name(one.name, part), DTYPE_NAMES[stored.dtype], stored)


def _wanted(tensor: TensorInfo) -> Wanted:
    return Wanted(name=tensor.name, shape=tensor.shape, dtype=tensor.dtype)


def _possible_entries(tensor: TensorInfo) -> Iterator[Entry]:
    """Of a tensor in the header of its file, be it coded or not."""
    yield tensor.name, tensor.dtype_name, tensor.shape
    if may_be_coded(tensor.shape, tensor.dtype):
        most = tensor.num_bytes  # of escapes, of exceptions
        codec = lossless_codec(tensor.name, tensor.shape, most, most, tensor.dtype)
        yield from ((part_name(tensor.name, part.name), DTYPE_NAMES[part.dtype], part.shape) for part in codec.parts)


def _finish(checkpoint: Checkpoint, output: Path, files: Mapping[str, FileDigest]) -> None:
    """The config last: with it, the folder is a model."""
    for path in _companions(checkpoint.folder):
        _copy(path, output / path.name)
    write_atomically(output / MANIFEST_NAME, manifest_text(files))
    tensors = {tensor.name: tensor for file in checkpoint.files for tensor in read_header(output / file.name)}
    if checkpoint.files[0].name != SINGLE_NAME:
        total = sum(tensor.num_bytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": {name: info.path.name for name, info in tensors.items()}}
        write_atomically(output / INDEX_NAME, json.dumps(index, indent=2, sort_keys=True) + "\n")
    write_atomically(output / CONFIG_NAME, json.dumps(_config(checkpoint), indent=2) + "\n")
    (output / STATE_NAME).unlink()
    sync_folder(output)


def _copy(old: Path, new: Path) -> None:
    """As safely on the disk as the weights are: the config, which comes last, says that all is there."""
    with old.open("rb") as source, new.open("wb") as copy:
        shutil.copyfileobj(source, copy)
        copy.flush()
        os.fsync(copy.fileno())


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The model's, which says that its weights are coded, and of which dtype they are: the parts do not. transformers, which
    takes an unknown method for none and makes weights up, does not find the file that it is sent to."""
    config: dict[str, Any] = json.loads((checkpoint.folder / CONFIG_NAME).read_text(encoding="utf-8"))
    dtypes = [tensor.dtype for tensor in checkpoint.tensors.values() if may_be_coded(tensor.shape, tensor.dtype)]
    dtype = str(max(set(dtypes), key=dtypes.count)).removeprefix("torch.")
    config["torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"] = dtype
    config["transformers_weights"] = f"{LOSSLESS_METHOD}.safetensors"
    return {**config, "quantization_config": {"quant_method": LOSSLESS_METHOD, "version": VERSION}}


def _companions(folder: Path) -> list[Path]:
    found = {path for pattern in COMPANIONS for path in folder.glob(pattern) if path.is_file()}
    ours = {CONFIG_NAME, MANIFEST_NAME, STATE_NAME}
    kept = [path for path in found if path.name not in ours and not path.name.endswith(".index.json")]
    return sorted(path for path in kept if path.stat().st_size <= MAX_COMPANION_BYTES)


def _converted(checkpoint: Checkpoint, output: Path, num_kept: int) -> Converted:
    tensors = [tensor for file in checkpoint.files for tensor in read_header(output / file.name)]
    names = {tensor.name for tensor in tensors}
    return Converted(
        raw_bytes=checkpoint.num_bytes,
        stored_bytes=sum(tensor.num_bytes for tensor in tensors),
        num_coded=len(checkpoint.tensors.keys() - names),
        num_tensors=len(checkpoint.tensors),
        num_files=len(checkpoint.files),
        num_kept=num_kept,
    )


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise FitError(
                f"the disk is full: {reason(error)}",
                where=f"--output {output}",
                cure="free space there and run the same command again: files that were finished are kept",
            ) from error
        cure = "check the disk, and that you may write to it; then run the same command again"
        raise UsageError(f"the folder cannot be written to: {reason(error)}", where=f"--output {output}", cure=cure) from error


def _report(progress: Progress | None, num_bytes: int) -> None:
    if progress is not None:
        progress(num_bytes)
