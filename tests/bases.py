"""Bases for tests, made and read by hand: slowly, and by nothing that is tested."""

from dataclasses import replace

import torch

from offload.coding.base_kinds import BaseKind
from offload.coding.base_layout import Base, base_parts, base_prefix
from offload.typed_model import TypedModel

NAME = "linear.weight"
PREFIX = base_prefix(NAME)


def any_base(num_rows: int, num_columns: int, kind: BaseKind, seed: int = 0) -> Base:
    """Of codes, scales and zero points that are nobody's."""
    generator = torch.Generator().manual_seed(seed)
    parts = {part.name: torch.empty(part.shape, dtype=part.dtype) for part in base_parts(NAME, (num_rows, num_columns), kind)}
    base = Base.of(parts, PREFIX)
    base.codes.random_(0, 256, generator=generator)
    base.zero.random_(0, 1 << kind.bits, generator=generator)
    base.scale.copy_(torch.rand(base.scale.shape, generator=generator) * 0.01)
    return base


def nearest_base(weight: torch.Tensor, kind: BaseKind) -> Base:
    """Of a matrix: each weight to the nearest code of the range of its group."""
    num_rows, num_columns = weight.shape
    parts = {part.name: torch.zeros(part.shape, dtype=part.dtype) for part in base_parts(NAME, weight.shape, kind)}
    base, top = Base.of(parts, PREFIX), (1 << kind.bits) - 1
    codes = torch.zeros(num_rows, num_columns, dtype=torch.int64)
    for number in range(base.scale.shape[1]):
        columns = slice(number * kind.group, min((number + 1) * kind.group, num_columns))
        values = weight[:, columns].float()
        low, high = values.amin(1).clamp(max=0), values.amax(1).clamp(min=0)
        scale = ((high - low) / top).bfloat16()
        zero = (-low / scale.float().clamp(min=1e-30)).round().clamp(0, top)
        steps = (values / scale.float().clamp(min=1e-30)[:, None]).round() + zero[:, None]
        codes[:, columns] = steps.clamp(0, top).long()
        base.scale[:, number], base.zero[:, number] = scale, zero.to(torch.uint8)
    bits = (codes[..., None] >> torch.arange(kind.bits)) & 1  # [N, K, bits]
    padded = torch.zeros(num_rows, 8 * base.codes.shape[1], dtype=torch.int64)
    padded[:, : num_columns * kind.bits] = bits.flatten(1)
    base.codes.copy_((padded.unflatten(1, (-1, 8)) << torch.arange(8)).sum(-1))
    return base


def matrix_of(base: Base, num_columns: int, kind: BaseKind) -> torch.Tensor:
    """[N, K] float64 of `base`, read bit by bit."""
    bits = (base.codes[..., None].long() >> torch.arange(8)) & 1  # [N, bytes, 8]
    of_code = bits.flatten(1)[:, : num_columns * kind.bits].unflatten(1, (num_columns, kind.bits))
    codes = (of_code << torch.arange(kind.bits)).sum(-1)  # [N, K]
    group = torch.arange(num_columns) // kind.group
    steps: torch.Tensor = codes - base.zero.long()[:, group]
    return steps.double() * base.scale.double()[:, group]


def with_bases(model: TypedModel, kind: BaseKind) -> TypedModel:
    """Of every matrix of its decoder layers."""
    prefix = f"{model.architecture.prefix}."
    matrices = {name: shape for name, shape in model.architecture.expected_tensors.items() if len(shape) == 2}
    bases = {name: base_parts(name, shape, kind) for name, shape in matrices.items() if name.startswith(prefix)}
    return replace(model, bases=bases, base=kind)
