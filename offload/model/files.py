"""A model's files: what they say it is, and that its tensors are there."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ..coding.base_kinds import BaseKind
from ..coding.config_fields import LOSSLESS_METHOD, RESIDUAL_METHOD
from ..coding.packings import read_packing
from ..coding.residual_packing import ResidualPacking
from ..coding.tensor_codec import Packing, Part
from ..weights.checkpoint import Checkpoint, open_checkpoint
from ..weights.packed_source import Codecs
from .architecture import Architecture, match_weights, read_architecture, read_architecture_of
from .gguf_model import open_gguf
from .locate import is_gguf, locate_model


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """Checked against each other; no weight was read. `weights` is what people call how they are stored: "float16", "FP8".
    `codecs` are those of the parameters that are not stored as they compute. `path` is a folder or a GGUF file. `base` is the
    kind of the low-bit copy that the files have of the layers, if any."""

    path: Path
    architecture: Architecture
    checkpoint: Checkpoint
    weights: str
    codecs: Codecs
    base: BaseKind | None = None

    @property
    def is_lossless(self) -> bool:
        """Whether what is stored are the 16-bit weights, coded; alone or beside a base."""
        return self.architecture.quantization.get("quant_method") in (LOSSLESS_METHOD, RESIDUAL_METHOD)

    @property
    def bases(self) -> dict[str, tuple[Part, ...]]:
        """Of the parameters that have a low-bit copy in the files, its parts."""
        return {name: codec.kept for name, codec in self.codecs.items() if codec.kept}

    @property
    def dtype(self) -> torch.dtype:
        """Of the decoder layers, as the files have it; where those are packed, the dtype that the config names."""
        if self.codecs:
            dtype = getattr(self.architecture.config, "dtype", None)
            return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
        return self.checkpoint.tensors[first_parameter(self.architecture)].dtype


def open_model(name: str, flag: str) -> ModelFiles:
    """The files of `name`, a folder, a GGUF file or a hub id, as `flag` gave it. ModelError or CheckpointError for whatever is
    wrong."""
    path = locate_model(name, flag)
    return _open_gguf(path) if is_gguf(path) else _open_folder(path)


def _open_folder(folder: Path) -> ModelFiles:
    checkpoint = open_checkpoint(folder)  # first: a damaged config is told from one of another architecture here
    architecture = read_architecture(folder)
    quantization, where = architecture.quantization, str(folder / "config.json")
    packing = read_packing(quantization, where) if quantization else None
    return _matched(folder, architecture, checkpoint, packing)


def _open_gguf(path: Path) -> ModelFiles:
    model = open_gguf(path)
    return _matched(path, read_architecture_of(model.config, str(path)), model.checkpoint, model.packing)


def _matched(path: Path, architecture: Architecture, checkpoint: Checkpoint, packing: Packing | None) -> ModelFiles:
    architecture, checkpoint, codecs = match_weights(architecture, checkpoint, packing)
    first = checkpoint.tensors.get(first_parameter(architecture))
    weights = packing.name if packing is not None else dtype_text(first.dtype if first is not None else torch.float32)
    return ModelFiles(
        path=path,
        architecture=architecture,
        checkpoint=checkpoint,
        weights=weights,
        codecs=codecs,
        base=packing.kind if isinstance(packing, ResidualPacking) else None,
    )


def first_parameter(architecture: Architecture) -> str:
    """The name of one that every model has in its first layer."""
    return f"{architecture.prefix}.0.{next(iter(architecture.layer_shapes[0]))}"


def dtype_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
