"""From what `--tree` and `--verifier` say to a shape and a method. Cheap to import: what the flags say is checked before
torch is there."""

from pathlib import Path
from typing import TYPE_CHECKING, cast

from tree.acceptance import Acceptance
from tree.shape import TreeShape
from tree.spec import OptimalTree, parse_tree_spec

from ..config import EngineSettings
from ..errors import UsageError
from .json_file import read_file

if TYPE_CHECKING:
    from tree.verify import Method

# What NxL trees are optimised for when no profile is given: the vector that Sequoia publishes for a 70B and its 8B draft.
DEFAULT_ACCEPTANCE = Path(__file__).parents[2] / "profiles/acceptance/llama-3-8b__llama-3-70b__cnn__published.json"


def read_tree(spec: str, *, has_draft: bool) -> TreeShape | OptimalTree | None:
    """What `--tree` says: none, WxL:kary, NxL (a request, not yet a shape), or the path of a TreeShape JSON; None for auto,
    which is the planner's to choose.

    UsageError for anything larger than the root without a draft; ModelError for a file that is invalid.
    """
    if spec == "auto":
        return None
    tree = _from_file(Path(spec)) if spec.endswith(".json") or _is_file(spec) else _from_spec(spec)
    if tree.num_nodes > 1 and not has_draft:
        raise UsageError(
            f"a tree of {tree.num_nodes} nodes needs a draft model",
            where=f"--tree {spec} without --draft-model",
            cure="name a --draft-model, or use --tree none",
        )
    return tree


def resolve_method(name: str) -> "Method":
    """The verifier that `--verifier` names (EngineSettings has checked it). auto: traversal, which accepts most of a
    sampled tree; at temperature 0 all of them are the same greedy walk."""
    return "traversal" if name == "auto" else cast("Method", name)


def read_acceptances(settings: EngineSettings) -> tuple[Acceptance, ...]:
    """One for each of the draft models: its own file, the one for all, or the published default. ModelError for a file
    that is none."""
    files = settings.acceptances or (str(DEFAULT_ACCEPTANCE),)
    read = tuple(read_acceptance(Path(name)) for name in files)
    return read if len(read) == len(settings.draft_models) else read[:1] * len(settings.draft_models)


def read_acceptance(path: Path) -> Acceptance:
    """The acceptance profile in `path`. ModelError when it is not one."""
    return read_file(path, Acceptance.from_json, "an acceptance profile", "see profiles/README.md for the format")


def _is_file(spec: str) -> bool:
    try:
        return Path(spec).is_file()
    except OSError:  # too long for a name, or out of reach
        return False


def _from_spec(spec: str) -> TreeShape | OptimalTree:
    try:
        return parse_tree_spec(spec)
    except ValueError as error:
        raise UsageError(str(error), where="--tree", cure="for example 4x6:kary, 64x8, none, or a file") from error


def _from_file(path: Path) -> TreeShape:
    return read_file(path, TreeShape.from_json, "a tree", "write one with TreeShape.to_json")
