"""What a config.json's quantization_config means for planning: what people call it, and how many bits a weight takes.

offload/coding reads the same object to unpack with, and imports torch; a test holds both to the same names and methods.
"""

from dataclasses import dataclass

from ..coding.base_kinds import BASE_KINDS, BaseKind
from ..coding.config_fields import (
    LOSSLESS_METHOD,
    LOSSLESS_NAME,
    RESIDUAL_METHOD,
    RESIDUAL_NAME,
    Config,
    block_size,
    count,
    group_size,
    one_of,
    quant_method,
    said,
    section,
)

# Of bfloat16 weights as they are trained, and of float16 cast from them: sign and mantissa in 8 bits, an exponent in 3, and the
# escapes of 2 to 4 % of them. Measured; the entropy of exponents alone leaves 0.66.
LOSSLESS_SHARE = 0.705
LOSSLESS_BITS = 16 * LOSSLESS_SHARE
# What a base lacks of such weights, in bits a weight. Measured: on trained weights of 5.5 M parameters.
RESIDUAL_BITS = {"int8": 3.8, "int4": 7.5, "int3": 8.4}
METHODS = (
    "awq",
    "bitsandbytes",
    "compressed-tensors",
    "fbgemm_fp8",
    "fp8",
    "gptq",
    "modelopt",
    "mxfp4",
    LOSSLESS_METHOD,
    RESIDUAL_METHOD,
)
_STRATEGIES = ("tensor", "channel", "group", "tensor_group", "block")


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """`bits` of a weight, its share of scales and zero points included. `codec` and `base` of 16-bit weights that are coded:
    which of ours, and beside which base."""

    name: str
    bits: float
    codec: str = ""
    base: BaseKind | None = None


def read_quantization(config: Config) -> Packed | None:
    """Of the contents of a config.json; None for weights that are stored as they compute. ValueError for a method that we do
    not know, and for one that is described wrongly: it continues a sentence about the file."""
    quantization = section(config, "compression_config") or section(config, "quantization_config")
    if not quantization:
        return None
    match method := quant_method(quantization):
        case "gptq":
            return _integers("GPTQ", one_of(quantization, "bits", [2, 4, 8]), group_size(quantization, "group_size"))
        case "awq":
            group = group_size(quantization, "q_group_size" if "q_group_size" in quantization else "group_size")
            return _integers("AWQ", one_of(quantization, "w_bit" if "w_bit" in quantization else "bits", [4]), group)
        case "fp8" | "fbgemm_fp8":
            return _fp8(block_size(quantization, "weight_block_size"))
        case "modelopt":
            fields = section(quantization, "quantization") or quantization
            algorithm = one_of(fields, "quant_algo", ["FP8", "NVFP4", "MIXED_PRECISION"])
            mixed = Packed(name="FP8 and NVFP4", bits=(8.0 + 4.5) / 2)
            return {"FP8": Packed(name="FP8", bits=8.0), "NVFP4": Packed(name="NVFP4", bits=4.5)}.get(algorithm, mixed)
        case "mxfp4":
            return Packed(name="MXFP4", bits=4.25)
        case "bitsandbytes":
            return Packed(name=one_of(quantization, "bnb_4bit_quant_type", ["nf4", "fp4"]).upper(), bits=4.5)
        case "compressed-tensors":
            return _compressed_tensors(quantization)
        case _ if method == LOSSLESS_METHOD:
            return Packed(name=LOSSLESS_NAME, bits=LOSSLESS_BITS, codec="lossless")
        case _ if method == RESIDUAL_METHOD:
            return _beside_base(quantization)
    raise ValueError(f"has weights that are quantised by {said(method)}; we read {', '.join(METHODS)}")


def _beside_base(quantization: Config) -> Packed:
    kinds = {kind.bits: kind for kind in BASE_KINDS.values()}
    kind = kinds[one_of(quantization, "bits", tuple(kinds))]
    if (group := count(quantization, "group_size")) != kind.group:
        raise ValueError(f"has a group_size of {group}, and those of {kind.bits} bits are of {kind.group}")
    name = f"{RESIDUAL_NAME} of {kind.name}"
    return Packed(name=name, bits=RESIDUAL_BITS[kind.name], codec="residual", base=kind)


def _integers(name: str, bits: int, group: int | None) -> Packed:
    """Each `group` weights share a scale of 16 bits and a zero point; None: so many that these are nothing beside them."""
    return Packed(name=f"{name} int{bits}", bits=bits + ((16 + bits) / group if group else 0.0))


def _fp8(block: tuple[int, int] | None) -> Packed:
    if block is None:
        return Packed(name="FP8", bits=8.0)
    return Packed(name=f"FP8 in blocks of {block[0]}x{block[1]}", bits=8 + 32 / (block[0] * block[1]))


def _compressed_tensors(quantization: Config) -> Packed:
    """Of several groups, which differ in what they are of, the mean."""
    groups = section(quantization, "config_groups")
    weights = [section(section(groups, name), "weights") for name in groups]
    schemes = dict.fromkeys(_scheme(of_group) for of_group in weights if of_group)
    if not schemes:
        raise ValueError("has no config_groups with weights")
    name = " and ".join(dict.fromkeys(scheme.name for scheme in schemes))
    return Packed(name=f"compressed-tensors {name}", bits=sum(scheme.bits for scheme in schemes) / len(schemes))


def _scheme(weights: Config) -> Packed:
    """Groups of four-bit floats have a scale of 8 bits, others one of 16."""
    is_float = one_of(weights, "type", ["int", "float"], "int") == "float"
    bits = one_of(weights, "num_bits", [4, 8] if is_float else [2, 4, 8], 8)
    given = weights.get("group_size") not in (None, -1)
    strategy = one_of(weights, "strategy", _STRATEGIES, "group" if given else "tensor")
    group = count(weights, "group_size") if strategy in ("group", "tensor_group") else None
    if not is_float:
        zero_point_bits = 0 if weights.get("symmetric", True) else bits
        return Packed(name=f"int{bits}", bits=bits + ((16 + zero_point_bits) / group if group else 0.0))
    if bits == 4:
        return Packed(name="MXFP4" if group == 32 else "NVFP4", bits=4.25 if group == 32 else 4.5)
    return Packed(name="MXFP8" if group == 32 else "FP8", bits=8.25 if group == 32 else 8.0)
