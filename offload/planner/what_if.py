"""Pure: a model as it would be with its weights stored otherwise, by bits per weight of its layers' matrices.

| name | bits | of which |
|---|---|---|
| fp16, bf16 | 16 | |
| fp8, int8 | 8 | a scale for the tensor or each row is nothing beside it |
| fp8-block | 8.002 | 8, and a scale of 32 bits for 128x128 weights |
| int4 | 4.125 | 4, and a scale of 16 bits for 128 weights, as compressed-tensors packs them |
| gptq, awq | 4.156 | the same, and a zero point of 4 bits for 128 weights |
| nvfp4 | 4.5 | 4, and a scale of 8 bits for 16 weights |
| mxfp4 | 4.25 | 4, and a scale of 8 bits for 32 weights |
| nf4 | 4.5 | 4, and a scale of 32 bits for 64 weights |
| lossless | 11.28 | quantization.py |
| residual | 7.5 | quantization.py, beside a base of 4.375 on the device |
| q4_k_m and others | | gguf_mixtures.py |
"""

from dataclasses import replace

from ..coding.base_kinds import BASE_KINDS, DEFAULT_BASE
from ..errors import UsageError
from .gguf_mixtures import MIXTURES, gguf_stored
from .quantization import LOSSLESS_BITS, RESIDUAL_BITS, Packed
from .shapes import ModelShape
from .stored import Stored, beside_base, by_bits

_DTYPES = {"fp16": "float16", "float16": "float16", "bf16": "bfloat16", "bfloat16": "bfloat16"}
_PACKED = {
    "fp8": Packed(name="FP8", bits=8.0),
    "fp8-block": Packed(name="FP8 in blocks of 128x128", bits=8 + 32 / 128**2),
    "int8": Packed(name="compressed-tensors int8", bits=8.0),
    "int4": Packed(name="compressed-tensors int4", bits=4 + 16 / 128),
    "gptq": Packed(name="GPTQ int4", bits=4 + 20 / 128),
    "awq": Packed(name="AWQ int4", bits=4 + 20 / 128),
    "nvfp4": Packed(name="NVFP4", bits=4 + 8 / 16),
    "mxfp4": Packed(name="MXFP4", bits=4 + 8 / 32),
    "nf4": Packed(name="NF4", bits=4 + 32 / 64),
}
_MIXTURES = {mixture.lower(): mixture for mixture in MIXTURES}
NAMES = (*_DTYPES, *_PACKED, "lossless", "residual", *_MIXTURES)
BITS_16 = ("float16", "bfloat16")


def with_weights(shape: ModelShape, name: str) -> ModelShape:
    """`shape` with weights as `name` says, one of NAMES in any case. UsageError for another one, and for a model whose weights
    are here."""
    said, name = name, name.lower()
    if shape.has_weights:
        raise UsageError(
            f"{shape.name} has weights of its own, in {shape.weights}",
            where=f"--weights {said}",
            cure="leave --weights out, or name a preset",
        )
    if name in _DTYPES:
        return replace(shape, dtype=_DTYPES[name], stored=None)
    if name in _PACKED:
        packed = _PACKED[name]
        return replace(shape, stored=by_bits(packed.name, shape.layer_tensors, shape.num_layers, packed.bits))
    if name in _MIXTURES:
        sharing = shape.num_heads // shape.num_kv_heads
        return replace(shape, stored=gguf_stored(_MIXTURES[name], shape.layer_tensors, shape.num_layers, sharing))
    if name == "lossless":
        return coded_without_loss(replace(shape, stored=None))
    if name == "residual":
        return coded_beside_base(replace(shape, stored=None), DEFAULT_BASE)
    raise UsageError(f"no weights are called {said!r}", where="--weights", cure=f"one of {', '.join(NAMES)}")


def coded_without_loss(shape: ModelShape) -> ModelShape:
    """`shape` with 16-bit weights in the code that `convert --codec lossless` makes; others are left as they are."""
    if shape.stored is not None or shape.dtype not in BITS_16:
        return shape
    name = f"{shape.dtype}, coded without loss"
    return replace(shape, stored=by_bits(name, shape.layer_tensors, shape.num_layers, LOSSLESS_BITS, "lossless"))


def without_code(shape: ModelShape) -> ModelShape:
    """The same decoded while it is loaded, where it is 16-bit weights in one of our codes; others are left as they are."""
    return replace(shape, stored=None) if shape.stored is not None and shape.stored.codec else shape


def coded_beside_base(shape: ModelShape, kind: str) -> ModelShape:
    """`shape` with 16-bit weights in the code that `convert --codec residual` makes beside a base of that `kind`; others are
    left as they are."""
    if shape.stored is not None or shape.dtype not in BITS_16:
        return shape
    name = f"{shape.dtype}, coded beside a base of {kind}"
    stored = by_bits(name, shape.layer_tensors, shape.num_layers, RESIDUAL_BITS[kind], "residual")
    return replace(shape, stored=beside_base(stored, shape.layer_tensors, BASE_KINDS[kind]))


def with_base(shape: ModelShape, kind: str) -> ModelShape:
    """`shape` with a base of that `kind` beside what it is stored as, which only drafts: of weights as they compute, or coded
    without loss."""
    stored = shape.stored or Stored(name=shape.dtype, layers=({},) * shape.num_layers, is_estimated=False)
    return replace(shape, stored=beside_base(stored, shape.layer_tensors, BASE_KINDS[kind]))
