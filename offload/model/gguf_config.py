"""What a GGUF file says of its model, as the contents of a config.json, and which parameter each of its tensors is.

Needs no torch. Sources of keys and names: ggml's docs/gguf.md and gguf-py's constants.py.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from ..coding.gguf_types import FILE_TYPES
from ..errors import ModelError
from ..weights.gguf_cursor import Value
from ..weights.gguf_header import GgufHeader
from .gguf_rope import read_rope_factors, rope_parameters

FAMILIES: Final = ("llama", "qwen2", "qwen3")  # by general.architecture, which is transformers' model_type, too
ROPE_FACTORS: Final = "rope_freqs.weight"

_OUTSIDE: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_TENSOR = re.compile(r"blk\.(\d{1,4})\.(\w+)\.(weight|bias)")

# Control tokens that end a text whatever the metadata says, as in llama.cpp: most files name one end, and chats use another.
END_TEXTS: Final = frozenset(
    {
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<end_of_turn>",
        "<EOT>",
        "_<EOT>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    }
)
DTYPES: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
CONTROL: Final = 3  # in tokenizer.ggml.token_type


@dataclass(frozen=True, slots=True)
class Keys:
    """The metadata of a file, whose values ValueError refuses where they are not of the type asked for."""

    metadata: Mapping[str, Value]
    prefix: str = ""

    def integer(self, key: str, default: int | None = None) -> int:
        """One number for all layers, where the file has one for each."""
        value = self.metadata.get(self.prefix + key, default)
        if isinstance(value, tuple) and len(set(value)) == 1:
            value = value[0]
        if type(value) is not int or value < 0:
            raise ValueError(self._wrong(key, value, "is no count"))
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.metadata.get(self.prefix + key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(self._wrong(key, value, "is no number"))
        return _short(value)

    def text(self, key: str, default: str | None = None) -> str:
        value = self.metadata.get(self.prefix + key, default)
        if not isinstance(value, str):
            raise ValueError(self._wrong(key, value, "is no text"))
        return value

    def has(self, key: str) -> bool:
        return self.prefix + key in self.metadata

    def _wrong(self, key: str, value: object, what: str) -> str:
        full = self.prefix + key
        return f"{full} is missing" if value is None else f"{full} is {str(value)[:60]!r}, which {what}"


def config_of(header: GgufHeader) -> dict[str, object]:
    """The contents of a config.json. ModelError for a model that we do not run, and for metadata that are not sound."""
    family = header.metadata.get("general.architecture")
    try:
        if family not in FAMILIES:
            raise ValueError(f"we read models of {', '.join(FAMILIES)} (of which Mistral is one) from GGUF files")
        return _config(header, Keys(header.metadata, f"{family}."), str(family))
    except ValueError as error:
        raise ModelError(
            f"{str(family)[:60]} is not supported: {error}",
            where=str(header.files[0]),
            cure="take another GGUF file of the model, or a folder with config.json and safetensors",
        ) from error


def parameter_name(tensor: str) -> str | None:
    """transformers' name for a tensor; None for one that is no parameter of these families."""
    match = _LAYER_TENSOR.fullmatch(tensor)
    if match is None:
        return _OUTSIDE.get(tensor)
    place = _IN_LAYER.get(match[2])
    return f"model.layers.{int(match[1])}.{place}.{match[3]}" if place else None


def paired_heads(config: Mapping[str, object]) -> dict[str, int]:
    """Of what `config_of` made: how many heads have their rows in pairs, as ggml wants them of the Llama family, by the name of
    a parameter in its layer."""
    if config["model_type"] != "llama":
        return {}
    heads = {"self_attn.q_proj": config["num_attention_heads"], "self_attn.k_proj": config["num_key_value_heads"]}
    return {f"{place}.{last}": int(str(number)) for place, number in heads.items() for last in ("weight", "bias")}


def weights_name(header: GgufHeader) -> str:
    """What people call how the file is packed: "Q4_K_M". Where it does not say, the type of most of its bytes."""
    number = header.metadata.get("general.file_type")
    return FILE_TYPES[number] if isinstance(number, int) and number in FILE_TYPES else _commonest_type(header)


def _commonest_type(header: GgufHeader) -> str:
    sizes: dict[str, int] = {}
    for tensor in header.tensors:
        sizes[tensor.type_name] = sizes.get(tensor.type_name, 0) + tensor.num_bytes
    return max(sizes, key=lambda name: sizes[name], default="empty")


def end_token_ids(metadata: Mapping[str, Value]) -> list[int]:
    """Of the tokens that end a text or a turn. Without the vocabulary, those that the metadata names."""
    named = [metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    ids = {number for number in named if type(number) is int}
    tokens, types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if isinstance(tokens, tuple) and isinstance(types, tuple):
        pairs = enumerate(zip(tokens, types, strict=False))
        ids |= {number for number, (token, kind) in pairs if kind == CONTROL and token in END_TEXTS}
    return sorted(ids)


def _config(header: GgufHeader, keys: Keys, family: str) -> dict[str, object]:
    tensors = {tensor.name: tensor for tensor in header.tensors}
    if keys.integer("expert_count", 0):
        raise ValueError("it is a mixture of experts")
    context = keys.integer("context_length")
    if 0 < keys.integer("attention.sliding_window", 0) < context:
        raise ValueError("its attention has a window, which GGUF files of this family do not describe in full")
    num_heads = keys.integer("attention.head_count")
    hidden_size = keys.integer("embedding_length")
    head_dim = keys.integer("attention.key_length", hidden_size // num_heads if num_heads else 0)
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise ValueError("its keys and values have different lengths")
    if keys.integer("rope.dimension_count", head_dim) != head_dim:
        raise ValueError(f"it rotates {keys.integer('rope.dimension_count')} of {head_dim} dimensions of a head")
    if "token_embd.weight" not in tensors or len(tensors["token_embd.weight"].shape) != 2:
        raise ValueError("it has no matrix token_embd.weight")
    factors = read_rope_factors(tensors[ROPE_FACTORS], head_dim) if ROPE_FACTORS in tensors else None
    ends = end_token_ids(header.metadata)
    config: dict[str, object] = {
        "model_type": family,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope_parameters(keys, factors),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": header.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": ends or None,
        "pad_token_id": None,
        "dtype": DTYPES.get(_commonest_type(header), "bfloat16"),
    }
    if family == "llama":
        biases = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_gate.bias"}
        config |= {name: tensor in tensors for name, tensor in biases.items()}
    return config


def _short(value: float) -> float:
    """The shortest decimal fraction of the same float32: 1e-05 and not 9.999999747378752e-06, as it was before it was
    stored. Arithmetic in float64, of frequencies, is that of the model's own config then."""
    return float(f"{value:.7g}")
