"""A GGUF file as a model: its tensors as a checkpoint under transformers' names, and how they are packed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from ..coding.gguf_codec import GgufPacking, StoredAs
from ..coding.gguf_types import FLOATS
from ..weights.checkpoint import Checkpoint
from ..weights.gguf_header import GgufTensor, read_gguf
from ..weights.header import TensorInfo, problems_error, quoted
from .gguf_config import ROPE_FACTORS, config_of, paired_heads, parameter_name, weights_name


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufModel:
    """`config` is as in a config.json. Blocks are tensors of the checkpoint as bytes: "U8" [rows, bytes of a row]."""

    config: dict[str, object]
    checkpoint: Checkpoint
    packing: GgufPacking


def open_gguf(path: Path) -> GgufModel:
    """The model of the file at `path`, or of which it is a part. Reads no weight. CheckpointError or ModelError for whatever is
    wrong with it."""
    header = read_gguf(path)
    config = config_of(header)
    named = _named(header.tensors, path)
    heads = paired_heads(config)
    stored = {
        name: StoredAs(type_name=tensor.type_name, num_heads=heads.get(name.split(".", 3)[-1]))
        for name, tensor in named.items()
    }
    tensors = {name: _as_info(name, tensor) for name, tensor in named.items()}
    return GgufModel(
        config=config,
        checkpoint=Checkpoint(folder=path, tensors=MappingProxyType(tensors), files=header.files),
        packing=GgufPacking(name=f"GGUF {weights_name(header)}", parameters=MappingProxyType(stored)),
    )


def _named(tensors: Sequence[GgufTensor], path: Path) -> dict[str, GgufTensor]:
    """By transformers' names. CheckpointError for tensors that have none: a model that has them is computed otherwise."""
    named: dict[str, GgufTensor] = {}
    problems: list[str] = []
    for tensor in tensors:
        name = parameter_name(tensor.name)
        if name is not None and name not in named:
            named[name] = tensor
        elif tensor.name != ROPE_FACTORS:
            problems.append(f"tensor {quoted(tensor.name)} is none that we know of this family")
    if problems:
        raise problems_error(problems, where=str(path), cure="take another GGUF file, or one of another model")
    return named


def _as_info(name: str, tensor: GgufTensor) -> TensorInfo:
    dtype_name, shape = tensor.type_name, tensor.shape
    if dtype_name not in FLOATS:
        num_rows = 1
        for size in shape[:-1]:
            num_rows *= size
        dtype_name, shape = "U8", (*shape[:-1], tensor.num_bytes // max(num_rows, 1))
    return TensorInfo(
        name=name,
        dtype_name=dtype_name,
        shape=shape,
        path=tensor.path,
        offset_bytes=tensor.offset_bytes,
        num_bytes=tensor.num_bytes,
    )
