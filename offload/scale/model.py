"""`scale:PRESET[:LAYERS]`: a model of exactly a preset's shape that computes the bundled demo target's function.

Every byte is streamed and every multiplication done, and text, acceptance and trees are those of a real trained pair. Two
things are not the preset's: the vocabulary, which stays the demo's because its tokenizer writes the text (rows of zeros would
give logits of 0, which can win), and the rotary embedding, which is part of the function.
"""

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ..demo import TARGET
from ..errors import ModelError, UsageError
from ..model.architecture import Architecture, architecture_of, read_architecture
from ..weights.checkpoint import open_checkpoint
from ..weights.source import CheckpointSource
from .geometry import Geometry, Sizes
from .preset import PREFIX, parse_scale_name, read_preset
from .weights import ScaleWeights

# What does without normalised queries and keys or other terms that zeros do not switch off.
FAMILIES = ("llama", "mistral", "qwen2")
_OF_THE_DEMO = ("vocab_size", "rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id", "hidden_act", "dtype")
_NOT_TAKEN = ("rope_theta", "rope_scaling", "torch_dtype", "sliding_window", "use_sliding_window", "layer_types")


def open_scale_model(name: str, flag: str) -> tuple[Path, Architecture, ScaleWeights]:
    """(folder of its tokenizer, architecture, weights). ModelError or UsageError naming `flag`."""
    preset, num_layers = parse_scale_name(name, flag)
    facts = read_preset(preset, flag)
    return widen(TARGET, facts, num_layers, f"{flag} {name}")


def widen(folder: Path, facts: dict[str, Any], num_layers: int | None, where: str) -> tuple[Path, Architecture, ScaleWeights]:
    """The Llama in `folder` in the shape of the config `facts`. With fewer layers than it has, the first of them."""
    small = read_architecture(folder)
    if facts.get("model_type") not in FAMILIES:
        raise ModelError(
            f"a {facts.get('model_type')} cannot compute what a llama computes",
            where=where,
            cure=f"name a preset of the families {', '.join(FAMILIES)}",
        )
    kept = {key: value for key, value in facts.items() if key not in (*_NOT_TAKEN, *_OF_THE_DEMO)}
    own = {key: getattr(small.config, key) for key in _OF_THE_DEMO}
    if num_layers is not None:
        kept["num_hidden_layers"] = num_layers
    sizes = sizes_of(kept)
    try:
        geometry = Geometry(small=sizes_of(small.config.to_dict(), at_most=sizes.num_layers), wide=sizes)
    except ValueError as error:
        raise UsageError(f"the demo target does not fit into it: {error}", where=where, cure="name a larger preset") from error
    kept["rms_norm_eps"] = small.config.rms_norm_eps * geometry.share
    wide = architecture_of(AutoConfig.for_model(**{**kept, **own, "head_dim": sizes.head_dim}), where)
    weights = ScaleWeights(
        geometry=geometry,
        source=CheckpointSource(open_checkpoint(folder)),
        small_shapes=small.expected_tensors,
        wide_shapes=wide.expected_tensors,
    )
    return folder, wide, weights


def sizes_of(config: dict[str, Any], *, at_most: int | None = None) -> Sizes:
    """`at_most` layers."""
    num_heads, hidden = config["num_attention_heads"], config["hidden_size"]
    num_layers = config["num_hidden_layers"]
    return Sizes(
        num_layers=num_layers if at_most is None else min(num_layers, at_most),
        hidden=hidden,
        intermediate=config["intermediate_size"],
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_dim=config.get("head_dim") or hidden // num_heads,
    )


def is_scale_model(name: str) -> bool:
    return name.startswith(PREFIX)
