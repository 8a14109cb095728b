"""The types of tensors in GGUF files: their numbers, and the size of their blocks. Without torch.

Source: ggml's public headers (enum ggml_type) and its specification of the file (docs/gguf.md).
"""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """What a tensor's rows are made of: `num_weights` weights in `num_bytes` bytes."""

    num_weights: int
    num_bytes: int


def _block(num_weights: int, num_bytes: int) -> Block:
    return Block(num_weights=num_weights, num_bytes=num_bytes)


BLOCKS: Final = {
    "F32": _block(1, 4),
    "F16": _block(1, 2),
    "BF16": _block(1, 2),
    "Q8_0": _block(32, 34),
    "Q4_0": _block(32, 18),
    "Q4_1": _block(32, 20),
    "Q5_0": _block(32, 22),
    "Q5_1": _block(32, 24),
    "Q2_K": _block(256, 84),
    "Q3_K": _block(256, 110),
    "Q4_K": _block(256, 144),
    "Q5_K": _block(256, 176),
    "Q6_K": _block(256, 210),
    "IQ4_NL": _block(32, 18),
    "IQ4_XS": _block(256, 136),
    "MXFP4": _block(32, 17),
}  # of the types that we read
FLOATS: Final = ("F32", "F16", "BF16")  # stored as they are computed with

TYPE_NAMES: Final = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    30: "BF16",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
    41: "Q1_0",
}  # of those that have a name

FILE_TYPES: Final = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    21: "Q2_K_S",
    25: "IQ4_NL",
    30: "IQ4_XS",
    32: "BF16",
    38: "MXFP4",
}  # general.file_type: mixtures of types, of those that we read
