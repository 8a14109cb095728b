import json
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shapes import chain
from tree.shape import TreeShape
from tree.spec import MAX_NODES, DynamicTree, OptimalTree, parse_tree_spec

UNEVEN = TreeShape((-1, 0, 0, 0, 1, 1, 3, 4))


@st.composite
def shapes(draw: st.DrawFn, max_nodes: int = 40) -> TreeShape:
    parents = [-1]
    for node in range(1, draw(st.integers(1, max_nodes))):
        parents.append(draw(st.integers(max(0, parents[-1]), node - 1)))
    return TreeShape(tuple(parents))


# -- tables --------------------------------------------------------------------------------------------------------------


def test_tables_of_a_small_tree() -> None:
    assert (UNEVEN.num_nodes, UNEVEN.num_levels, UNEVEN.max_branching) == (8, 4, 3)
    assert UNEVEN.depths == (0, 1, 1, 1, 2, 2, 2, 3)
    assert UNEVEN.levels == (range(1), range(1, 4), range(4, 7), range(7, 8))
    assert UNEVEN.num_children == (3, 2, 0, 1, 1, 0, 0, 0)
    assert [tuple(UNEVEN.children(node)) for node in range(5)] == [(1, 2, 3), (4, 5), (), (6,), (7,)]
    assert UNEVEN.ranks == (-1, 0, 1, 2, 0, 1, 0, 0)
    assert UNEVEN.expanded == ((0,), (1, 3), (4,), ())
    assert UNEVEN.path(7) == (0, 1, 4, 7)
    assert UNEVEN.post_order == (7, 4, 5, 1, 2, 6, 3, 0)


@given(shapes())
def test_tables_agree_with_parents(shape: TreeShape) -> None:
    assert [node for level in shape.levels for node in level] == list(range(shape.num_nodes))
    assert [depth for depth, level in enumerate(shape.levels) for _ in level] == list(shape.depths)
    for node in range(shape.num_nodes):
        assert list(shape.children(node)) == [child for child, parent in enumerate(shape.parents) if parent == node]
        assert [shape.ranks[child] for child in shape.children(node)] == list(range(shape.num_children[node]))
        path = shape.path(node)
        assert (path[0], path[-1], len(path)) == (0, node, shape.depths[node] + 1)
        assert all(shape.parents[below] == above for above, below in pairwise(path))
    assert tuple(node for level in shape.expanded for node in level) == tuple(
        node for node in range(shape.num_nodes) if shape.num_children[node]
    )


@given(shapes())
def test_mask_row_is_the_path(shape: TreeShape) -> None:
    assert [tuple(np.flatnonzero(row).tolist()) for row in shape.ancestor_mask] == [
        shape.path(node) for node in range(shape.num_nodes)
    ]


@given(shapes())
def test_post_order_puts_children_in_draw_order_before_their_parent(shape: TreeShape) -> None:
    def visit(node: int) -> list[int]:
        return [below for child in shape.children(node) for below in visit(child)] + [node]

    assert list(shape.post_order) == visit(0)


@given(shapes(), st.integers(1, 8))
def test_truncation_keeps_a_prefix_of_whole_levels(shape: TreeShape, num_levels: int) -> None:
    cut = shape.truncated(num_levels)
    assert cut.parents == shape.parents[: cut.num_nodes]
    assert cut.num_levels == min(num_levels, shape.num_levels)
    assert cut.levels == shape.levels[:num_levels]
    if num_levels >= shape.num_levels:
        assert cut is shape


def test_equal_parents_mean_equal_and_equally_hashed_shapes() -> None:
    twin = TreeShape(UNEVEN.parents)
    assert UNEVEN.ancestor_mask.any()  # a derived table must not matter
    assert twin == UNEVEN and hash(twin) == hash(UNEVEN) and len({twin, UNEVEN}) == 1
    assert twin != TreeShape.root_only()


def test_mask_is_read_only() -> None:
    with pytest.raises(ValueError, match="read-only"):
        UNEVEN.ancestor_mask[0, 0] = False


def test_path_outside_the_tree_is_refused() -> None:
    for node in (-1, 8):
        with pytest.raises(ValueError, match=f"node {node} is not in a tree of 8 nodes"):
            UNEVEN.path(node)


def test_four_thousand_nodes_take_milliseconds() -> None:
    start = time.perf_counter()
    shape = TreeShape.chains(64, 64)
    tables = (shape.levels, shape.ranks, shape.expanded, shape.post_order, shape.ancestor_mask)
    assert all(len(table) for table in tables)
    assert time.perf_counter() - start < 1.0  # 20 ms when measured; the margin is for a busy machine


