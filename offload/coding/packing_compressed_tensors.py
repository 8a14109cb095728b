"""compressed-tensors: groups of modules, each with a scheme of its own. Which scheme a parameter has is told by its tensors,
whose shapes one scheme alone fits; patterns of module names are not read.

Source: compressed-tensors 0.20, the library of the format: its compressors, QuantizationArgs and QuantizationConfig.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from .config_fields import Config, block_size, count, one_of, said, section
from .eight_bits import eight_bits
from .int_groups import WORD_BITS, IntGroups, IntGroupsDecoder, IntGroupsKernel
from .packing_fp4 import MXFP4_GROUP, NVFP4_GROUP, mxfp4, nvfp4
from .scales import FP8, NUMBERS
from .stored_parts import Beside, Shape, last_name, matrix, need, whole_groups
from .tensor_codec import TensorCodec

# Of the whole checkpoint. What is packed in others, pruned to two of four or in six bits, has tensors that we do not read.
_FORMATS = (
    "dense",
    "naive-quantized",
    "float-quantized",
    "int-quantized",
    "pack-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "mixed-precision",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """Of weights. `block` is (rows, columns) that share a scale, None where a row or the whole tensor does."""

    kind: Literal["int", "float"]
    bits: int
    block: tuple[int, int] | None
    symmetric: bool

    @property
    def format(self) -> str:
        if self.kind == "int":
            return f"int{self.bits}"
        group = (1, MXFP4_GROUP)
        if self.bits == 4:
            return "MXFP4" if self.block == group else "NVFP4"
        return "MXFP8" if self.block == group else "FP8"


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedTensorsPacking:
    schemes: tuple[Scheme, ...]

    @property
    def name(self) -> str:
        return f"compressed-tensors {' and '.join(dict.fromkeys(scheme.format for scheme in self.schemes))}"

    def codec_of(self, parameter: str, shape: Shape, beside: Beside) -> TensorCodec | None:
        own = last_name(parameter)
        if own in beside:
            kind = {torch.int8: "int", **dict.fromkeys(FP8, "float")}.get(beside[own].dtype)
            fitting = [scheme for scheme in self.schemes if scheme.kind == kind and (kind == "int" or scheme.bits == 8)]
        elif own == "weight" and "weight_packed" in beside:
            kind = "float" if beside["weight_packed"].dtype == torch.uint8 else "int"
            fitting = [scheme for scheme in self.schemes if scheme.kind == kind and (kind == "int" or scheme.bits == 4)]
        else:
            return None
        if kind is None:
            return None
        problem = f"is packed as {kind}, as no group of the config is"
        for scheme in fitting:
            try:
                return _packed(scheme, shape, beside) if own not in beside else _plain(scheme, parameter, shape, beside)
            except ValueError as error:
                problem = str(error)
        raise ValueError(problem)


def _plain(scheme: Scheme, parameter: str, shape: Shape, beside: Beside) -> TensorCodec:
    """A weight under its own name: FP8, or integers that have eight bits each, however few they need."""
    return eight_bits(
        scheme.format,
        parameter,
        shape,
        beside,
        dtypes=FP8 if scheme.kind == "float" else {torch.int8},
        scale="weight_scale",
        zero_point=None if scheme.symmetric else "weight_zero_point",
        block=scheme.block,
    )


def _packed(scheme: Scheme, shape: Shape, beside: Beside) -> TensorCodec:
    if scheme.kind == "float":
        if scheme.format == "MXFP4":
            return mxfp4(shape, beside, packed="weight_packed")
        return nvfp4(shape, beside, packed="weight_packed", whole="weight_global_scale", divides=True)
    rows, columns = matrix(shape)
    group = columns if scheme.block is None else scheme.block[1]
    num_groups = whole_groups(columns, group, "columns")
    parts = [
        need(beside, "weight_packed", [(rows, -(-columns * scheme.bits // WORD_BITS))], [torch.int32]),
        need(beside, "weight_scale", [(rows, num_groups)], NUMBERS, is_scale=True),
    ]
    if not scheme.symmetric:
        parts.append(need(beside, "weight_zero_point", [(-(-rows * scheme.bits // WORD_BITS), num_groups)], [torch.int32]))
    if "weight_g_idx" in beside:
        parts.append(need(beside, "weight_g_idx", [(columns,)], [torch.int32, torch.int64]))
    groups = IntGroups(
        layout="rows",
        bits=scheme.bits,
        group=group,
        words="weight_packed",
        scale="weight_scale",
        zero_points=None if scheme.symmetric else "weight_zero_point",
        zero_points_off=False,
        order="weight_g_idx" if "weight_g_idx" in beside else None,
    )
    decode, kernel = IntGroupsDecoder(groups), IntGroupsKernel(groups)
    return TensorCodec(format=scheme.format, parts=tuple(parts), decode=decode, kernel=kernel)


def read_compressed_tensors(config: Mapping[str, object]) -> CompressedTensorsPacking:
    one_of(config, "format", _FORMATS, "dense")
    one_of(section(config, "sparsity_config"), "format", ["dense"], "dense")
    if section(config, "transform_config").get("config_groups"):
        raise ValueError("has a transform_config: activations that are turned, which we do not compute")
    schemes = []
    for name in (groups := section(config, "config_groups")):
        group = section(groups, name)
        one_of(group, "format", _FORMATS, "dense")
        if weights := section(group, "weights"):
            schemes.append(_scheme(weights))
    if not schemes:
        raise ValueError("has no config_groups with weights")
    return CompressedTensorsPacking(schemes=tuple(dict.fromkeys(schemes)))


def _scheme(weights: Config) -> Scheme:
    kind: Literal["int", "float"] = "float" if one_of(weights, "type", ["int", "float"], "int") == "float" else "int"
    bits = one_of(weights, "num_bits", [4, 8] if kind == "float" else [2, 4, 8], 8)
    given = weights.get("group_size") not in (None, -1)
    strategy = one_of(
        weights, "strategy", ["tensor", "channel", "group", "tensor_group", "block"], "group" if given else "tensor"
    )
    block = None
    if strategy in ("group", "tensor_group"):
        block = (1, count(weights, "group_size"))
    elif strategy == "block" and (block := block_size(weights, "block_structure")) is None:
        raise ValueError("has the strategy block and no block_structure")
    if kind == "float" and bits == 4 and block not in ((1, MXFP4_GROUP), (1, NVFP4_GROUP)):
        raise ValueError(f"has group_size {said(weights.get('group_size'))} of 4-bit floats, not 16 or 32")
    symmetric = weights.get("symmetric", True)
    if type(symmetric) is not bool or (kind == "float" and not symmetric):
        raise ValueError(f"has symmetric {said(symmetric)} of {kind}")
    return Scheme(kind=kind, bits=bits, block=block, symmetric=symmetric)
