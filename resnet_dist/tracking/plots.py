"""Plots of a run as PNG files, drawn from its spool: the figures of the paper, for the run's page in MLflow."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from resnet_dist.tracking.base import CONFUSION
from resnet_dist.tracking.figures import finite, new_figure, save, style
from resnet_dist.tracking.history import History
from resnet_dist.tracking.rank_plot import draw_ranks

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_log = logging.getLogger(__name__)
_MAX_NAMED_CLASSES = 30


def draw_plots(history: History, class_names: Sequence[str], folder: Path) -> list[Path]:
    """Writes one PNG for each plot that the history has numbers for; returns them."""
    drawn: list[Path] = []
    for draw in (
        lambda: _learning_curves(history, folder / "learning_curves.png"),
        lambda: _line(history, "train/lr", "learning rate", folder / "learning_rate.png"),
        lambda: _line(history, "speed/images_per_s", "images per second, all workers", folder / "throughput.png"),
        lambda: draw_ranks(history.points, folder / "throughput_by_rank.png"),
        lambda: _confusion(history, class_names, folder / "confusion.png"),
    ):
        try:
            path = draw()
        except Exception as error:  # noqa: BLE001 - whatever is in a spool, a missing plot ends no run
            _log.warning("a plot was not drawn: %s: %s", type(error).__name__, error)
            continue
        drawn += [path] if path is not None else []
    return drawn


def error_limit(curves: Sequence[Sequence[float]]) -> float:
    """Where the error axis ends, %: the end of training fills the plot, as in the paper's figures, the first steps are
    cut off. Twice the largest last error, in tens, 10 to 100.
    """
    last = [curve[-1] for curve in curves if curve]
    return float(min(100, max(10, 10 * math.ceil(2 * max(last, default=100.0) / 10))))


def _learning_curves(history: History, path: Path) -> Path | None:
    """As figures 4 and 6 of He et al. 2015: error in percent, train thin, validation bold."""
    figure = new_figure()
    axes = style(figure.add_subplot(), "step", "error (%)")
    curves = []
    for key, label, color, width in (
        ("train/top1_error", "train, top-1, with augmentation", "tab:blue", 0.8),
        ("val/top1_error", "validation, top-1", "tab:blue", 2.4),
        ("val/top5_error", "validation, top-5", "tab:orange", 2.4),
    ):
        steps, values = finite(history.points.get(key, []))
        if values:
            # One evaluation alone is no line.
            axes.plot(
                steps, values, color=color, linewidth=width, label=label, marker="o" if len(values) == 1 else None
            )
            curves.append(values)
    if not curves:
        return None
    axes.set_ylim(0, error_limit(curves))
    axes.legend(loc="upper right", frameon=False)
    return save(figure, path)


def _line(history: History, key: str, label: str, path: Path) -> Path | None:
    if not history.points.get(key):
        return None
    figure = new_figure()
    axes = style(figure.add_subplot(), "step", label)
    axes.plot(*finite(history.points[key]), linewidth=1.2)
    axes.set_ylim(bottom=0)
    return save(figure, path)


def _confusion(history: History, class_names: Sequence[str], path: Path) -> Path | None:
    """Rows: the true class, columns: the answer; colour: share of the true class."""
    import numpy as np

    try:
        tree = json.loads(history.texts[CONFUSION])
        if tree["num_classes"] != len(class_names):
            return None
        counts = np.zeros((len(class_names), len(class_names)), dtype=np.int64)
        for true, answered, number in tree["counts"]:
            counts[true, answered] = number
    except (KeyError, TypeError, ValueError, IndexError, OverflowError, RecursionError):  # the spool lies in storage
        return None
    return draw_confusion(counts, class_names, path)


def draw_confusion(counts: NDArray[np.int64], class_names: Sequence[str], path: Path) -> Path:
    """`counts` [C, C]: samples by true class (rows) and answer; the colour is the share of the true class."""
    import numpy as np

    figure = new_figure((6.0, 6.0))
    axes = style(figure.add_subplot(), f"answer ({counts.trace():,} of {counts.sum():,} right)", "true class")
    axes.grid(visible=False)
    axes.imshow(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1), cmap="Blues", vmin=0.0, vmax=1.0)
    if len(counts) <= _MAX_NAMED_CLASSES:
        axes.set_xticks(range(len(counts)), class_names, rotation=90)
        axes.set_yticks(range(len(counts)), class_names)
        for true, answered in zip(*np.nonzero(counts), strict=True):
            number = counts[true, answered]
            dark = number > 0.5 * counts[true].sum()
            axes.text(answered, true, str(number), ha="center", va="center", color="white" if dark else "black")
    return save(figure, path)
