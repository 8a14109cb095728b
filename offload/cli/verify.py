"""`verify`: structure always, contents against a manifest with --full; --write-manifest makes one."""

import argparse
import json
from pathlib import Path

from ..config import bytes_text, counted
from ..model.files import open_model
from ..weights.manifest import check_manifest, manifest_path, write_manifest
from .terminal import LoadBar


def run(arguments: argparse.Namespace) -> int:
    files = open_model(arguments.model, "--model")
    checkpoint, architecture = files.checkpoint, files.architecture
    manifest = Path(arguments.manifest) if arguments.manifest else manifest_path(files.path)
    done, total = 0, sum(path.stat().st_size for path in checkpoint.files)
    with LoadBar(enabled=not arguments.quiet) as bar:

        def progress(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            bar.update(done, total)

        if arguments.write_manifest:
            write_manifest(checkpoint, manifest, progress)
        if arguments.full:
            check_manifest(checkpoint, manifest, progress)
    contents = "match the manifest" if arguments.full else "not compared"
    wrote = f"; manifest written to {manifest}" if arguments.write_manifest else ""
    document = {
        "schema_version": 1,
        "model": str(files.path),
        "architecture": architecture.config.model_type,
        "layers": architecture.num_layers,
        "files": len(checkpoint.files),
        "tensors": len(checkpoint.tensors),
        "weights": files.weights,
        "weight_bytes": checkpoint.num_bytes,
        "contents": contents,
        "manifest": str(manifest) if arguments.full or arguments.write_manifest else None,
    }
    if arguments.json:
        print(json.dumps(document))
    else:
        layers, tensors = counted(architecture.num_layers, "layer"), counted(len(checkpoint.tensors), "tensor")
        size = bytes_text(checkpoint.num_bytes)
        print(
            f"ok: {document['architecture']} in {files.weights} with {layers}, {tensors} of {size} in "
            f"{counted(len(checkpoint.files), 'file')}; structure sound, contents {contents}{wrote}"
        )
    return 0
