"""Names such as `scale:llama-2-70b:24`, and the shapes that they name. Cheap to import."""

import json
from dataclasses import replace
from typing import Any

from ..demo import TARGET
from ..errors import ModelError, UsageError
from ..planner.shapes import ModelShape, preset_names, read_preset_config, shape_from_config
from .geometry import Geometry, Sizes

PREFIX = "scale:"
# What does without normalised queries and keys or other terms that zeros do not switch off.
FAMILIES = ("llama", "mistral", "qwen2")


def is_scale_model(name: str) -> bool:
    return name.startswith(PREFIX)


def parse_scale_name(name: str, flag: str) -> tuple[str, int | None]:
    """(preset, layers or None for all of the preset's). UsageError naming `flag`."""
    preset, colon, layers = name.removeprefix(PREFIX).partition(":")
    if not preset or (colon and not (layers.isdecimal() and len(layers) < 5 and int(layers) > 0)):
        raise UsageError(
            f"not a scale model: {name!r}",
            where=flag,
            cure="write scale:PRESET or scale:PRESET:LAYERS, as in scale:llama-2-70b:24",
        )
    return preset, int(layers) if colon else None


def read_preset(preset: str, flag: str) -> dict[str, Any]:
    """The facts of config.json. UsageError for an unknown preset, ModelError for a damaged file."""
    if preset not in preset_names():
        raise UsageError(f"no preset {preset!r}", where=flag, cure=f"one of {', '.join(preset_names())}")
    return read_preset_config(preset)[0]


def scale_shape(name: str, flag: str) -> ModelShape:
    """The shape of the scale model `name`: the preset's, with the demo target's vocabulary and dtype. ModelError or UsageError
    naming `flag`, as where it is made."""
    preset, num_layers = parse_scale_name(name, flag)
    demo = json.loads((TARGET / "config.json").read_text(encoding="utf-8"))
    facts = {**read_preset(preset, flag), "vocab_size": demo["vocab_size"], "dtype": demo["dtype"]}
    if num_layers is not None:
        facts["num_hidden_layers"] = num_layers
    where = f"{flag} {name}"
    fit(demo, facts, where)
    return replace(shape_from_config(facts, where=where), name=name)


def fit(small: dict[str, Any], wide: dict[str, Any], where: str) -> Geometry:
    """How the Llama of config `small` lies inside the model of config `wide`: with fewer layers than it has, the first of them.
    ModelError or UsageError when it cannot."""
    if wide.get("model_type") not in FAMILIES:
        raise ModelError(
            f"a {wide.get('model_type')} cannot compute what a llama computes",
            where=where,
            cure=f"name a preset of the families {', '.join(FAMILIES)}",
        )
    sizes = _sizes_of(wide)
    inner = _sizes_of(small)
    try:
        return Geometry(small=replace(inner, num_layers=min(inner.num_layers, sizes.num_layers)), wide=sizes)
    except ValueError as error:
        raise UsageError(f"the demo target does not fit into it: {error}", where=where, cure="name a larger preset") from error


def _sizes_of(config: dict[str, Any]) -> Sizes:
    num_heads, hidden = config["num_attention_heads"], config["hidden_size"]
    return Sizes(
        num_layers=config["num_hidden_layers"],
        hidden=hidden,
        intermediate=config["intermediate_size"],
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_dim=config.get("head_dim") or hidden // num_heads,
    )
