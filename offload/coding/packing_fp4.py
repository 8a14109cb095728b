"""Four-bit floats as gpt-oss, NVIDIA's ModelOpt and compressed-tensors write them. fp4.py says how they lie."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from .config_fields import one_of, section
from .eight_bits import eight_bits
from .fp4 import Fp4Decoder, Fp4Groups, Fp4Kernel
from .scales import FP8, POWERS
from .stored_parts import Beside, Shape, last_name, matrix, need, whole_groups
from .tensor_codec import TensorCodec

MXFP4_GROUP, NVFP4_GROUP = 32, 16
_ONE_NUMBER: Collection[Shape] = ((), (1,))


@dataclass(frozen=True, slots=True)
class Mxfp4Packing:
    """Experts of gpt-oss: [experts, columns, rows], and of that [experts, rows, columns] in blocks."""

    @property
    def name(self) -> str:
        return "MXFP4"

    def codec_of(self, parameter: str, shape: Shape, beside: Beside) -> TensorCodec | None:
        own = last_name(parameter)
        packed, scale = f"{own}_blocks", f"{own}_scales"
        if own in beside or packed not in beside:
            return None
        if len(shape) != 3 or 0 in shape:
            raise ValueError(f"is packed and of shape {list(shape)}, not of three sides")
        experts, columns, rows = shape
        num_groups = whole_groups(columns, MXFP4_GROUP, "columns")
        parts = (
            need(beside, packed, [(experts, rows, num_groups, MXFP4_GROUP // 2)], [torch.uint8]),
            need(beside, scale, [(experts, rows, num_groups)], POWERS, is_scale=True),
        )
        groups = Fp4Groups(packed=packed, scale=scale, group=MXFP4_GROUP, transposed=True)
        return TensorCodec(format=self.name, parts=parts, decode=Fp4Decoder(groups), kernel=Fp4Kernel(groups))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptPacking:
    name: str

    def codec_of(self, parameter: str, shape: Shape, beside: Beside) -> TensorCodec | None:
        own = last_name(parameter)
        if own not in beside or beside[own].dtype not in {torch.uint8, *FP8}:
            return None
        if "pre_quant_scale" in beside:
            raise ValueError("has a pre_quant_scale, for activations that are scaled: we do not compute that")
        if beside[own].dtype in FP8:
            return eight_bits("FP8", parameter, shape, beside, dtypes=FP8, scale="weight_scale")
        return nvfp4(shape, beside, packed=own, whole="weight_scale_2", divides=False)


def nvfp4(shape: Shape, beside: Beside, *, packed: str, whole: str, divides: bool) -> TensorCodec:
    """ValueError as in Packing."""
    rows, columns = matrix(shape)
    num_groups = whole_groups(columns, NVFP4_GROUP, "columns")
    parts = (
        need(beside, packed, [(rows, columns // 2)], [torch.uint8]),
        need(beside, "weight_scale", [(rows, num_groups)], [torch.float8_e4m3fn], is_scale=True),
        need(beside, whole, _ONE_NUMBER, [torch.float32], is_scale=True),
    )
    groups = Fp4Groups(packed=packed, scale="weight_scale", group=NVFP4_GROUP, whole=whole, divides=divides)
    return TensorCodec(format="NVFP4", parts=parts, decode=Fp4Decoder(groups), kernel=Fp4Kernel(groups))


def mxfp4(shape: Shape, beside: Beside, *, packed: str) -> TensorCodec:
    """ValueError as in Packing."""
    rows, columns = matrix(shape)
    num_groups = whole_groups(columns, MXFP4_GROUP, "columns")
    parts = (
        need(beside, packed, [(rows, columns // 2)], [torch.uint8]),
        need(beside, "weight_scale", [(rows, num_groups)], POWERS, is_scale=True),
    )
    groups = Fp4Groups(packed=packed, scale="weight_scale", group=MXFP4_GROUP)
    return TensorCodec(format="MXFP4", parts=parts, decode=Fp4Decoder(groups), kernel=Fp4Kernel(groups))


def read_mxfp4(config: Mapping[str, object]) -> Mxfp4Packing:
    return Mxfp4Packing()


def read_modelopt(config: Mapping[str, object]) -> ModelOptPacking:
    """Also where the fields are in an object of their own, as in hf_quant_config.json."""
    algorithm = one_of(section(config, "quantization") or config, "quant_algo", ["FP8", "NVFP4", "MIXED_PRECISION"])
    return ModelOptPacking(name="FP8 and NVFP4" if algorithm == "MIXED_PRECISION" else algorithm)
