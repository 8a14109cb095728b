"""From what the user calls a model to a folder on disk: a path, or a hub id from the local cache or the network."""

import re
from pathlib import Path

from ..errors import ModelError
from .hub import fetch_model

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def locate_model(name: str, flag: str) -> Path:
    """The folder of `name`. ModelError when there is none, naming `flag`."""
    return check_name(name, flag) or fetch_model(name, flag)


def check_name(name: str, flag: str) -> Path | None:
    """The folder `name`; None for a hub id, which may or may not exist. ModelError when it is neither."""
    folder = _existing_folder(name, flag) if name else None
    if folder is None and not _HUB_ID.fullmatch(name):
        what = f"no such folder: {name}" if name else "the name is empty"
        raise ModelError(what, where=flag, cure="give an existing folder or a hub id (org/name)")
    return folder


def find_config(name: str, flag: str) -> Path | None:
    """The config.json of a folder, or of a hub id in the local cache; None where neither is. Fetches nothing."""
    folder = _existing_folder(name, flag)
    if folder is not None:
        return folder / "config.json"
    if not _HUB_ID.fullmatch(name):
        return None
    import huggingface_hub

    cached = huggingface_hub.try_to_load_from_cache(name, "config.json")
    return Path(cached) if isinstance(cached, str) else None


def _existing_folder(name: str, flag: str) -> Path | None:
    try:
        folder = Path(name).expanduser()
        is_folder, has_config = folder.is_dir(), (folder / "config.json").is_file()
    except (OSError, RuntimeError) as error:  # a name too long, a folder out of reach, a user unknown
        raise ModelError(f"{name} cannot be opened: {error}", where=flag, cure="give a folder that you may read") from error
    if is_folder and not has_config:
        raise ModelError(
            f"there is no config.json in {name}",
            where=flag,
            cure="give the folder that transformers' save_pretrained wrote, with config.json and *.safetensors",
        )
    return folder if is_folder else None
