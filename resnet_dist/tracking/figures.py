"""What all plots of a run have in common: a figure without a window, the axes, the file."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.beton.files import make_folder, written_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 110


def new_figure(size_inches: tuple[float, float] = (6.4, 4.0)) -> Figure:
    """Not pyplot's: that keeps figures in a global list and may look for a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size_inches, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def style(axes: Axes, x_label: str, y_label: str) -> Axes:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(visible=True, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def save(figure: Figure, path: Path) -> Path:
    make_folder(path.parent)
    with written_atomically(path, durable=False) as file:
        figure.savefig(file, format=path.suffix.removeprefix("."))
    return path


def finite(points: Iterable[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """Steps and values of the points that can be drawn."""
    kept = [(step, value) for step, value in points if math.isfinite(value)]
    return [step for step, _ in kept], [value for _, value in kept]
