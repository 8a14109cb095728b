"""What a GGUF file says of its model, from its head. Reads no weight, and needs no torch."""

from pathlib import Path

from ..coding.gguf_types import FLOATS
from ..model.gguf_config import config_of, paired_heads, parameter_name, weights_name
from ..weights.gguf_header import GgufHeader, read_gguf
from .stored import Shapes, Stored, aligned
from .weight_files import LAYER


def read_gguf_config(path: Path) -> tuple[dict[str, object], GgufHeader]:
    """The contents of a config.json, and the head. CheckpointError and ModelError as where the model is run."""
    header = read_gguf(path, long_arrays=False)
    return config_of(header), header


def stored_in_gguf(header: GgufHeader, tensors: Shapes, num_layers: int) -> Stored:
    """Of a model of equal layers of `tensors`, {name: shape}."""
    paired = paired_heads(config_of(header))  # put in order like packed ones, whatever their type
    layers: list[dict[str, int]] = [{} for _ in range(num_layers)]
    for tensor in header.tensors:
        match = LAYER.fullmatch(parameter_name(tensor.name) or "")
        if match is None or int(match[1]) >= num_layers or match[2] not in tensors:
            continue
        if tensor.type_name not in FLOATS or match[2] in paired:
            layers[int(match[1])][match[2]] = aligned(tensor.num_bytes)
    return Stored(name=f"GGUF {weights_name(header)}", layers=tuple(layers), is_estimated=False)
