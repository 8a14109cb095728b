"""Rotary embeddings as GGUF files describe them: in metadata, and, since Llama 3.1, as a tensor of factors."""

import math
import os
import struct
from collections.abc import Sequence
from typing import Final, Protocol

from ..weights.gguf_header import GgufTensor
from ..weights.header import open_regular, pread_exactly

# Of Llama 3.1 and later: the context of its first training, and how many of its waves a frequency has that is not stretched.
LLAMA3: Final = {"original_max_position_embeddings": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


class Keys(Protocol):
    def integer(self, key: str, default: int | None = None) -> int: ...

    def number(self, key: str, default: float | None = None) -> float: ...

    def text(self, key: str, default: str | None = None) -> str: ...

    def has(self, key: str) -> bool: ...


def rope_parameters(keys: Keys, factors: Sequence[float] | None) -> dict[str, object]:
    """transformers' rope_parameters. ValueError for a scaling that we do not know: none is left out."""
    theta = keys.number("rope.freq_base", 10_000.0)
    kind = keys.text("rope.scaling.type", "linear" if keys.has("rope.scale_linear") else "none")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    if factors is not None and any(value != 1 for value in factors):
        if kind != "none":
            raise ValueError(f"it scales rotary frequencies by {kind[:40]!r} and by factors")
        return {"rope_type": "llama3", "rope_theta": theta, **_llama3_parameters(factors, theta)}
    if kind == "none" or (kind == "linear" and factor == 1):
        return {"rope_type": "default", "rope_theta": theta}
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if kind == "yarn":
        return {"rope_type": "yarn", "rope_theta": theta, **_yarn_parameters(keys, factor)}
    raise ValueError(f"it scales rotary frequencies by {kind[:40]!r}, which we do not read: we read linear and yarn")


def read_rope_factors(tensor: GgufTensor, head_dim: int) -> tuple[float, ...]:
    """What frequencies are divided by. ValueError when the tensor has another shape than [head_dim / 2] in float32."""
    if tensor.type_name != "F32" or tensor.shape != (head_dim // 2,):
        raise ValueError(f"its rotary factors are {tensor.type_name} {tensor.shape}, not F32 ({head_dim // 2},)")
    try:
        descriptor, _ = open_regular(tensor.path)
        try:
            data = pread_exactly(descriptor, tensor.num_bytes, tensor.offset_bytes)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ValueError(f"its rotary factors cannot be read: {error.strerror}") from error
    return struct.unpack(f"<{head_dim // 2}f", data)


def llama3_factors(theta: float, num_factors: int, factor: float) -> list[float]:
    """What Llama 3.1 divides its frequencies by: nothing where the trained context has four waves or more, `factor` where it
    has less than one, and between them in between. Source: the reference code of Llama 3.1, apply_scaling."""
    low, high, context = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"], LLAMA3["original_max_position_embeddings"]
    factors: list[float] = []
    for place in range(num_factors):
        waves = context / (2 * math.pi * theta ** (place / num_factors))
        smooth = min(max((waves - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def _llama3_parameters(factors: Sequence[float], theta: float) -> dict[str, object]:
    """The parameters that give these factors. ValueError when there are none."""
    factor = max(factors)
    if math.isfinite(factor) and factor > 1:
        expected = llama3_factors(theta, len(factors), factor)
        if all(math.isclose(one, other, rel_tol=1e-5) for one, other in zip(factors, expected, strict=True)):
            return {"factor": factor, **LLAMA3}
    raise ValueError("it divides rotary frequencies by factors that are not those of Llama 3.1")


def _yarn_parameters(keys: Keys, factor: float) -> dict[str, object]:
    if keys.has("rope.scaling.yarn_log_multiplier"):
        raise ValueError("it scales attention by a logarithm of its own (yarn_log_multiplier)")
    if keys.number("rope.scaling.yarn_ext_factor", 1.0) not in (1.0, -1.0):
        raise ValueError("it mixes rotary frequencies in a way of its own (yarn_ext_factor)")
    scale = keys.number("rope.scaling.attn_factor", keys.number("rope.scaling.yarn_attn_factor", 1.0))
    return {
        "factor": factor,
        "original_max_position_embeddings": keys.integer("rope.scaling.original_context_length"),
        "beta_fast": keys.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": keys.number("rope.scaling.yarn_beta_slow", 1.0),
        **({} if scale == 1 else {"attention_factor": scale * (1 + 0.1 * math.log(factor))}),
    }
