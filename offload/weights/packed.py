"""Which parameters a checkpoint stores packed, and what it must have for them. Reads no weight."""

from collections.abc import Mapping

from ..coding.tensor_codec import Packing, Part, TensorCodec, part_name
from .checkpoint import Checkpoint
from .header import problems_error, quoted

Shapes = Mapping[str, tuple[int, ...]]


def find_codecs(checkpoint: Checkpoint, parameters: Shapes, packing: Packing) -> dict[str, TensorCodec]:
    """Of those of `parameters`, {name: shape}, that are packed. CheckpointError, which names all that are packed wrongly."""
    beside: dict[str, dict[str, Part]] = {}
    for name, tensor in checkpoint.tensors.items():
        module, part = module_and_part(name)
        beside.setdefault(module, {})[part] = Part(name=part, shape=tensor.shape, dtype=tensor.dtype)
    codecs: dict[str, TensorCodec] = {}
    problems: list[str] = []
    for name, shape in parameters.items():
        try:
            codec = packing.codec_of(name, shape, beside.get(name.rpartition(".")[0], {}))
        except ValueError as error:
            problems.append(f"tensor {quoted(name)} {error}")
            continue
        if codec is not None:
            codecs[name] = codec
    if problems:
        cure = "use the config.json that belongs to these weights, or download them again"
        raise problems_error(problems, where=str(checkpoint.folder), cure=cure)
    return codecs


def module_and_part(name: str) -> tuple[str, str]:
    """What a tensor's name says before its last dot, and after it; `weight.absmax` and its like are after it, too: parts that
    bitsandbytes stores beside `weight`."""
    module, is_inner, part = name.partition(".weight.")
    if is_inner:
        return module, f"weight.{part}"
    module, _, part = name.rpartition(".")
    return module, part


def stored_shapes(parameters: Shapes, codecs: Mapping[str, TensorCodec]) -> dict[str, tuple[int, ...]]:
    """{name: shape} of what is stored of `parameters`, be it what travels or what is kept on the device."""
    stored: dict[str, tuple[int, ...]] = {}
    for name, shape in parameters.items():
        if (codec := codecs.get(name)) is None:
            stored[name] = shape
        else:
            stored |= {part_name(name, part.name): part.shape for part in (*codec.parts, *codec.kept)}
    return stored
