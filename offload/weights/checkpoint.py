"""The tensors of one checkpoint folder: which there are and where their bytes lie. Knows no model and reads no weight.

Every check of every file runs before the first weight byte is read, and one error reports all that is wrong: a user who
waits an hour for each of five missing shards would rather know about them together.
"""

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final, NoReturn

from ..config import counted
from ..errors import CheckpointError
from .header import TensorInfo, parse_json_object, problems_error, quoted, read_small_file, scan_header

logger = logging.getLogger(__name__)

SINGLE_NAME: Final = "model.safetensors"
INDEX_NAME: Final = "model.safetensors.index.json"
CONFIG_NAME: Final = "config.json"
MAX_INDEX_BYTES: Final = 64 * 2**20  # Llama-2-70B's index has 66,725 bytes
MAX_CONFIG_BYTES: Final = 16 * 2**20
MAX_MISSING_LISTED: Final = 64
COMPARED_BYTES: Final = 2**24  # at a time
FOREIGN_SUFFIXES: Final = (".bin", ".pt", ".pth", ".ckpt", ".gguf")

_SEPARATORS = re.compile(r"[._]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A folder, or a GGUF file, whose headers and index passed every check. `files` are the weight files, sorted by name."""

    folder: Path
    tensors: Mapping[str, TensorInfo]
    files: tuple[Path, ...]

    @property
    def is_one_file(self) -> bool:
        """Whether config and all are in a file, such as GGUF's, which `folder` is then."""
        return self.folder.is_file()

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, without headers."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads `model.safetensors`, or the shards that `model.safetensors.index.json` names, as transformers would.

    Reads headers only and holds no file open afterwards. A `config.json` must be a JSON object; what it says is the model's
    business. Raises CheckpointError, which names all problems of all files.
    """
    if os.path.lexists(folder / SINGLE_NAME):
        if os.path.lexists(folder / INDEX_NAME):
            logger.warning("%s has both %s and %s: reading the former", folder, SINGLE_NAME, INDEX_NAME)
        shards, weight_map = [SINGLE_NAME], None
    elif os.path.lexists(folder / INDEX_NAME):
        weight_map = _read_index(folder)
        shards = sorted(set(weight_map.values()))
    else:
        _refuse_folder(folder)
    tensors, problems = _scan_shards(folder, shards, weight_map)
    damaged_config = _config_problems(folder)
    if damaged_config or problems:
        where = folder if problems else folder / CONFIG_NAME
        raise problems_error(damaged_config + problems, where=str(where), cure=_download_again(folder))
    return Checkpoint(folder=folder, tensors=MappingProxyType(tensors), files=tuple(folder / shard for shard in shards))


def check_tensors(
    checkpoint: Checkpoint,
    expected: Mapping[str, tuple[int, ...]],
) -> tuple[str, ...]:
    """Every name of `expected` is there with that shape. Returns the names that are not in `expected`: other layers, other
    heads, tables that every implementation computes itself. A name that begins with an expected one, such as
    `q_proj.weight_scale`, is no such thing: that weight alone is not what the model computes with. Dtypes are the reader's
    business. Raises CheckpointError, which names all differences."""
    tensors = checkpoint.tensors
    others = tuple(name for name in tensors if name not in expected)
    problems = [f"tensor {quoted(name)} is missing" for name in expected if name not in tensors]
    problems += [
        f"tensor {quoted(name)} has shape {tensors[name].shape}, the model needs {tuple(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != tuple(shape)
    ]
    problems += [
        f"tensor {quoted(name)} says that {quoted(whole)} is packed, and config.json does not"
        for name in others
        for whole in (name[: separator.start()] for separator in _SEPARATORS.finditer(name))
        if whole in expected
    ]
    if problems:
        cure = "use the config.json that belongs to these weights; if it does, this architecture is not supported"
        if checkpoint.is_one_file:
            cure = "download the file again; if it is whole, this architecture is not supported"
        raise problems_error(problems, where=str(checkpoint.folder), cure=cure)
    return others


def have_same_bytes(one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two tensors on disk are the same, without holding either in memory. CheckpointError when they cannot be read."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    try:
        with one.path.open("rb") as first, other.path.open("rb") as second:
            first.seek(one.offset_bytes)
            second.seek(other.offset_bytes)
            for start in range(0, one.num_bytes, COMPARED_BYTES):
                num_bytes = min(COMPARED_BYTES, one.num_bytes - start)
                if first.read(num_bytes) != second.read(num_bytes):
                    return False
    except OSError as error:
        raise problems_error([str(error.strerror)], where=str(one.path), cure=_download_again(one.path.parent)) from error
    return True


def _read_index(folder: Path) -> dict[str, str]:
    """tensor name -> shard name, every shard name safe to join to `folder`. Raises CheckpointError."""
    try:
        weight_map = parse_json_object(read_small_file(folder / INDEX_NAME, MAX_INDEX_BYTES)).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("has no weight_map with tensors in it")
        if not all(isinstance(shard, str) for shard in weight_map.values()):
            raise ValueError("has a weight_map that does not map strings to strings")
    except (OSError, ValueError) as error:
        reason = f"cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
        raise problems_error([f"{INDEX_NAME}: {reason}"], where=str(folder), cure=_download_again(folder)) from error
    unsafe = [shard for shard in sorted(set(weight_map.values())) if not _is_safe_name(shard)]
    if unsafe:
        problems = [f"{INDEX_NAME}: {quoted(shard)} is not the name of a safetensors file" for shard in unsafe]
        cure = "do not use this checkpoint: such names reach outside of its folder"
        raise problems_error(problems, where=str(folder), cure=cure)
    return weight_map


def _is_safe_name(shard: str) -> bool:
    """Lexically one name in the folder. It may be a symbolic link to anywhere: those of the Hugging Face cache are, and
    who can plant a link in the folder can plant weights as well."""
    return (
        shard.endswith(".safetensors")
        and len(shard) <= 255
        and shard.isprintable()
        and ".." not in shard
        and not any(separator in shard for separator in "/\\:")
    )


def _config_problems(folder: Path) -> list[str]:
    """What the download that broke off in a shard may have done to the config as well. As lenient as transformers."""
    if not os.path.lexists(folder / CONFIG_NAME):
        return []
    try:
        config = json.loads(read_small_file(folder / CONFIG_NAME, MAX_CONFIG_BYTES).decode("utf-8"))
    except OSError as error:
        return [f"{CONFIG_NAME}: cannot be read: {error.strerror}"]
    except UnicodeDecodeError as error:
        return [f"{CONFIG_NAME}: is not UTF-8 at byte {error.start:,}"]
    except (json.JSONDecodeError, RecursionError) as error:
        return [f"{CONFIG_NAME}: is not JSON: {error}"]
    except ValueError as error:
        return [f"{CONFIG_NAME}: {error}"]
    return [] if isinstance(config, dict) else [f"{CONFIG_NAME}: is not a JSON object"]


def _scan_shards(
    folder: Path, shards: Sequence[str], weight_map: Mapping[str, str] | None
) -> tuple[dict[str, TensorInfo], list[str]]:
    """(tensors by name, problems). Without a `weight_map` there is one shard and nothing to compare it with."""
    problems: list[str] = []
    missing = [shard for shard in shards if not os.path.exists(folder / shard)]
    if missing:
        problems.append(_describe_missing(missing, len(shards)))
    found: dict[str, list[TensorInfo]] = {}
    unread = set(missing)
    for shard in shards:
        if shard in unread:
            continue
        tensors, shard_problems = scan_header(folder / shard)
        for tensor in tensors:
            found.setdefault(tensor.name, []).append(tensor)
        if shard_problems:
            problems += shard_problems
            unread.add(shard)
    if weight_map is not None:
        problems += _index_problems(weight_map, found, unread)
    return {name: places[0] for name, places in found.items()}, problems


def _index_problems(weight_map: Mapping[str, str], found: Mapping[str, Sequence[TensorInfo]], unread: set[str]) -> list[str]:
    """At most one problem for each tensor. What should be in the shards `unread` is not held against the index."""
    problems: list[str] = []
    for name, places in found.items():
        shards = [place.path.name for place in places]
        if len(shards) > 1:
            problems.append(f"tensor {quoted(name)} is in {len(shards)} files: {', '.join(shards[:4])}")
        elif name not in weight_map:
            problems.append(f"{shards[0]}: tensor {quoted(name)} is not in the index")
        elif weight_map[name] != shards[0]:
            problems.append(f"{shards[0]}: tensor {quoted(name)} is in {weight_map[name]} according to the index")
    problems += [
        f"{shard}: has no tensor {quoted(name)}, which the index places there"
        for name, shard in weight_map.items()
        if name not in found and shard not in unread
    ]
    return problems


def _describe_missing(missing: Sequence[str], num_shards: int) -> str:
    listed = ", ".join(missing[:MAX_MISSING_LISTED])
    rest = f" and {len(missing) - MAX_MISSING_LISTED} more" if len(missing) > MAX_MISSING_LISTED else ""
    return f"{len(missing)} of {num_shards} files are missing: {listed}{rest}"


def _download_again(folder: Path) -> str:
    cached = [part for part in folder.absolute().parts if part.startswith("models--")]
    command = (
        f"hf download {cached[-1].removeprefix('models--').replace('--', '/')}"
        if cached
        else f"hf download <repository> --local-dir {folder}"
    )
    return f"run `{command}` again (it skips finished files), or copy the files again"


def _refuse_folder(folder: Path) -> NoReturn:
    """Says why a folder without the two names that we open is no checkpoint."""
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        what = f"cannot read the checkpoint folder: {error.strerror}"
        raise CheckpointError(what, where=str(folder), cure="give the folder that holds config.json") from error
    shards = [name for name in names if name.endswith(".safetensors")]
    foreign = [name for name in names if name.endswith(FOREIGN_SUFFIXES)]
    if shards:
        what = f"{counted(len(shards), 'safetensors file')} such as {quoted(shards[0])} but no {INDEX_NAME}"
        cure = _download_again(folder)
    elif foreign:
        what = f"only safetensors files are read, and here are files such as {quoted(foreign[0])}"
        cure = (
            "take the repository's safetensors files, or convert where you trust these: transformers' "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) writes safetensors"
        )
    else:
        what = f"neither {SINGLE_NAME} nor {INDEX_NAME}"
        cure = "give the folder that holds config.json and the weights"
    raise CheckpointError(what, where=str(folder), cure=cure)
