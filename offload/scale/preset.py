"""Names such as `scale:llama-2-70b:24`, and the shapes that they name. Cheap to import."""

import json
from pathlib import Path
from typing import Any

from ..errors import ModelError, UsageError

PREFIX = "scale:"
FOLDER = Path(__file__).parents[2] / "profiles/models"


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
    known = sorted(path.stem for path in FOLDER.glob("*.json"))
    if preset not in known:
        raise UsageError(f"no preset {preset!r}", where=flag, cure=f"one of {', '.join(known)}")
    path = FOLDER / f"{preset}.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))["config"]
        if not isinstance(config, dict):
            raise ValueError("config is not an object")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"not a model preset: {error}", where=str(path), cure="see profiles/README.md") from error
    return config
