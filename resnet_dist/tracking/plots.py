"""Plots of a run as PNG files, drawn from its spool: the figures of the paper, for the run's page in MLflow."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from resnet_dist.tracking.base import CONFUSION
from resnet_dist.tracking.history import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_NAMED_CLASSES = 30
_SIZE_INCHES = (6.4, 4.0)
_DPI = 110


def draw_plots(history: History, class_names: Sequence[str], folder: Path) -> list[Path]:
    """Writes one PNG for each plot that the history has numbers for; returns them."""
    drawn = [
        _learning_curves(history, folder / "learning_curves.png"),
        _lines(history, {"train/lr": "learning rate"}, folder / "learning_rate.png"),
        _lines(history, {"speed/images_per_s": "images per second, all workers"}, folder / "throughput.png"),
        _confusion(history, class_names, folder / "confusion.png"),
    ]
    return [path for path in drawn if path is not None]


def finite(points: Iterable[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """Steps and values of the points that can be drawn."""
    kept = [(step, value) for step, value in points if math.isfinite(value)]
    return [step for step, _ in kept], [value for _, value in kept]


def _learning_curves(history: History, path: Path) -> Path | None:
    """As figures 4 and 6 of He et al. 2015: error in percent, train thin, validation bold."""
    train, val = history.points.get("train/top1_error", []), history.points.get("val/top1_error", [])
    if not train and not val:
        return None
    axes = _axes("error (%)")
    axes.plot(*finite(train), color="tab:blue", linewidth=0.8, label="train, top-1, with augmentation")
    axes.plot(*finite(val), color="tab:blue", linewidth=2.4, label="validation, top-1")
    axes.plot(
        *finite(history.points.get("val/top5_error", [])), color="tab:orange", linewidth=2.4, label="validation, top-5"
    )
    axes.set_ylim(0, 100)
    axes.legend(loc="upper right")
    return _saved(axes, path)


def _lines(history: History, labels: dict[str, str], path: Path) -> Path | None:
    if not any(history.points.get(key) for key in labels):
        return None
    axes = _axes(" / ".join(labels.values()))
    for key in labels:
        axes.plot(*finite(history.points.get(key, [])), linewidth=1.2)
    axes.set_ylim(bottom=0)
    return _saved(axes, path)


def _confusion(history: History, class_names: Sequence[str], path: Path) -> Path | None:
    """Rows: the true class, columns: the answer; colour: share of the true class."""
    import numpy as np

    if CONFUSION not in history.texts:
        return None
    tree = json.loads(history.texts[CONFUSION])
    counts = np.zeros((tree["num_classes"], tree["num_classes"]), dtype=np.int64)
    for true, answered, number in tree["counts"]:
        counts[true, answered] = number
    axes = _axes("true class", size_inches=(6.0, 6.0))
    axes.grid(visible=False)
    axes.imshow(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1), cmap="Blues", vmin=0.0, vmax=1.0)
    axes.set_xlabel(f"answer ({counts.trace():,} of {counts.sum():,} right)")
    if len(counts) <= _MAX_NAMED_CLASSES:
        axes.set_xticks(range(len(counts)), class_names, rotation=90)
        axes.set_yticks(range(len(counts)), class_names)
        for true, answered, number in tree["counts"]:
            dark = number > 0.5 * counts[true].sum()
            axes.text(answered, true, str(number), ha="center", va="center", color="white" if dark else "black")
    return _saved(axes, path)


def _axes(label: str, size_inches: tuple[float, float] = _SIZE_INCHES) -> Axes:
    # Not pyplot: that keeps figures in a global list and may look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size_inches, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(visible=True, alpha=0.3)
    return axes


def _saved(axes: Axes, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.savefig(path)
    return path
