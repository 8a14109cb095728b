"""From what the user calls a model to a folder or a GGUF file: a path, or a hub id from the local cache or the network."""

import re
from pathlib import Path

from ..errors import ModelError
from .hub import fetch_model

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def locate_model(name: str, flag: str) -> Path:
    """The folder of `name`, or the GGUF file. ModelError when there is none, naming `flag`."""
    return check_name(name, flag) or fetch_model(name, flag)


def check_name(name: str, flag: str) -> Path | None:
    """The folder or GGUF file `name`; None for a hub id, which may or may not exist. ModelError when it is neither."""
    path = _existing(name, flag) if name else None
    if path is None and (not _HUB_ID.fullmatch(name) or is_gguf(Path(name))):
        what = f"no such folder or GGUF file: {name}" if name else "the name is empty"
        raise ModelError(what, where=flag, cure="give an existing folder, a GGUF file or a hub id (org/name)")
    return path


def is_gguf(path: Path) -> bool:
    """By its name alone."""
    return path.suffix.lower() == ".gguf"


def find_config(name: str, flag: str) -> Path | None:
    """The config.json of a folder, or of a hub id in the local cache, or the GGUF file, which holds its own; None where none
    is. Fetches nothing."""
    path = _existing(name, flag)
    if path is not None:
        return path if is_gguf(path) else path / "config.json"
    if not _HUB_ID.fullmatch(name):
        return None
    import huggingface_hub

    cached = huggingface_hub.try_to_load_from_cache(name, "config.json")
    return Path(cached) if isinstance(cached, str) else None


def _existing(name: str, flag: str) -> Path | None:
    """The folder with a config.json, or the GGUF file, of that name."""
    try:
        path = Path(name).expanduser()
        is_folder, has_config = path.is_dir(), (path / "config.json").is_file()
        files = sorted(it.name for it in path.iterdir() if is_gguf(it)) if is_folder and not has_config else []
        is_file = is_gguf(path) and path.is_file()
    except (OSError, RuntimeError) as error:  # a name too long, a folder out of reach, a user unknown
        raise ModelError(f"{name} cannot be opened: {error}", where=flag, cure="give a folder that you may read") from error
    if is_folder and not has_config:
        cure = "give the folder that transformers' save_pretrained wrote, with config.json and *.safetensors"
        if files:
            cure = f"give the file itself: {path / files[0]}"
        raise ModelError(f"there is no config.json in {name}", where=flag, cure=cure)
    return path if is_folder or is_file else None
