"""What a config.json's quantization_config means for planning: what people call it, and how many bits a weight takes.

offload/coding reads the same object to unpack with, and imports torch; a test holds both to the same names and methods.
"""

from collections.abc import Mapping
from dataclasses import dataclass

Config = Mapping[str, object]

LOSSLESS_METHOD, LOSSLESS_NAME = "treestream_lossless", "16 bit, coded without loss"
# Of bfloat16 weights as they are trained, and of float16 cast from them: sign and mantissa in 8 bits, an exponent in 3, and the
# escapes of 2 to 4 % of them. Measured; the entropy of exponents alone leaves 0.66.
LOSSLESS_SHARE = 0.705
LOSSLESS_BITS = 16 * LOSSLESS_SHARE
METHODS = ("awq", "bitsandbytes", "compressed-tensors", "fbgemm_fp8", "fp8", "gptq", "modelopt", "mxfp4", LOSSLESS_METHOD)


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """`bits` of a weight, its share of scales and zero points included."""

    name: str
    bits: float


def read_quantization(config: Config) -> Packed | None:
    """Of the object `config` of a config.json; None for weights that are stored as they compute. ValueError for a method that
    we do not know, and for one that is described wrongly."""
    quantization = config.get("quantization_config") or config.get("compression_config")
    if not quantization:
        return None
    if not isinstance(quantization, Mapping):
        raise ValueError("quantization_config is no object")
    match method := _method(quantization):
        case "gptq" | "awq":
            bits = _number(quantization, "bits" if "bits" in quantization else "w_bit")
            group = _number(quantization, "group_size" if "group_size" in quantization else "q_group_size")
            shared = (16 + bits) / group if group > 0 else 0.0  # a scale of 16 bits, and a zero point
            return Packed(name=f"{method.upper()} int{bits}", bits=bits + shared)
        case "fp8" | "fbgemm_fp8":
            return _fp8(quantization.get("weight_block_size"))
        case "modelopt":
            inner = quantization.get("quantization")
            algorithm = (inner if isinstance(inner, Mapping) else quantization).get("quant_algo")
            if algorithm not in ("FP8", "NVFP4"):
                raise ValueError(f"quantization_config has quant_algo {str(algorithm)[:40]!r}, not FP8 or NVFP4")
            return Packed(name=str(algorithm), bits=8.0 if algorithm == "FP8" else 4.5)
        case "mxfp4":
            return Packed(name="MXFP4", bits=4.25)
        case "bitsandbytes":
            return Packed(name=str(quantization.get("bnb_4bit_quant_type", "fp4")).upper()[:8], bits=4.5)
        case "compressed-tensors":
            return _compressed_tensors(quantization)
        case method if method == LOSSLESS_METHOD:
            return Packed(name=LOSSLESS_NAME, bits=LOSSLESS_BITS)
    raise ValueError(f"quantization_config has quant_method {str(method)[:40]!r}; we read {', '.join(METHODS)}")


def _method(quantization: Config) -> object:
    """Old files name no method: their fields are one's own."""
    if (method := quantization.get("quant_method")) is not None:
        return method
    if "config_groups" in quantization:
        return "compressed-tensors"
    return "bitsandbytes" if "load_in_4bit" in quantization else None


def _fp8(block: object) -> Packed:
    match block:
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return Packed(name=f"FP8 in blocks of {rows}x{columns}", bits=8 + 32 / (rows * columns))
        case None:
            return Packed(name="FP8", bits=8.0)
    raise ValueError("quantization_config has a weight_block_size that is not two sizes")


def _compressed_tensors(quantization: Config) -> Packed:
    """Of several groups, which differ in what they are of, the mean."""
    groups = quantization.get("config_groups")
    schemes = [
        _scheme(group["weights"])
        for group in (groups.values() if isinstance(groups, Mapping) else ())
        if isinstance(group, Mapping) and isinstance(group.get("weights"), Mapping)
    ]
    if not schemes:
        raise ValueError("quantization_config has no config_groups with weights")
    name = " and ".join(dict.fromkeys(scheme.name for scheme in schemes))
    return Packed(name=name, bits=sum(scheme.bits for scheme in schemes) / len(schemes))


def _scheme(weights: Config) -> Packed:
    """A scale has 16 bits, of a group of four-bit floats 8: NVFP4 has one for 16 weights, MXFP4 one for 32."""
    bits, group = _number(weights, "num_bits"), weights.get("group_size") or -1
    size = group if isinstance(group, int) and group > 0 else 0
    if weights.get("type") == "float":
        kind = {16: "NVFP4", 32: "MXFP4"}.get(size, "FP4") if bits == 4 else "MXFP8" if size == 32 else "FP8"
        return Packed(name=f"compressed-tensors {kind}", bits=bits + (8 / size if size else 0.0))
    shared = (16 if weights.get("symmetric", True) else 16 + bits) / size if size else 0.0
    return Packed(name=f"compressed-tensors int{bits}", bits=bits + shared)


def _number(config: Config, key: str) -> int:
    value = config.get(key)
    if type(value) is not int or not -1 <= value <= 2**20 or value == 0:
        raise ValueError(f"quantization_config has {key} {str(value)[:40]!r}, which is no size")
    return value
