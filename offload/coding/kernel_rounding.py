"""How kernels of Triton round what they computed. Imported by modules of kernels only: it imports triton.

Who launches one says enable_fp_fusion=False: a product and a sum in one instruction round once, where torch rounds twice.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """`value`, float32, in the float `dtype`: to the nearest, ties to even, as torch rounds. Written out for bfloat16, for
    which Triton's interpreter truncates."""
    if dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # Rounding would carry the payload of a NaN into its sign.
        return tl.where(value != value, 0x7FC0, nearest).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(dtype)
