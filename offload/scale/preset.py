"""Names such as `scale:llama-2-70b:24`, and the shapes that they name. Cheap to import."""

from typing import Any

from ..errors import UsageError
from ..planner.shapes import preset_names, read_preset_config

PREFIX = "scale:"


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
