"""Drawings of trees, read back from the SVG: what is there, where it is, and what it costs."""

import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings

from shapes import chain, from_widths, shapes
from tree.draw import draw_svg
from tree.shape import TreeShape

SVG = "{http://www.w3.org/2000/svg}"
UNEVEN = TreeShape((-1, 0, 0, 0, 1, 1, 3, 4))
LARGE = {
    "binary": TreeShape(tuple((node - 1) // 2 for node in range(4096))),
    "chain": chain(4096),
    "chains": TreeShape.chains(105, 39),
    "star": TreeShape.chains(4095, 1),
}


def circles(svg: str) -> list[ElementTree.Element]:
    """Of all nodes, in node order; every node is there once."""
    found = list(ElementTree.fromstring(svg).iter(f"{SVG}circle"))
    assert [circle.get("id") for circle in found] == [f"n{node}" for node in range(len(found))]
    return found


def number(element: ElementTree.Element, name: str) -> float:
    return float(element.attrib[name])


def assert_well_laid_out(shape: TreeShape, svg: str) -> None:
    drawn = circles(svg)
    assert len(drawn) == shape.num_nodes
    rows = [[drawn[node] for node in level] for level in shape.levels]
    for row in rows:
        assert len({number(circle, "cy") for circle in row}) == 1
        for left, right in pairwise(row):  # in draw order, apart
            assert number(right, "cx") - number(left, "cx") > number(left, "r") + number(right, "r")
    for above, below in pairwise(rows):
        assert number(below[0], "cy") - number(above[0], "cy") > number(above[0], "r") + number(below[0], "r")
    root = ElementTree.fromstring(svg)
    for circle in drawn:
        for axis, size in (("cx", "width"), ("cy", "height")):
            assert number(circle, "r") < number(circle, axis) < number(root, size) - number(circle, "r")


def edges(svg: str) -> list[tuple[float, float]]:
    """x of both ends of every edge."""
    found = [path.attrib["d"] for path in ElementTree.fromstring(svg).iter(f"{SVG}path")]
    curves = [curve for path in found for curve in path.split("M")[1:]]
    return [(float(curve.split()[0]), float(curve.split()[-2])) for curve in curves]


# -- layout --------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(shapes())
def test_every_node_is_drawn_once_and_rows_keep_their_order_without_overlaps(shape: TreeShape) -> None:
    assert_well_laid_out(shape, draw_svg(shape))


@settings(max_examples=30, deadline=None)
@given(shapes())
def test_every_edge_joins_a_node_and_its_parent(shape: TreeShape) -> None:
    svg = draw_svg(shape)
    xs = [number(circle, "cx") for circle in circles(svg)]
    expected = [(xs[shape.parents[node]], xs[node]) for node in range(1, shape.num_nodes)]
    assert sorted(edges(svg)) == sorted(expected)


def test_the_root_alone_is_a_drawing() -> None:
    svg = draw_svg(TreeShape.root_only(), values=[0.0], path=[0])
    assert len(circles(svg)) == 1 and edges(svg) == []
    assert "1 node, 1 level, widest level 0 (1 node), accepted path of 1 node" in svg


def test_symmetric_trees_are_drawn_symmetric() -> None:
    xs = [number(circle, "cx") for circle in circles(draw_svg(from_widths((3, 2, 2))))]
    shape = from_widths((3, 2, 2))
    for level in shape.levels:
        row = [xs[node] - xs[0] for node in level]
        assert row == pytest.approx([-x for x in reversed(row)], abs=0.2)  # rounded to tenths


@pytest.mark.matrix
@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE)
def test_four_thousand_nodes_stay_small_quick_and_apart(shape: TreeShape) -> None:
    """The bar is a second and 2 MB; 0.1 to 0.3 s on an idle core when measured. The best of three, for a busy one."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        svg = draw_svg(shape, values=[1 / (1 + node) for node in range(4096)], path=shape.path(4095))
        times.append(time.perf_counter() - start)
    assert min(times) < 1 and len(svg) < 2e6
    assert_well_laid_out(shape, svg)


# -- what is said ----------------------------------------------------------------------------------------------------------


def test_caption_and_labels_give_the_numbers() -> None:
    root = ElementTree.fromstring(draw_svg(UNEVEN))
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert texts == ["8 nodes, 4 levels, widest level 1 (3 nodes)", "level: nodes", "0: 1", "1: 3", "2: 3", "3: 1"]
    assert root.findtext(f"{SVG}title") == texts[0]


def test_pointing_at_a_node_tells_what_it_is() -> None:
    drawn = circles(draw_svg(UNEVEN, values=[1.0, 0.5, 0.25, 0.1, 0.3, 0.1, 1 / 30, 0.0]))
    titles = [circle.findtext(f"{SVG}title") for circle in drawn]
    assert titles[0] == "node 0, level 0, 1" and titles[5] == "node 5, level 2, child 2 of node 1, 0.1"
    assert titles[6] == "node 6, level 2, child 1 of node 3, 0.03333"


def test_nodes_fade_with_their_values() -> None:
    values = [1.0, 0.5, 0.25, 0.1, 0.3, 0.1, 0.03, 0.0]
    opacities = [float(circle.get("fill-opacity", 1)) for circle in circles(draw_svg(UNEVEN, values=values))]
    assert sorted(range(8), key=lambda node: (-opacities[node], node)) == sorted(
        range(8), key=lambda node: (-values[node], node)
    )
    assert opacities[0] == 1 and opacities[7] > 0.1
    scaled = circles(draw_svg(UNEVEN, values=[10 * value for value in values]))
    assert [float(circle.get("fill-opacity", 1)) for circle in scaled] == opacities


def test_the_accepted_path_stands_out() -> None:
    path = UNEVEN.path(7)
    drawn = circles(draw_svg(UNEVEN, values=[0.5] * 8, path=path))
    coloured = [node for node, circle in enumerate(drawn) if circle.get("fill") is not None]
    assert coloured == list(path) == [0, 1, 4, 7]
    assert "accepted path of 4 nodes" in draw_svg(UNEVEN, path=path)
    *_, last = ElementTree.fromstring(draw_svg(UNEVEN, path=path)).iter(f"{SVG}path")
    assert last.attrib["d"].count("M") == 3 and last.get("stroke") == drawn[0].get("fill")


def test_the_same_arguments_give_the_same_text() -> None:
    assert draw_svg(UNEVEN, path=(0, 2)) == draw_svg(TreeShape(UNEVEN.parents), path=[0, 2])


@pytest.mark.parametrize(
    "values, path, message",
    [
        ([1.0] * 7, None, "7 values for a tree of 8 nodes"),
        ([1.0] * 7 + [-0.1], None, "the value of node 7 is -0.1"),
        ([1.0, float("nan")] + [1.0] * 6, None, "the value of node 1 is nan"),
        ([float("inf")] + [1.0] * 7, None, "the value of node 0 is inf"),
        (None, (), "not a path from the root"),
        (None, (0, 4), "not a path from the root"),
        (None, (0, 8), "node 8 is not in a tree of 8 nodes"),
    ],
)
def test_what_does_not_fit_the_shape_is_refused(values: list[float] | None, path: tuple[int, ...] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_svg(UNEVEN, values=values, path=path)


def test_drawing_needs_neither_torch_nor_numpy() -> None:
    code = "from sys import modules; import tree.draw; print({'torch', 'numpy'} & set(modules))"
    root = Path(__file__).resolve().parent.parent
    ran = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.strip() == "set()"
