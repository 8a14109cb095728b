"""GPTQ and AWQ: integers in groups along the input. int_groups.py says how they lie."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .config_fields import group_size, one_of, said, section
from .int_groups import WORD_BITS, IntGroups, IntGroupsDecoder, IntGroupsKernel
from .scales import NUMBERS
from .stored_parts import Beside, Shape, last_name, matrix, need, whole_groups
from .tensor_codec import TensorCodec


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqPacking:
    """`group` is in columns, None for all of them. `zero_points_off`: stored one smaller, as the first format does."""

    bits: int
    group: int | None
    zero_points_off: bool

    @property
    def name(self) -> str:
        return f"GPTQ int{self.bits}"

    def codec_of(self, parameter: str, shape: Shape, beside: Beside) -> TensorCodec | None:
        if last_name(parameter) != "weight" or "weight" in beside or "qweight" not in beside:
            return None
        rows, columns = matrix(shape)
        group = self.group or columns
        num_groups = whole_groups(columns, group, "columns")
        per_word = WORD_BITS // self.bits
        row_words, column_words = whole_groups(rows, per_word, "rows"), whole_groups(columns, per_word, "columns")
        parts = [
            need(beside, "qweight", [(column_words, rows)], [torch.int32]),
            need(beside, "qzeros", [(num_groups, row_words)], [torch.int32]),
            need(beside, "scales", [(num_groups, rows)], NUMBERS, is_scale=True),
        ]
        if "g_idx" in beside:
            parts.append(need(beside, "g_idx", [(columns,)], [torch.int32]))
        groups = IntGroups(
            layout="columns",
            bits=self.bits,
            group=group,
            words="qweight",
            scale="scales",
            zero_points="qzeros",
            zero_points_off=self.zero_points_off,
            order="g_idx" if "g_idx" in beside else None,
        )
        decode, kernel = IntGroupsDecoder(groups), IntGroupsKernel(groups)
        return TensorCodec(format=self.name, parts=tuple(parts), decode=decode, kernel=kernel)


@dataclass(frozen=True, slots=True, kw_only=True)
class AwqPacking:
    """`group` is in columns, None for all of them."""

    group: int | None

    @property
    def name(self) -> str:
        return "AWQ int4"

    def codec_of(self, parameter: str, shape: Shape, beside: Beside) -> TensorCodec | None:
        if last_name(parameter) != "weight" or "weight" in beside or "qweight" not in beside:
            return None
        rows, columns = matrix(shape)
        group = self.group or columns
        num_groups, row_words = whole_groups(columns, group, "columns"), whole_groups(rows, 8, "rows")
        parts = (
            need(beside, "qweight", [(columns, row_words)], [torch.int32]),
            need(beside, "qzeros", [(num_groups, row_words)], [torch.int32]),
            need(beside, "scales", [(num_groups, rows)], NUMBERS, is_scale=True),
        )
        groups = IntGroups(
            layout="awq",
            bits=4,
            group=group,
            words="qweight",
            scale="scales",
            zero_points="qzeros",
            zero_points_off=False,
            order=None,
        )
        return TensorCodec(format=self.name, parts=parts, decode=IntGroupsDecoder(groups), kernel=IntGroupsKernel(groups))


def read_gptq(config: Mapping[str, object]) -> GptqPacking:
    one_of(config, "pack_dtype", ["int32"], "int32")
    if config.get("is_marlin_format"):
        raise ValueError("has is_marlin_format, a layout that we do not read")
    for pattern in section(config, "dynamic"):
        if not pattern.startswith("-:"):  # what is left as it is; others are packed otherwise
            raise ValueError(f"has dynamic {said(pattern)}: modules that are packed otherwise, which we do not read")
    return GptqPacking(
        bits=one_of(config, "bits", [2, 4, 8]),
        group=group_size(config, "group_size"),
        zero_points_off=one_of(config, "checkpoint_format", ["gptq", "gptq_v2"], "gptq") == "gptq",
    )


def read_awq(config: Mapping[str, object]) -> AwqPacking:
    one_of(config, "w_bit" if "w_bit" in config else "bits", [4])
    one_of(config, "version", ["gemm", "GEMM"], "gemm")
    return AwqPacking(group=group_size(config, "q_group_size" if "q_group_size" in config else "group_size"))
