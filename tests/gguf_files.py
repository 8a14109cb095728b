"""Tiny GGUF files, written by the format's own library, and the same weights in transformers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import EOS, VOCAB_SIZE
from offload.coding.gguf_types import BLOCKS, FILE_TYPES, FLOATS

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 160,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": EOS,
    "pad_token_id": None,
    "sliding_window": None,
}
# Where a block's scale is, and its minimum, with the mean of the integers that the minimum takes away.
_PLACES: Mapping[str, tuple[tuple[int, float], ...]] = {
    "Q8_0": ((0, 1),),
    "Q4_0": ((0, 1),),
    "Q4_1": ((0, 1), (2, -7.5)),
    "Q5_0": ((0, 1),),
    "Q5_1": ((0, 1), (2, -15.5)),
    "Q2_K": ((80, 1), (82, 1.5)),
    "Q3_K": ((108, 1),),
    "Q4_K": ((0, 1), (2, 7.5)),
    "Q5_K": ((0, 1), (2, 15.5)),
    "Q6_K": ((208, 1),),
    "IQ4_NL": ((0, 1),),
    "IQ4_XS": ((0, 1),),
    "MXFP4": (),
}
NOTHING: Mapping[int, str] = MappingProxyType({})
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{name}_proj": f"attn_{name}" for name in "qkv"},
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    **{f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
}


def write_gguf(
    path: Path,
    type_name: str = "Q8_0",
    *,
    others: Mapping[int, str] = NOTHING,
    family: str = "llama",
    outside: str = "Q8_0",
    seed: int = 0,
    metadata: Mapping[str, Any] | None = None,
    factors: Sequence[float] | None = None,
    **changes: Any,
) -> torch.nn.Module:
    """A model whose matrices in layers are of `type_name`, or as `others` has it by layer, those outside of `outside`.
    `metadata` adds to what the file says, under full keys, `factors` are its rope_freqs. Returns the model of transformers, in
    float32, with the same weights."""
    config = AutoConfig.for_model(family, **{**SIZES, **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    writer = gguf.GGUFWriter(path, family)
    _write_config(writer, config, type_name)
    for key, value in (metadata or {}).items():
        _add(writer, key, value)
    rng = np.random.default_rng(seed)
    for name, parameter in model.named_parameters():
        stem, _, last = name.rpartition(".")
        of_layer = others.get(int(name.split(".")[2]), type_name) if ".layers." in name else outside
        kind = "F32" if parameter.dim() == 1 else of_layer
        stored, weights = _random(kind, tuple(parameter.shape), rng, is_norm=stem.endswith("norm"))
        parameter.data.copy_(weights)
        if family == "llama" and stem.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if stem.endswith("q_proj") else config.num_key_value_heads
            stored = in_pairs(stored, heads)
        writer.add_tensor(_gguf_name(stem) + "." + last, stored, raw_dtype=gguf.GGMLQuantizationType[kind])
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", np.array(factors, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model  # type: ignore[no-any-return]


def in_pairs(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """What a converter of llama.cpp does to the rows of queries and keys."""
    return rows.reshape(num_heads, 2, rows.shape[0] // num_heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def _gguf_name(stem: str) -> str:
    if not stem.startswith("model.layers."):
        return _NAMES[stem]
    _, _, layer, place = stem.split(".", 3)
    return f"blk.{layer}.{_NAMES[place]}"


def _write_config(writer: gguf.GGUFWriter, config: Any, type_name: str) -> None:
    numbers = [number for number, name in FILE_TYPES.items() if name in (type_name, f"{type_name}_S")]
    if numbers:
        writer.add_file_type(numbers[0])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _random(kind: str, shape: tuple[int, ...], rng: np.random.Generator, *, is_norm: bool) -> tuple[np.ndarray, torch.Tensor]:
    """(as it is stored, its values): random weights, wide enough for a greedy text to vary."""
    if kind in FLOATS:
        values = torch.from_numpy(rng.normal(1.0 if is_norm else 0.0, 0.1, shape).astype(np.float32))
        if kind == "BF16":
            values = values.bfloat16()
            return values.view(torch.uint8).numpy().reshape(*shape[:-1], -1), values.float()
        stored = values.numpy().astype(np.float16 if kind == "F16" else np.float32)
        return stored, torch.from_numpy(stored.astype(np.float32))
    block = BLOCKS[kind]
    blocks = rng.integers(0, 256, (shape[0] * shape[1] // block.num_weights, block.num_bytes), dtype=np.uint8)
    _set_scales(kind, blocks, 1.0)
    deviation = float(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind]).std())
    _set_scales(kind, blocks, 0.1 / deviation)
    stored = blocks.reshape(shape[0], -1)
    return stored, torch.from_numpy(gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[kind]))


def _set_scales(kind: str, blocks: np.ndarray, scale: float) -> None:
    for place, share in _PLACES[kind]:
        blocks[:, place : place + 2] = np.array([scale * share], dtype=np.float16).view(np.uint8)
    if kind == "MXFP4":
        blocks[:, 0] = 127 + round(np.log2(scale))
