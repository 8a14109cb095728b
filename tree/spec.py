"""What `--tree` may say, short of a file: `none`, `WxL:kary`, `NxL`, `N:dynamic`. Knows no acceptance and builds no optimum."""

import re
from dataclasses import dataclass

from .shape import TreeShape

# A tree costs a mask entry per pair of nodes and a row of logits per node: beyond this, a slip of the hand is likelier.
MAX_NODES = 1 << 16

_CHAINS = re.compile(r"(\d{1,9})x(\d{1,9}):kary", re.ASCII)
_OPTIMAL = re.compile(r"(\d{1,9})x(\d{1,9})", re.ASCII)
_DYNAMIC = re.compile(r"(\d{1,9}):dynamic", re.ASCII)


@dataclass(frozen=True, slots=True)
class OptimalTree:
    """A request: the best tree of `num_nodes` nodes within `num_levels` levels, the root counted in both."""

    num_nodes: int
    num_levels: int


@dataclass(frozen=True, slots=True)
class DynamicTree:
    """A request: trees of at most `num_nodes` nodes, the root counted, each shaped by what its draft believes."""

    num_nodes: int


TreeRequest = TreeShape | OptimalTree | DynamicTree  # all that may be asked for


def parse_tree_spec(text: str) -> TreeRequest:
    """`none` -> the root alone; `4x6:kary` -> 4 chains of 6 draft levels; `768x18` -> a request for the optimum; `256:dynamic`
    -> one for trees that follow the text.

    ValueError for anything else, and for trees that cannot exist or exceed MAX_NODES.
    """
    if text == "none":
        return TreeShape.root_only()
    if match := _CHAINS.fullmatch(text):
        width, draft_levels = map(int, match.groups())
        if width < 1 or draft_levels < 1:
            raise ValueError(f"tree {text!r}: width and levels must be at least 1")
        _check_size(text, 1 + width * draft_levels)
        return TreeShape.chains(width, draft_levels)
    if match := _OPTIMAL.fullmatch(text):
        return _optimal(text, *map(int, match.groups()))
    if match := _DYNAMIC.fullmatch(text):
        return _dynamic(text, int(match[1]))
    raise ValueError(
        f"tree {text!r} is none of: none, NODES:dynamic (256:dynamic), NODESxLEVELS (768x18), WIDTHxLEVELS:kary (4x6:kary)"
    )


def _optimal(text: str, num_nodes: int, num_levels: int) -> OptimalTree:
    if num_nodes < 1 or num_levels < 1:
        raise ValueError(f"tree {text!r}: nodes and levels count the root and must be at least 1")
    if num_nodes > 1 and num_levels == 1:
        raise ValueError(f"tree {text!r}: one level holds the root alone, not {num_nodes} nodes")
    _check_size(text, num_nodes)
    return OptimalTree(num_nodes, num_levels)


def _dynamic(text: str, num_nodes: int) -> DynamicTree:
    if num_nodes < 2:
        raise ValueError(f"tree {text!r}: a tree of the root alone has no shape to choose; write none")
    _check_size(text, num_nodes)
    return DynamicTree(num_nodes)


def _check_size(text: str, num_nodes: int) -> None:
    if num_nodes > MAX_NODES:
        raise ValueError(f"tree {text!r} has {num_nodes} nodes; at most {MAX_NODES} are supported")
