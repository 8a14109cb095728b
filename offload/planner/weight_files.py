"""What the files of a packed model hold of its layers, from their headers. Reads no weight, and needs no torch.

Which parameters are packed is told by their tensors, as in offload/coding; a test holds both to the same bytes.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..weights.checkpoint import INDEX_NAME, SINGLE_NAME, open_checkpoint
from ..weights.header import TensorInfo
from .stored import Shapes, Stored, aligned

LAYER = re.compile(r"model\.layers\.(\d{1,4})\.(.+)")
_UNPACKED = ("F64", "F32", "F16", "BF16")
# What packed parameters have in place of what follows the last dot of their names, or behind it. Other tensors beside them, of
# activations above all, stay on disk.
_PARTS = frozenset(
    {
        *("qweight", "qzeros", "scales", "g_idx"),
        *("weight_scale", "weight_scale_inv", "weight_scale_2"),
        *("weight_packed", "weight_zero_point", "weight_g_idx", "weight_global_scale"),
        *("weight.absmax", "weight.quant_map"),
    }
)
# Behind the parameter's name and "_": of weights coded without loss, alone or beside a base, and of the base.
_CODED = ("bytes", "codes", "base", "escapes", "remainder", "remainder_half", "widths", "offsets", "positions", "exceptions")
_BASE = ("base_codes", "base_scale", "base_zero")


def has_weights(folder: Path) -> bool:
    return any((folder / name).exists() for name in (SINGLE_NAME, INDEX_NAME))


def stored_in_folder(folder: Path, expected: Stored, tensors: Shapes, num_layers: int) -> Stored:
    """Of a model of equal layers of `tensors`, {name: shape}; `expected` is what its config alone says. CheckpointError for
    files that are not sound."""
    layers: list[dict[str, TensorInfo]] = [{} for _ in range(num_layers)]
    for full, tensor in open_checkpoint(folder).tensors.items():
        match = LAYER.fullmatch(full)
        if match is not None and int(match[1]) < num_layers:
            layers[int(match[1])][match[2]] = tensor
    packed = tuple(_packed(tensors, found) for found in layers)
    bases = tuple(_bases(tensors, found) for found in layers) if expected.bases else ()
    return replace(expected, layers=packed, bases=bases, is_estimated=False)


def _packed(tensors: Shapes, found: Mapping[str, TensorInfo]) -> dict[str, int]:
    """{parameter: bytes of its parts in a slot} of those of `tensors` that are packed in one layer, of which the files have
    `found`, {name: tensor}."""
    packed: dict[str, int] = {}
    for parameter in tensors:
        own, stem = found.get(parameter), parameter.rpartition(".")[0]
        if own is not None and own.dtype_name in _UNPACKED:
            continue
        names = [f"{stem}.{part}" for part in _PARTS] + [f"{parameter}_{part}" for part in _CODED]
        names += [name for name in found if name.startswith(f"{parameter}.quant_state.")]  # of bitsandbytes
        parts = [found[name] for name in names if name in found] if parameter.endswith(".weight") else []
        if own is not None:
            parts.append(own)
        if parts:
            packed[parameter] = _slot_bytes(parts)
    return packed


def _bases(tensors: Shapes, found: Mapping[str, TensorInfo]) -> dict[str, int]:
    """The same of the bases that there are."""
    parts = {parameter: [f"{parameter}_{part}" for part in _BASE] for parameter in tensors}
    whole = {parameter: names for parameter, names in parts.items() if all(name in found for name in names)}
    return {parameter: _slot_bytes([found[name] for name in names]) for parameter, names in whole.items()}


def _slot_bytes(parts: Sequence[TensorInfo]) -> int:
    return sum(aligned(part.num_bytes) for part in parts)