# -- constructors --------------------------------------------------------------------------------------------------------


def test_constructors_give_their_levels() -> None:
    def nodes_per_level(shape: TreeShape) -> list[int]:
        return [len(level) for level in shape.levels]

    assert TreeShape.root_only().parents == (-1,)
    assert TreeShape.root_only().max_branching == 0
    assert TreeShape.chains(3, 2).truncated(1) == TreeShape.root_only()
    assert nodes_per_level(TreeShape.chains(4, 6)) == [1] + [4] * 6
    assert TreeShape.chains(2, 3).parents == (-1, 0, 0, 1, 2, 3, 4)
    assert TreeShape.chains(1, 4) == chain(5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: TreeShape.chains(0, 3),
        lambda: TreeShape.chains(3, 0),
        lambda: UNEVEN.truncated(0),
    ],
)
def test_sizes_below_one_are_refused(make) -> None:
    with pytest.raises(ValueError, match="at least 1, not 0"):
        make()


# -- validation and JSON -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ([], "parents is empty"),
        ([0], "node 0 must be the root"),
        ([-1, 0, -1], "two roots: node 0 and node 2"),
        ([-1, 2, 0], "node 1 comes before its parent 2"),
        ([-1, 0, 2], "node 2 is on a cycle: 2 -> 2"),
        ([-1, 0, 3, 2], "node 2 is on a cycle: 2 -> 3 -> 2"),
        ([-1, 0, 3], "node 2 has parent 3, outside the 3 nodes"),
        ([-1, -2], "node 1 has parent -2, outside"),
        ([-1, 0, 1, 0], "node 3 .parent 0. follows node 2 .parent 1."),
        ([-1, 0.0], "node 1 has parent 0.0, which is not an integer"),
        ([-1, "0"], "node 1 has parent '0'"),
        ([-1, True], "node 1 has parent True"),
        ([-1, None], "node 1 has parent None"),
    ],
)
def test_bad_parents_name_the_node_at_fault(parents: list[object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TreeShape.from_json({"schema_version": 1, "parents": parents})


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "a tree file holds a JSON object, not list"),
        ({"parents": [-1]}, "schema_version is None, expected 1"),
        ({"schema_version": 2, "parents": [-1]}, "schema_version is 2"),
        ({"schema_version": 1}, '"parents" must be a list, not NoneType'),
        ("{", "must be JSON"),
        ("[" * 100_000, "must be JSON"),
    ],
)
def test_bad_documents_name_the_field_at_fault(document: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TreeShape.from_json(document)


@given(shapes())
def test_json_round_trip(shape: TreeShape) -> None:
    assert TreeShape.from_json(shape.to_json()) == shape
    assert TreeShape.from_json(json.dumps({**shape.to_json(), "comment": "kept by nobody"})) == shape


# -- specifications ------------------------------------------------------------------------------------------------------


def test_specifications_mean_what_the_command_line_says() -> None:
    assert parse_tree_spec("none") == TreeShape.root_only()
    assert parse_tree_spec("4x6:kary") == TreeShape.chains(4, 6)
    assert parse_tree_spec("768x18") == OptimalTree(num_nodes=768, num_levels=18)
    assert parse_tree_spec("1x1") == OptimalTree(1, 1)
    assert parse_tree_spec("256:dynamic") == DynamicTree(256)


@pytest.mark.parametrize(
    "text",
    [
        *("", "auto", "None", "768", "768x", "x18", "768x18x2", "-1x2", "4x6:karyy", "4x6:", " 4x6", "4.0x6", "1e3x4"),
        *("0x3", "3x0", "2x1", "0x3:kary", "3x0:kary", "\u0663x\u0663", "9" * 5000 + "x2"),
        *(f"{MAX_NODES + 1}x4", "999999999x999999999:kary", f"{MAX_NODES + 1}:dynamic"),
        *("1:dynamic", "0:dynamic", "-4:dynamic", "dynamic", ":dynamic", "64x8:dynamic", "64:dynamic:kary", "64:Dynamic"),
    ],
)
def test_other_specifications_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="tree "):
        parse_tree_spec(text)


def test_shapes_and_specifications_need_neither_torch_nor_numpy() -> None:
    """Commands without tensors must answer in half a second."""
    command = [sys.executable, "-X", "importtime", "-c", "import tree.shape, tree.spec, tree.acceptance"]
    root = Path(__file__).resolve().parent.parent
    imported = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stderr
    assert "tree.acceptance" in imported
    assert "torch" not in imported and "numpy" not in imported
