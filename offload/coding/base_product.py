"""Products with a base: what a draft computes, of which the base is all there is. Knows neither layers nor models."""

import torch
import torch.nn.functional as F

from .base import decode_base
from .base_kinds import BaseKind
from .base_layout import Base
from .chunks import row_chunks


def base_product(x: torch.Tensor, base: Base, kind: BaseKind, *, kernels: bool) -> torch.Tensor:
    """[..., N] in the dtype of `x` [..., K]: its product with the transposed matrix that `base` stands for, N x K.

    `kernels`: by a Triton kernel, which sums in float32 and rounds once; else the matrix is decoded in pieces, each rounded to
    the dtype, and multiplied by torch. The two agree but for that rounding. On the meta device a shape is all that is made.
    """
    num_outputs = base.codes.shape[0]
    shape = *x.shape[:-1], num_outputs
    if x.device.type == "meta":
        return x.new_empty(shape)
    rows = x.reshape(-1, x.shape[-1]).contiguous()  # [M, K]
    product = rows.new_empty(len(rows), num_outputs)
    if kernels:
        from .base_product_kernel import product_by_kernel  # triton, which need not be installed

        product_by_kernel(rows, base, kind, product)
    else:
        _product_by_pieces(rows, base, kind, product)
    return product.view(shape)


def _product_by_pieces(x: torch.Tensor, base: Base, kind: BaseKind, product: torch.Tensor) -> None:
    num_outputs, num_columns = product.shape[1], x.shape[1]
    for outputs in row_chunks(num_outputs, num_columns * x.itemsize, device_type=x.device.type):
        piece = Base(codes=base.codes[outputs], scale=base.scale[outputs], zero=base.zero[outputs])
        weight = x.new_empty(outputs.stop - outputs.start, num_columns)
        decode_base(piece, kind, weight)
        product[:, outputs] = F.linear(x, weight)
