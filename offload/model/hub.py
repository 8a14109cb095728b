"""A model of the hub: what the local cache has of it, and the rest over the network. Only what is read is fetched.

Repositories often hold the weights a second time, for other programs or in another precision; those stay where they are.
"""

import json
import logging
from pathlib import Path

from ..errors import ModelError

logger = logging.getLogger(__name__)

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json")
# A model without them may say other things: it ends elsewhere, or is asked in another way.
TELLING = ("generation_config.json", "tokenizer_config.json")
OTHERS = ("merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json")


class _Repository:
    """A repository at the commit that the cache has of it, or, when it has none, at the newest."""

    def __init__(self, name: str) -> None:
        import huggingface_hub

        self._hub, self._name = huggingface_hub, name
        cached = huggingface_hub.try_to_load_from_cache(name, "config.json")
        path = Path(cached if isinstance(cached, str) else huggingface_hub.hf_hub_download(name, "config.json"))
        self.folder, self._commit = path.parent, path.parent.name

    def known(self, file: str) -> bool | None:
        """Whether the folder has `file`; None when that is because nobody has asked the hub for it."""
        cached = self._hub.try_to_load_from_cache(self._name, file, revision=self._commit)
        return None if cached is None else isinstance(cached, str)

    def fetch(self, file: str) -> bool:
        """Whether the repository has `file`, which the folder then has, too. Raises what the hub's client raises."""
        known = self.known(file)
        if known is not None:
            return known
        try:
            self._hub.hf_hub_download(self._name, file, revision=self._commit)
        except self._hub.errors.LocalEntryNotFoundError:  # out of reach: one of the next, too, but says nothing of the file
            raise
        except self._hub.errors.EntryNotFoundError:
            return False
        return True


def fetch_model(name: str, flag: str) -> Path:
    """The folder of `name` in the cache with all that a run reads. A cache that has it is asked alone. ModelError, naming
    `flag` and what is missing. Files come one after another, and what an interruption leaves of one is gone on from."""
    try:
        repository = _Repository(name)
    except Exception as error:  # network, authentication, no such repository: the hub's own words say which
        raise ModelError(
            f"{name} is neither a folder nor in the local cache, and cannot be fetched: {_words(error)}",
            where=flag,
            cure=f"check the name, or run `hf download {name}` where there is a network",
        ) from error
    _fetch_small_files(repository, name)
    for file in _weight_files(repository, name, flag):
        _require(repository, file, name, flag)
    return repository.folder


def _fetch_small_files(repository: _Repository, name: str) -> None:
    """What stands beside weights and config.json: a model can do without any of it, and the hub may be out of reach."""
    unknown = [file for file in TELLING if repository.known(file) is None]
    if not any(repository.known(file) for file in VOCABULARIES):
        unknown += [file for file in VOCABULARIES if repository.known(file) is None]
    if not unknown:
        return
    try:
        for file in (*unknown, *VOCABULARIES, *OTHERS):
            repository.fetch(file)
    except Exception as error:
        missing = ", ".join(file for file in unknown if repository.known(file) is None)
        logger.warning("%s: the local cache has no %s, and the hub cannot be asked: %s", name, missing, _words(error))


def _weight_files(repository: _Repository, name: str, flag: str) -> list[str]:
    """The files with the weights, as transformers looks for them. What the cache knows is not asked for."""
    if repository.known(WEIGHTS):
        return []
    if not repository.known(INDEX):
        if _require(repository, WEIGHTS, name, flag, INDEX):
            return []
        if not _require(repository, INDEX, name, flag):
            raise ModelError(
                f"{name} has neither {WEIGHTS} nor {INDEX}", where=flag, cure="name a repository with weights in safetensors"
            )
    try:
        shards = set(json.loads((repository.folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []  # damaged: whoever opens the checkpoint says how
    return sorted(shard for shard in shards if isinstance(shard, str) and Path(shard).name == shard)


def _require(repository: _Repository, file: str, name: str, flag: str, *alternatives: str) -> bool:
    """Fetch `file`, and tell whether there is one. ModelError when that cannot be known."""
    try:
        return repository.fetch(file)
    except Exception as error:
        raise ModelError(
            f"the local cache has no {' or '.join((file, *alternatives))} of {name}, and it cannot be fetched: {_words(error)}",
            where=flag,
            cure=f"run again, or `hf download {name}`, where there is a network: it goes on where it stopped",
        ) from error


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
