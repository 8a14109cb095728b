"""A tree as a picture: standalone SVG text, one row per level, children from left to right in draw order.

Knows shapes and numbers, not tokens. Needs neither torch nor numpy, and the same arguments give the same text.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .shape import TreeShape

INK, FAINT, ACCENT, PAPER = "#1f2d3d", "#75818d", "#d9480f", "#ffffff"
MARGIN = 24.0
FONT_SIZE, CAPTION_SIZE = 12.0, 15.0
CAPTION_HEIGHT = 52.0  # above the rows
LABEL_WIDTH = 76.0  # left of the rows: level, and number of its nodes
MIN_WIDTH = 520.0  # the caption fits
MAX_WIDTH, MAX_HEIGHT = 1600.0, 1000.0  # kept unless nodes would come closer than this:
MIN_DISTANCE, MAX_DISTANCE = 5.0, 36.0  # between neighbours in a row
MIN_ROW_HEIGHT, MAX_ROW_HEIGHT = 10.0, 64.0
MAX_RADIUS = 9.0
MIN_OPACITY = 0.2  # a node of value 0 can still be seen
SWEEPS = 12  # the least sum takes hundreds and looks the same


@dataclass(frozen=True, slots=True)
class Layout:
    """Everything in pixels, at [node]."""

    width: float
    height: float
    row_height: float
    radius: float
    xs: tuple[float, ...]
    ys: tuple[float, ...]


def draw_svg(shape: TreeShape, *, values: Sequence[float] | None = None, path: Sequence[int] | None = None) -> str:
    """`shape` as an SVG document, with a caption: number of nodes and levels, widest level.

    values: one per node, such as the probability that its path is accepted: the smaller, the fainter node and edge.
    path: accepted nodes, the root first, drawn in another colour. Node v is the circle with id "n<v>"; pointing at it shows
    what it is. ValueError for values or a path that do not fit the shape.
    """
    opacities = _opacities(shape, values)
    accepted = _accepted(shape, path)
    layout = place_nodes(shape)
    parts = [
        *_head(shape, layout, len(accepted)),
        *_labels(shape, layout),
        *_edges(shape, layout, opacities, accepted),
        *_nodes(shape, layout, opacities, accepted, values),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


# -- where things are ----------------------------------------------------------------------------------------------------


def place_nodes(shape: TreeShape) -> Layout:
    """Where a picture has its nodes: levels in rows, parents above their children as far as there is room."""
    places = _places(shape)
    left, right = min(places), max(places)
    distance = _clamp(MAX_WIDTH / max(1.0, right - left), MIN_DISTANCE, MAX_DISTANCE)
    row_height = _clamp(MAX_HEIGHT / shape.num_levels, MIN_ROW_HEIGHT, MAX_ROW_HEIGHT)
    radius = min(0.36 * distance, 0.3 * row_height, MAX_RADIUS)
    border = MARGIN + radius
    width = max(MIN_WIDTH, LABEL_WIDTH + (right - left) * distance + 2 * border)
    return Layout(
        width=width,
        height=CAPTION_HEIGHT + (shape.num_levels - 1) * row_height + 2 * border,
        row_height=row_height,
        radius=radius,
        xs=tuple((LABEL_WIDTH + width) / 2 + (place - (left + right) / 2) * distance for place in places),
        ys=tuple(CAPTION_HEIGHT + border + depth * row_height for depth in shape.depths),
    )


def _places(shape: TreeShape) -> list[float]:
    """Where each node stands in its row, neighbours at least 1 apart.

    Rows keep breadth-first order, so no edges cross. Row by row, downwards and upwards in turn, nodes move to where the
    squared lengths of the row's edges have the least sum.
    """
    places = [0.0] * shape.num_nodes
    for sweep in range(SWEEPS):
        for level in shape.levels[:: 1 if sweep % 2 == 0 else -1]:
            targets, weights = [], []
            for node in level:
                neighbours = [shape.parents[node]] if node else []
                neighbours += shape.children(node) if sweep else []  # which have no places before the first sweep
                weights.append(max(1, len(neighbours)))
                targets.append(sum(places[neighbour] for neighbour in neighbours) / weights[-1])
            places[level.start : level.stop] = _one_apart(targets, weights)
    return places


def _one_apart(targets: list[float], weights: list[int]) -> list[float]:
    """The places nearest to `targets` in weighted least squares, in order and at least 1 apart (pool adjacent violators)."""
    blocks: list[tuple[float, int, int]] = []  # neighbours exactly 1 apart: weighted sum of where they want it, weight, length
    for index, (target, weight) in enumerate(zip(targets, weights, strict=True)):
        total, length = (target - index) * weight, 1
        while blocks and blocks[-1][0] * weight >= total * blocks[-1][1]:
            block = blocks.pop()
            total, weight, length = total + block[0], weight + block[1], length + block[2]
        blocks.append((total, weight, length))
    shifts = [total / weight for total, weight, length in blocks for _ in range(length)]
    return [index + shift for index, shift in enumerate(shifts)]


def _clamp(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


# -- what is drawn -------------------------------------------------------------------------------------------------------


def _head(shape: TreeShape, layout: Layout, num_accepted: int) -> list[str]:
    sizes = [len(level) for level in shape.levels]
    widest = max(sizes)
    caption = f"{_count(shape.num_nodes, 'node')}, {_count(shape.num_levels, 'level')}"
    caption += f", widest level {sizes.index(widest)} ({_count(widest, 'node')})"
    caption += f", accepted path of {_count(num_accepted, 'node')}" if num_accepted else ""
    width, height = _pixels(layout.width), _pixels(layout.height)
    place = f'x="{_pixels(MARGIN)}" y="{_pixels(MARGIN + 6)}"'
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="{_pixels(FONT_SIZE)}" role="img">',
        f"<title>{caption}</title>",
        f'<rect width="100%" height="100%" fill="{PAPER}"/>',
        f'<text {place} font-size="{_pixels(CAPTION_SIZE)}" fill="{INK}">{caption}</text>',
    ]


def _labels(shape: TreeShape, layout: Layout) -> list[str]:
    """Number of nodes beside each row, or beside every few rows where text is higher than they are."""
    lines = [f'<g fill="{FAINT}">', f'<text x="{_pixels(MARGIN)}" y="{_pixels(CAPTION_HEIGHT + 4)}">level: nodes</text>']
    step = math.ceil(1.2 * FONT_SIZE / layout.row_height)
    for depth in range(0, shape.num_levels, step):
        level = shape.levels[depth]
        y = layout.ys[level.start] + 0.35 * FONT_SIZE
        lines.append(f'<text x="{_pixels(MARGIN)}" y="{_pixels(y)}">{depth}: {len(level)}</text>')
    return [*lines, "</g>"]


def _edges(shape: TreeShape, layout: Layout, opacities: list[float], accepted: frozenset[int]) -> list[str]:
    """One path element per opacity, holding all its edges; the accepted ones come last, on top."""
    curves: dict[tuple[bool, str], list[str]] = {}
    for node in range(1, shape.num_nodes):
        parent = shape.parents[node]
        start, end = layout.ys[parent] + layout.radius, layout.ys[node] - layout.radius  # nodes are translucent
        x, end_x, middle = _pixels(layout.xs[parent]), _pixels(layout.xs[node]), _pixels((start + end) / 2)
        curve = f"M{x} {_pixels(start)}C{x} {middle} {end_x} {middle} {end_x} {_pixels(end)}"
        curves.setdefault((node in accepted, f"{opacities[node]:.2f}"), []).append(curve)
    thin = _clamp(layout.radius / 5, 0.5, 1.2)
    lines = ['<g fill="none">']
    for (on_path, opacity), drawn in sorted(curves.items()):
        style = f'stroke="{ACCENT}" stroke-width="{3 * thin:.2f}"' if on_path else f'stroke="{INK}" stroke-width="{thin:.2f}"'
        style += "" if on_path or opacity == "1.00" else f' stroke-opacity="{opacity}"'
        lines.append(f'<path {style} d="{"".join(drawn)}"/>')
    return [*lines, "</g>"]


def _nodes(
    shape: TreeShape, layout: Layout, opacities: list[float], accepted: frozenset[int], values: Sequence[float] | None
) -> list[str]:
    lines, radius = [f'<g fill="{INK}">'], _pixels(layout.radius)
    for node in range(shape.num_nodes):
        style = f' fill="{ACCENT}"' if node in accepted else ""
        style += "" if node in accepted or opacities[node] == 1 else f' fill-opacity="{opacities[node]:.2f}"'
        about = f"node {node}, level {shape.depths[node]}"
        about += f", child {shape.ranks[node] + 1} of node {shape.parents[node]}" if node else ""
        about += f", {values[node]:.4g}" if values is not None else ""
        x, y = _pixels(layout.xs[node]), _pixels(layout.ys[node])
        lines.append(f'<circle id="n{node}" cx="{x}" cy="{y}" r="{radius}"{style}><title>{about}</title></circle>')
    return [*lines, "</g>"]


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _pixels(value: float) -> str:
    """In tenths."""
    return f"{value:.1f}".removesuffix(".0")


# -- arguments -----------------------------------------------------------------------------------------------------------


def _opacities(shape: TreeShape, values: Sequence[float] | None) -> list[float]:
    """Of each node, from its share of the largest value: probabilities of paths span decades, so by the fourth root."""
    if values is None:
        return [1.0] * shape.num_nodes
    if len(values) != shape.num_nodes:
        raise ValueError(f"{len(values)} values for a tree of {shape.num_nodes} nodes")
    for node, value in enumerate(values):
        if not 0 <= value < math.inf:  # false for NaN
            raise ValueError(f"the value of node {node} is {value}: it must be finite and not negative")
    largest = max(values) or 1.0
    return [MIN_OPACITY + (1 - MIN_OPACITY) * (value / largest) ** 0.25 for value in values]


def _accepted(shape: TreeShape, path: Sequence[int] | None) -> frozenset[int]:
    if path is None:
        return frozenset()
    if not path or tuple(path) != shape.path(path[-1]):
        raise ValueError(f"{tuple(path)} is not a path from the root of this tree of {shape.num_nodes} nodes")
    return frozenset(path)
