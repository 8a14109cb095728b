"""Pictures of benchmarks, with matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .engines import LABELS


def save_bars(summary: Sequence[dict[str, Any]], path: Path) -> None:
    """s/token of every engine that ran, the physical floor as a line on ours."""
    rows = [row for row in summary if row["s_per_token_p50"]]
    figure, axes = _new((9, 0.6 * len(rows) + 1.2))
    for position, row in enumerate(rows):
        axes.barh(position, row["s_per_token_p50"], color="#2ca02c" if row["engine"] == "ours" else "#1f77b4")
        if row["floor_s_per_token"]:
            axes.plot([row["floor_s_per_token"]] * 2, [position - 0.4, position + 0.4], color="black")
    axes.set(yticks=range(len(rows)), yticklabels=[LABELS[row["engine"]] for row in rows], xlabel="s/token (line: floor)")
    axes.invert_yaxis()
    _save(figure, path)


def save_curve(points: Sequence[tuple[float, float]], path: Path, *, x: str, y: str, log: bool = False) -> None:
    figure, axes = _new((6, 4))
    axes.plot([point[0] for point in points], [point[1] for point in points], marker="o")
    axes.set(xlabel=x, ylabel=y, ylim=(0, None))
    if log:
        axes.set_xscale("log", base=2)
    _save(figure, path)


def _new(size: tuple[float, float]) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=size, layout="constrained")
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=130)
    plt.close(figure)
