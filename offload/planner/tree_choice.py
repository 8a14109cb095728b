"""From what `--tree` and `--verifier` say to a shape and a method. Cheap to import: what the flags say is checked before
torch is there."""

from pathlib import Path
from typing import TYPE_CHECKING, cast

from tree.acceptance import Acceptance
from tree.shape import TreeShape
from tree.spec import OptimalTree, parse_tree_spec

from ..errors import UsageError
from .files import read_file

if TYPE_CHECKING:
    from tree.verify import Method

# Small enough to cost little where compute is slow, and most of what larger trees yield: tokens per pass grow with the
# logarithm of the nodes.
AUTO_TREE = OptimalTree(64, 10)
# What NxL trees are optimised for when no profile is given: the vector that Sequoia publishes for a 70B and its 8B draft.
DEFAULT_ACCEPTANCE = Path(__file__).parents[2] / "profiles/acceptance/llama-3-8b__llama-3-70b__cnn__published.json"


def resolve_tree(
    spec: str, acceptance: str | None, *, has_draft: bool, vocab_size: int, max_context: int | None
) -> tuple[TreeShape, float]:
    """The shape that `--tree` names, optimised for the `acceptance` file if it is an NxL, and the tokens per pass to
    expect of it by that file. No node of an optimised tree has more than `vocab_size` children, and auto takes at most a
    quarter of `max_context` rows. Errors as in `read_tree`."""
    from tree.optimizer import best_tree, expected_tokens  # numpy; reading flags needs none of it

    profile = read_acceptance(Path(acceptance) if acceptance is not None else DEFAULT_ACCEPTANCE)
    tree = read_tree(spec, has_draft=has_draft)
    if not isinstance(tree, OptimalTree):
        return tree, expected_tokens(tree, profile)
    num_nodes = min(tree.num_nodes, max(max_context // 4, 1)) if spec == "auto" and max_context else tree.num_nodes
    shape = best_tree(profile, num_nodes, tree.num_levels, max_branching=vocab_size)
    return shape, expected_tokens(shape, profile)


def read_tree(spec: str, *, has_draft: bool) -> TreeShape | OptimalTree:
    """What `--tree` says: auto, none, WxL:kary, NxL (a request, not yet a shape), or the path of a TreeShape JSON.

    Without a draft, auto is the root alone and anything larger is a UsageError. ModelError for a file that is invalid.
    """
    if spec == "auto":
        return AUTO_TREE if has_draft else TreeShape.root_only()
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
