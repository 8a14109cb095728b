"""From what `--tree` and `--verifier` say to a shape and a method. Cheap to import: what the flags say is checked before
torch is there."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from tree.acceptance import Acceptance
from tree.shape import TreeShape
from tree.spec import DynamicTree, TreeRequest, parse_tree_spec

from ..config import EngineSettings, base_of_draft
from ..errors import UsageError
from .json_file import read_file

if TYPE_CHECKING:
    from tree.verify import Method

# What NxL trees are optimised for when no profile is given: the vector that Sequoia publishes for a 70B and its 8B draft.
PROFILES = Path(__file__).parents[2] / "profiles/acceptance"
DEFAULT_ACCEPTANCE = PROFILES / "llama-3-8b__llama-3-70b__cnn__published.json"
# What a base of the target's own layers is taken to have then. Of int3 nothing is published: what a separate draft has.
BASE_ACCEPTANCES = {"int8": PROFILES / "self-int4__published.json", "int4": PROFILES / "self-int4__published.json"}


def read_tree(spec: str, *, has_draft: bool, ngram: Sequence[str] = ("off",)) -> TreeRequest | None:
    """What `--tree` says: none, WxL:kary, NxL and N:dynamic (requests, not yet shapes), or the path of a TreeShape JSON; None
    for auto, which is the planner's to choose.

    UsageError for anything larger than the root without a draft, but for trees that follow the text where `ngram` lets it be
    looked up; and where it must be, for trees that do not. ModelError for a file that is invalid.
    """
    if spec == "auto":
        return None
    tree = _from_file(Path(spec)) if spec.endswith(".json") or _is_file(spec) else _from_spec(spec)
    follows_text, has_ngram = isinstance(tree, DynamicTree), tuple(ngram) != ("off",)
    if tree.num_nodes > 1 and not has_draft and not (follows_text and has_ngram):
        raise UsageError(
            f"a tree of {tree.num_nodes} nodes needs a draft model",
            where=f"--tree {spec} without --draft-model",
            cure=f"name a --draft-model, or use --tree none{', or 64:dynamic for n-grams alone' if has_ngram else ''}",
        )
    if not follows_text and tuple(ngram) not in (("auto",), ("off",)):
        raise UsageError(
            "n-grams are nodes of trees that follow the text",
            where=f"--ngram {ngram[0]} with --tree {spec}",
            cure="use --tree auto or 64:dynamic, or --ngram off",
        )
    return tree


def resolve_method(name: str) -> "Method":
    """The verifier that `--verifier` names (EngineSettings has checked it). auto: traversal, which accepts most of a
    sampled tree; at temperature 0 all of them are the same greedy walk."""
    return "traversal" if name == "auto" else cast("Method", name)


def read_acceptances(settings: EngineSettings) -> tuple[Acceptance, ...]:
    """One for each of the draft models: its own file, the one for all, or what is published of its kind. ModelError for a
    file that is none."""
    if not settings.acceptances:
        return tuple(read_acceptance(default_acceptance(name)) for name in settings.draft_models)
    read = tuple(read_acceptance(Path(name)) for name in settings.acceptances)
    return read if len(read) == len(settings.draft_models) else read[:1] * len(settings.draft_models)


def default_acceptance(draft_model: str) -> Path:
    """The file that is read of a draft model when nobody names one."""
    return BASE_ACCEPTANCES.get(base_of_draft(draft_model) or "", DEFAULT_ACCEPTANCE)


def assumed_acceptance(draft_model: str) -> str:
    """What is to be said of that."""
    kind, source = base_of_draft(draft_model), read_acceptance(default_acceptance(draft_model)).source
    if kind is None:
        whose = "not this pair's"
    elif kind == "int4":
        whose = "not this model's"
    elif kind == "int8":
        whose = "not this model's, and int4's: int8 has more"
    else:
        whose = f"that of a separate draft: nobody has published what {kind} has, which may be far less"
    return f"acceptance is assumed, {whose} ({source}): `profile acceptance` measures it"


def read_acceptance(path: Path) -> Acceptance:
    """The acceptance profile in `path`. ModelError when it is not one."""
    return read_file(path, Acceptance.from_json, "an acceptance profile", "see profiles/README.md for the format")


def _is_file(spec: str) -> bool:
    try:
        return Path(spec).is_file()
    except OSError:  # too long for a name, or out of reach
        return False


def _from_spec(spec: str) -> TreeRequest:
    try:
        return parse_tree_spec(spec)
    except ValueError as error:
        raise UsageError(str(error), where="--tree", cure="for example 256:dynamic, 64x8, 4x6:kary, none, or a file") from error


def _from_file(path: Path) -> TreeShape:
    return read_file(path, TreeShape.from_json, "a tree", "write one with TreeShape.to_json")
