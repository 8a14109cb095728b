"""Pictures of the plan: the tree, and seconds per token against a resource."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tree.draw import draw_svg, place_nodes
from tree.optimizer import node_values
from tree.shape import TreeShape

from ..config import counted
from ..errors import UsageError
from ..planner.plan import Plan
from ..planner.prediction import DraftOption
from .plan_screen import sweep_unit


def draw_tree(path: Path, made: Plan, draft: DraftOption | None) -> None:
    """The plan's tree as SVG or PNG; the less probable a node is to be accepted, the fainter."""
    values = node_values(made.tree, draft.acceptance) if draft is not None else (1.0,)
    if path.suffix == ".svg":
        path.write_text(draw_svg(made.tree, values=values), encoding="utf-8")
    else:
        _draw_png(path, made.tree, values)


def _draw_png(path: Path, shape: TreeShape, values: Sequence[float]) -> None:
    plt = _pyplot("--draw")
    layout = place_nodes(shape)
    figure, axes = plt.subplots(figsize=(layout.width / 100, layout.height / 100), dpi=100)
    for node in range(1, shape.num_nodes):
        parent = shape.parents[node]
        opacity = max(values[node] ** 0.5, 0.15)
        axes.plot(
            (layout.xs[parent], layout.xs[node]), (layout.ys[parent], layout.ys[node]), color="#75818d", lw=0.7, alpha=opacity
        )
    opacities = [max(value**0.5, 0.15) for value in values]
    axes.scatter(layout.xs, layout.ys, s=3 * layout.radius**2, c="#1f2d3d", alpha=opacities, zorder=2)
    axes.set_title(f"{counted(shape.num_nodes, 'node')}, {counted(shape.num_levels, 'level')}", loc="left")
    axes.invert_yaxis()
    axes.axis("off")
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def plot_sweep(path: Path, name: str, points: Sequence[tuple[float, float]]) -> None:
    """Predicted seconds per token against the resource that was swept."""
    plt = _pyplot("--plot")
    unit, scale = sweep_unit(name, points[-1][0])
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot([value / scale for value, _ in points], [s_per_token for _, s_per_token in points], marker="o", ms=3)
    axes.set_xlabel(f"{name} ({unit})")
    axes.set_ylabel("predicted s/token")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def _pyplot(flag: str) -> Any:
    if find_spec("matplotlib") is None:
        raise UsageError("a picture needs matplotlib", where=flag, cure="install matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
