"""What a GGUF file says of its model, from its head. Reads no weight, and needs no torch."""

from pathlib import Path

from ..coding.gguf_types import FLOATS
from ..model.gguf_config import config_of, parameter_name, weights_name
from ..weights.gguf_header import GgufHeader, read_gguf
from .stored import Shapes, Stored, aligned
from .weight_files import LAYER

# Whose rows ggml wants in pairs, of the Llama family: they are put in order like packed ones, whatever their type.
_PAIRED = tuple(f"self_attn.{name}_proj.{kind}" for name in "qk" for kind in ("weight", "bias"))


def read_gguf_config(path: Path) -> tuple[dict[str, object], GgufHeader]:
    """The contents of a config.json, and the head. CheckpointError and ModelError as where the model is run."""
    header = read_gguf(path, long_arrays=False)
    return {"dtype": "bfloat16", **config_of(header)}, header  # what is computed in where nobody says


def stored_in_gguf(header: GgufHeader, tensors: Shapes, num_layers: int) -> Stored:
    """Of a model of equal layers of `tensors`, {name: shape}."""
    is_llama = header.metadata.get("general.architecture") == "llama"
    layers: list[dict[str, int]] = [{} for _ in range(num_layers)]
    for tensor in header.tensors:
        match = LAYER.fullmatch(parameter_name(tensor.name) or "")
        if match is None or int(match[1]) >= num_layers or match[2] not in tensors:
            continue
        if tensor.type_name not in FLOATS or (is_llama and match[2] in _PAIRED):
            layers[int(match[1])][match[2]] = aligned(tensor.num_bytes)
    return Stored(name=f"GGUF {weights_name(header)}", layers=tuple(layers), is_estimated=False)
