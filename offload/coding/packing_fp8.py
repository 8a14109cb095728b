"""FP8 as transformers' method `fp8` and FBGEMM's `fbgemm_fp8` write it, and other shippers of FP8 do: a weight and its scale,
one for all of it, for each row or for each block. Scales of activations are left alone: weights are unpacked, activations
are not."""

from collections.abc import Mapping
from dataclasses import dataclass

from .config_fields import block_size
from .eight_bits import eight_bits
from .scales import FP8
from .stored_parts import Beside, Shape, last_name
from .tensor_codec import TensorCodec

SCALES = ("weight_scale_inv", "weight_scale")  # the first is named for how it was made; both multiply


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Packing:
    """`block` is (rows, columns), where blocks have scales."""

    block: tuple[int, int] | None

    @property
    def name(self) -> str:
        return "FP8" if self.block is None else f"FP8 in blocks of {self.block[0]}x{self.block[1]}"

    def codec_of(self, parameter: str, shape: Shape, beside: Beside) -> TensorCodec | None:
        own = last_name(parameter)
        if own not in beside or beside[own].dtype not in FP8:
            return None
        scale = next((name for name in SCALES if name in beside), SCALES[0])
        return eight_bits("FP8", parameter, shape, beside, dtypes=FP8, scale=scale, block=self.block)


def read_fp8(config: Mapping[str, object]) -> Fp8Packing:
    return Fp8Packing(block=block_size(config, "weight_block_size"))
