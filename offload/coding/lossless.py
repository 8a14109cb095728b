"""Decoders of the code that lossless_layout.py describes, and the codec of a parameter that is stored in it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from .chunks import row_chunks
from .exceptions import write_exceptions
from .lossless_layout import BLOCK, CODE_BITS, ESCAPE, Coded, num_bytes_of, parts_of, prefix_of
from .lossless_numpy import Bits, join, read_codes
from .tensor_codec import TensorCodec

FORMATS: Final = {torch.bfloat16: "lossless bfloat16", torch.float16: "lossless float16"}
MOST_OF_RAW: Final = 0.97  # what saves less is not worth decoding
_WEIGHT_BYTES: Final = 32  # of what is made on the way
_FEW: Final = 2**14  # weights that torch converts in the thread that asks


def lossless_codec(
    parameter: str, shape: tuple[int, ...], num_escapes: int, num_exceptions: int, dtype: torch.dtype
) -> TensorCodec:
    """Of a parameter of `dtype`, one of FORMATS."""
    parts = parts_of(parameter, math.prod(shape), num_escapes, num_exceptions, dtype)
    prefix = prefix_of(parameter)
    return TensorCodec(format=FORMATS[dtype], parts=parts, decode=LosslessDecoder(prefix), kernel=LosslessKernel(prefix))


def pays(codec: TensorCodec, shape: tuple[int, ...]) -> bool:
    """Whether a parameter of that shape is worth its code."""
    return num_bytes_of(codec.parts) <= MOST_OF_RAW * 2 * math.prod(shape)


@dataclass(frozen=True, slots=True)
class LosslessDecoder:
    """A Decoder of the parts whose names begin with `prefix`. Into the dtype that was coded it writes the very bits, into a
    wider one the same values, into another one those values, rounded once."""

    prefix: str

    def __call__(self, parts: Mapping[str, torch.Tensor], parameter: torch.Tensor) -> None:
        coded = Coded.of(parts, self.prefix)
        if parameter.device.type == "cpu":
            decode_on_cpu(coded, parameter)
        else:
            decode_anywhere(coded, parameter)


@dataclass(frozen=True, slots=True)
class LosslessKernel:
    """The same by a Triton kernel, on a device that has Triton."""

    prefix: str

    def __call__(self, parts: Mapping[str, torch.Tensor], parameter: torch.Tensor) -> None:
        from .lossless_kernel import decode_by_kernel  # triton, which need not be installed

        coded = Coded.of(parts, self.prefix)
        decode_by_kernel(coded, parameter)
        write_exceptions(coded.positions, coded.exceptions, parameter)


def decode_anywhere(coded: Coded, parameter: torch.Tensor) -> None:
    """In operations of torch whose shapes are known beforehand."""
    weights = parameter.view(-1)
    for blocks in row_chunks(coded.num_blocks, BLOCK * _WEIGHT_BYTES, device_type=parameter.device.type):
        _write_bits(_bits_of_blocks(coded, blocks), weights[blocks.start * BLOCK : blocks.stop * BLOCK])
    write_exceptions(coded.positions, coded.exceptions, parameter)


def decode_on_cpu(coded: Coded, parameter: torch.Tensor) -> None:
    """The same, several times as fast: on a CPU a shape may depend on data, as nobody waits."""
    weights, base, offsets = parameter.view(-1), int(coded.base), coded.offsets.tolist()
    low_bytes, codes, escapes = coded.bytes.numpy(), coded.codes.numpy(), coded.escapes.numpy()
    for blocks in row_chunks(coded.num_blocks, BLOCK * _WEIGHT_BYTES, device_type="cpu"):
        start, stop = blocks.start * BLOCK, blocks.stop * BLOCK
        found = read_codes(codes[:, start // 8 : stop // 8], low_bytes[start:stop].size)
        _write_on_cpu(join(low_bytes[start:stop], found, base, escapes, offsets[blocks.start]), weights[start:stop])
    write_exceptions(coded.positions, coded.exceptions, parameter)


def _bits_of_blocks(coded: Coded, blocks: slice) -> torch.Tensor:
    """[N] int16: bfloat16 numbers. Escapes that damage has moved out of `escapes` are taken for its first or last."""
    offsets = coded.offsets[blocks, None]  # [K, 1]
    codes = coded.codes[:, blocks.start * BLOCK // 8 : blocks.stop * BLOCK // 8, None]  # [3, N/8, 1]
    shifts = torch.arange(8, dtype=torch.uint8, device=codes.device)
    distances = torch.zeros(offsets.shape[0] * BLOCK, dtype=torch.uint8, device=codes.device)  # [K * 2048]
    for bit in range(CODE_BITS):
        distances[: codes.shape[1] * 8] |= ((codes[bit] >> shifts & 1) << bit).view(-1)
    is_escape = distances.view(-1, BLOCK) == ESCAPE
    numbers = is_escape.cumsum(1, dtype=torch.int32)  # [K, 2048]: within the block, this weight included
    numbers += offsets - 1
    escapes = coded.escapes[numbers.clamp_(0, coded.escapes.numel() - 1)]
    low_bytes = coded.bytes[blocks.start * BLOCK : blocks.stop * BLOCK].to(torch.int16)  # [N]
    exponents = torch.where(is_escape.view(-1), escapes.view(-1), distances + coded.base)[: low_bytes.numel()]
    return exponents.to(torch.int16) << 7 | low_bytes & 0x7F | (low_bytes & 0x80) << 8


def _write_bits(bits: torch.Tensor, weights: torch.Tensor) -> None:
    """`bits` [N] int16, of bfloat16 numbers."""
    if weights.dtype == torch.bfloat16:
        weights.view(torch.int16).copy_(bits)
    else:
        weights.copy_((bits.to(torch.int32) << 16).view(torch.float32))


def _write_on_cpu(bits: Bits, weights: torch.Tensor) -> None:
    """By numpy, where it can: torch would wake its threads for each of the chunks."""
    if weights.dtype == torch.bfloat16:
        weights.view(torch.int16).numpy().view(np.uint16)[...] = bits
    elif weights.dtype == torch.float32:
        words = weights.view(torch.int32).numpy().view(np.uint32)
        words[...] = bits
        words <<= 16
    else:
        for few, into in zip(torch.from_numpy(bits.view(np.int16)).split(_FEW), weights.split(_FEW), strict=True):
            _write_bits(few, into)
