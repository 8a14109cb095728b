"""A checkpoint folder into another one, whose matrices are coded without loss, alone or beside a base: file by file and tensor
by tensor, in memory for two matrices and two codes. Whenever it is interrupted, files that were finished are kept.

The new folder has no config.json until all else is there: it is a model when it is whole.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Final

import torch

from ..coding import lossless_packing, residual_packing
from ..coding.config_fields import LOSSLESS_METHOD, RESIDUAL_METHOD
from ..coding.lossless import FORMATS, pays
from ..coding.lossless_layout import num_bytes_of
from ..coding.residual import residual_pays
from ..coding.tensor_codec import part_name
from ..config import bytes_text
from ..errors import FitError, ModelError, UsageError, reason
from .checkpoint import CONFIG_NAME, INDEX_NAME, SINGLE_NAME, Checkpoint
from .conversion_state import STATE_NAME, begun, fingerprint, write_state
from .dtypes import DTYPE_NAMES
from .encoding import Coder, Encoding, Scheme, possible_parts, unread
from .header import TensorInfo, read_header
from .manifest import MANIFEST_NAME, FileDigest, digest_files, manifest_text, write_atomically
from .output_files import Made, OutputFiles
from .read_ahead import ReadAhead, Wanted
from .safetensors_writer import Entry, sync_folder
from .source import CheckpointSource

CODED_SHARE: Final = {"lossless": 0.72, "residual": 0.77}  # of a matrix, for the guess of what is needed on the disk
NUM_TRIED: Final = 4  # matrices, before anything is written
# What a model folder has beside weights, config and index.
COMPANIONS: Final = ("*.json", "*.jinja", "*.txt", "*.model", "*.md", "*.tiktoken", "LICENSE*", "NOTICE*", "USE_POLICY*")
MAX_COMPANION_BYTES: Final = 256 * 2**20

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """`matrices` are the names of those tensors of `checkpoint` that are stored as `scheme` has it, if they can: the decoder
    layers'."""

    checkpoint: Checkpoint
    matrices: Collection[str]
    output: Path
    scheme: Scheme

    @property
    def candidates(self) -> list[TensorInfo]:
        tensors = (self.checkpoint.tensors[name] for name in self.matrices)
        return [tensor for tensor in tensors if self.scheme.may_be_coded(tensor.shape, tensor.dtype)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """What has become of it. Of the `num_coded` tensors, which were `coded_raw_bytes`, `code_bytes` travel and `base_bytes`
    stay on a device. `num_kept` files were there from an earlier attempt."""

    raw_bytes: int
    stored_bytes: int
    coded_raw_bytes: int
    code_bytes: int
    base_bytes: int
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
    quantization = _quantization(conversion.scheme)
    source = fingerprint(checkpoint, " ".join(map(str, quantization.values())))
    with _writing(output), begun(output, source) as said:
        kept = _proved(output, said)
        _check_space(conversion, kept)
        _convert_files(conversion, source, finished := dict(kept), progress)
        _finish(checkpoint, output, finished, quantization)
    return _converted(conversion, len(kept))


def _check_gain(conversion: Conversion) -> None:
    """Tries the largest matrices: what holds for them holds for the model."""
    largest = sorted(conversion.candidates, key=lambda tensor: tensor.num_bytes, reverse=True)
    with (
        CheckpointSource(conversion.checkpoint).open() as feed,
        Coder(conversion.scheme) as coder,
        closing(ReadAhead(feed)) as ahead,
        closing(ahead.each(map(_wanted, largest[:NUM_TRIED]))) as tensors,
    ):
        if any(_gains(coder.look(one.name, tensor)) for one, tensor in tensors):
            return
    dtypes = {str(conversion.checkpoint.tensors[name].dtype).removeprefix("torch.") for name in conversion.matrices}
    raise ModelError(
        f"there is nothing to gain: the weights are {' and '.join(sorted(dtypes))}, and no code makes them shorter",
        where=str(conversion.checkpoint.folder),
        cure="use the model as it is; bfloat16, and float16 that was cast from it, can be coded",
    )


def _gains(encoding: Encoding | None) -> bool:
    if encoding is None or encoding.codec is None:
        return False
    return residual_pays(encoding.codec, encoding.shape) if encoding.base else pays(encoding.codec, encoding.shape)


def _proved(output: Path, said: Mapping[str, FileDigest]) -> dict[str, FileDigest]:
    """Those of the files that are `said` to be finished that have the contents that they had."""
    there = [output / name for name in said if (output / name).is_file()]
    return {name: digest for name, digest in digest_files(there, None).items() if digest == said[name]}


def _check_space(conversion: Conversion, kept: Mapping[str, FileDigest]) -> None:
    candidates, share = {tensor.name for tensor in conversion.candidates}, CODED_SHARE[conversion.scheme.travel]
    left = [tensor for tensor in conversion.checkpoint.tensors.values() if tensor.path.name not in kept]
    needed = sum(tensor.num_bytes * (share if tensor.name in candidates else 1) for tensor in left)
    stale = [path for path in conversion.output.glob("*.safetensors*") if path.name not in kept]
    free = shutil.disk_usage(conversion.output).free + sum(path.stat().st_size for path in stale)
    if needed > free:
        raise FitError(
            f"the converted model takes about {bytes_text(needed)} of disk, {bytes_text(free)} are free",
            where=f"--output {conversion.output}",
            cure="free space there, or name a folder on another disk",
        )


def _convert_files(conversion: Conversion, source: str, finished: dict[str, FileDigest], progress: Progress | None) -> None:
    """Those that are not yet `finished`, to which they are added."""
    checkpoint, output = conversion.checkpoint, conversion.output

    def note(name: str, digest: FileDigest) -> None:
        finished[name] = digest
        write_state(output, source, finished)

    kept = set(finished)
    with (
        CheckpointSource(checkpoint).open() as feed,
        Coder(conversion.scheme) as coder,
        closing(ReadAhead(feed)) as ahead,
        OutputFiles(output, note) as files,
    ):
        for file in checkpoint.files:
            tensors = read_header(file)
            if file.name in kept:
                _report(progress, sum(tensor.num_bytes for tensor in tensors))
                continue
            with closing(ahead.each(map(_wanted, tensors), progress)) as each:
                made = (_made(conversion, coder, *one) for one in each)
                files.write(file.name, chain.from_iterable(_possible_entries(conversion, tensor) for tensor in tensors), made)


def _made(conversion: Conversion, coder: Coder, one: Wanted, tensor: torch.Tensor) -> Made:
    """What is stored of a tensor."""
    tried = one.name in conversion.matrices and conversion.scheme.may_be_coded(one.shape, one.dtype)
    encoding = coder.look(one.name, tensor) if tried else None
    if encoding is None or encoding.codec is None:
        return Made(tensors={one.name: (conversion.checkpoint.tensors[one.name].dtype_name, tensor)}, is_lent=True)
    parts = {part.name: torch.empty(part.shape, dtype=part.dtype) for part in encoding.parts}
    coder.encode(one.name, tensor, encoding, parts)
    return Made(tensors={part_name(one.name, name): (DTYPE_NAMES[part.dtype], part) for name, part in parts.items()})


def _wanted(tensor: TensorInfo) -> Wanted:
    return Wanted(name=tensor.name, shape=tensor.shape, dtype=tensor.dtype)


def _possible_entries(conversion: Conversion, tensor: TensorInfo) -> Iterator[Entry]:
    """Of a tensor in the header of its file, be it coded or not."""
    yield tensor.name, tensor.dtype_name, tensor.shape
    if tensor.name in conversion.matrices:
        parts = possible_parts(conversion.scheme, tensor.name, tensor.shape, tensor.dtype)
        yield from ((part_name(tensor.name, part.name), DTYPE_NAMES[part.dtype], part.shape) for part in parts)


def _finish(checkpoint: Checkpoint, output: Path, files: Mapping[str, FileDigest], quantization: Mapping[str, object]) -> None:
    """The config last: with it, the folder is a model."""
    for path in _companions(checkpoint.folder):
        _copy(path, output / path.name)
    write_atomically(output / MANIFEST_NAME, manifest_text(files))
    tensors = {tensor.name: tensor for file in checkpoint.files for tensor in read_header(output / file.name)}
    if checkpoint.files[0].name != SINGLE_NAME:
        total = sum(tensor.num_bytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": {name: info.path.name for name, info in tensors.items()}}
        write_atomically(output / INDEX_NAME, json.dumps(index, indent=2, sort_keys=True) + "\n")
    write_atomically(output / CONFIG_NAME, json.dumps(_config(checkpoint, quantization), indent=2) + "\n")
    (output / STATE_NAME).unlink()
    sync_folder(output)


def _copy(old: Path, new: Path) -> None:
    """As safely on the disk as the weights are: the config, which comes last, says that all is there."""
    with old.open("rb") as source, new.open("wb") as copy:
        shutil.copyfileobj(source, copy)
        copy.flush()
        os.fsync(copy.fileno())


def _config(checkpoint: Checkpoint, quantization: Mapping[str, object]) -> dict[str, Any]:
    """The model's, which says that its weights are coded, and of which dtype they are: the parts do not. transformers, which
    takes an unknown method for none and makes weights up, does not find the file that it is sent to."""
    config: dict[str, Any] = json.loads((checkpoint.folder / CONFIG_NAME).read_text(encoding="utf-8"))
    dtypes = [tensor.dtype for tensor in checkpoint.tensors.values() if len(tensor.shape) > 1 and tensor.dtype in FORMATS]
    dtype = str(max(set(dtypes), key=dtypes.count)).removeprefix("torch.")
    config["torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"] = dtype
    config["transformers_weights"] = f"{quantization['quant_method']}.safetensors"
    return {**config, "quantization_config": quantization}


def _quantization(scheme: Scheme) -> dict[str, object]:
    """What the new config says of its weights, and what an interrupted conversion is known by."""
    if scheme.travel == "residual":
        method, kind = {"quant_method": RESIDUAL_METHOD, "version": residual_packing.VERSION}, scheme.kind
        return {**method, "bits": kind.bits, "group_size": kind.group}
    return {"quant_method": LOSSLESS_METHOD, "version": lossless_packing.VERSION}


def _companions(folder: Path) -> list[Path]:
    found = {path for pattern in COMPANIONS for path in folder.glob(pattern) if path.is_file()}
    ours = {CONFIG_NAME, MANIFEST_NAME, STATE_NAME}
    kept = [path for path in found if path.name not in ours and not path.name.endswith(".index.json")]
    return sorted(path for path in kept if path.stat().st_size <= MAX_COMPANION_BYTES)


def _converted(conversion: Conversion, num_kept: int) -> Converted:
    checkpoint = conversion.checkpoint
    stored = [tensor for file in checkpoint.files for tensor in read_header(conversion.output / file.name)]
    sizes = {tensor.name: tensor.num_bytes for tensor in stored}
    coded = [tensor for tensor in checkpoint.tensors.values() if tensor.name not in sizes]
    bases = [unread(conversion.scheme, tensor.name, tensor.shape, tensor.dtype) for tensor in coded]
    base_bytes = sum(num_bytes_of(base.base) for base in bases if base is not None)
    coded_raw_bytes, stored_bytes = sum(tensor.num_bytes for tensor in coded), sum(sizes.values())
    return Converted(
        raw_bytes=checkpoint.num_bytes,
        stored_bytes=stored_bytes,
        coded_raw_bytes=coded_raw_bytes,
        code_bytes=stored_bytes - (checkpoint.num_bytes - coded_raw_bytes) - base_bytes,
        base_bytes=base_bytes,
        num_coded=len(coded),
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
