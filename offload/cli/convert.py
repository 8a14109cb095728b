"""`convert`: a model's 16-bit weights coded without loss into another folder, alone or beside a low-bit base, which loads as
fast as the disk reads."""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

from ..coding.base_kinds import BASE_KINDS, DEFAULT_BASE
from ..config import bytes_text, counted, rate_text, seconds_text
from ..errors import ModelError, UsageError
from ..model.files import ModelFiles, open_model
from ..model.locate import is_gguf
from ..weights.checkpoint import open_checkpoint
from ..weights.conversion import Conversion, Converted, convert
from ..weights.encoding import LOSSLESS, Scheme
from .terminal import LoadBar


def run(arguments: argparse.Namespace) -> int:
    scheme = scheme_of(arguments.codec, arguments.base)
    conversion = conversion_of(arguments.model, arguments.output, scheme)
    checkpoint = conversion.checkpoint
    done_bytes, start_s = 0, time.monotonic()
    with LoadBar(enabled=not arguments.quiet, doing="converting") as bar:

        def progress(num_bytes: int) -> None:
            nonlocal done_bytes
            done_bytes += num_bytes
            bar.update(done_bytes, checkpoint.num_bytes)

        converted = convert(conversion, progress)
    elapsed_s = time.monotonic() - start_s
    if arguments.json:
        document = {"schema_version": 1, "model": str(checkpoint.folder), "output": str(conversion.output)}
        how = {"codec": scheme.travel, "base": scheme.base.name if scheme.base is not None else None}
        print(json.dumps({**document, **how, **asdict(converted), "elapsed_s": elapsed_s}))
    else:
        print(_summary(converted, conversion.output, elapsed_s))
    return 0


def scheme_of(codec: str, base: str | None) -> Scheme:
    if codec == "residual":
        return Scheme(codec, BASE_KINDS[base or DEFAULT_BASE])
    if base is not None:
        cure = "add --codec residual, or leave --base out"
        raise UsageError("there is a base with residual coding only", where=f"--base {base}", cure=cure)
    return LOSSLESS


def conversion_of(model: str, output: str, scheme: Scheme = LOSSLESS) -> Conversion:
    """Of the model of that name. ModelError for one that is packed, and for whatever is wrong with its files."""
    files = open_model(model, "--model")
    _refuse_packed(files)
    architecture = files.architecture
    matrices = [
        f"{architecture.prefix}.{layer}.{name}" for layer, shapes in enumerate(architecture.layer_shapes) for name in shapes
    ]
    checkpoint = open_checkpoint(files.path)  # all that the files have, what the model has no place for included
    return Conversion(checkpoint=checkpoint, matrices=matrices, output=Path(output).expanduser(), scheme=scheme)


def _refuse_packed(files: ModelFiles) -> None:
    if files.codecs or is_gguf(files.path):
        what = "they are coded already" if files.is_lossless else f"they are packed: {files.weights}"
        raise ModelError(
            f"there is nothing to gain from coding its weights: {what}",
            where=str(files.path),
            cure="use the model as it is: packed weights travel packed",
        )


def _summary(converted: Converted, output: Path, elapsed_s: float) -> str:
    kept = f", {converted.num_kept} of them kept from an earlier attempt" if converted.num_kept else ""
    return (
        f"ok: {bytes_text(converted.raw_bytes)} in {bytes_text(converted.stored_bytes)}, "
        f"{converted.stored_bytes / converted.raw_bytes:.3f} of it; {converted.num_coded} of "
        f"{counted(converted.num_tensors, 'tensor')} coded{_shares(converted)}, every bit compared; "
        f"{counted(converted.num_files, 'file')}{kept} "
        f"in {seconds_text(elapsed_s)} s, {rate_text(converted.raw_bytes / max(elapsed_s, 1e-9))}; the model is in {output}"
    )


def _shares(converted: Converted) -> str:
    """Of what was coded, beside a base only: without one there is nothing to tell apart."""
    if not converted.base_bytes:
        return ""
    base, code = (num_bytes / converted.coded_raw_bytes for num_bytes in (converted.base_bytes, converted.code_bytes))
    sizes = bytes_text(converted.base_bytes), bytes_text(converted.code_bytes)
    return f": a base of {sizes[0]}, {base:.3f}, and {sizes[1]}, {code:.3f}, that travel"
