"""`scale:PRESET[:LAYERS]`: a model of exactly a preset's shape that computes the bundled demo target's function.

Every byte is streamed and every multiplication done, and text, acceptance and trees are those of a real trained pair. Two
things are not the preset's: the vocabulary, which stays the demo's because its tokenizer writes the text (rows of zeros would
give logits of 0, which can win), and the rotary embedding, which is part of the function.
"""

from pathlib import Path
from typing import Any

from ..demo import TARGET
from ..model.architecture import Architecture, architecture_of, read_architecture
from ..model.transformers_api import make_config
from ..weights.checkpoint import open_checkpoint
from ..weights.source import CheckpointSource
from .preset import fit, parse_scale_name, read_preset
from .weights import ScaleWeights

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
    kept = {key: value for key, value in facts.items() if key not in (*_NOT_TAKEN, *_OF_THE_DEMO)}
    own = {key: getattr(small.config, key) for key in _OF_THE_DEMO}
    if num_layers is not None:
        kept["num_hidden_layers"] = num_layers
    geometry = fit(small.config.to_dict(), kept, where)
    kept["rms_norm_eps"] = small.config.rms_norm_eps * geometry.share
    wide = architecture_of(make_config({**kept, **own, "head_dim": geometry.wide.head_dim}), where)
    weights = ScaleWeights(
        geometry=geometry,
        source=CheckpointSource(open_checkpoint(folder)),
        small_shapes=small.expected_tensors,
        wide_shapes=wide.expected_tensors,
    )
    return folder, wide, weights
