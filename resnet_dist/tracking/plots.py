"""Plots as PNG files: a run's curves, its workers, its confusion matrix; and the schedules of recipes.

A run's plots are drawn from its spool, as the figures of He et al. 2015, for its page in MLflow.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.beton.files import make_folder, written_atomically
from resnet_dist.tracking.spool import History
from resnet_dist.tracking.tracker import CONFUSION

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_log = logging.getLogger(__name__)
Points = Mapping[str, Sequence[tuple[int, float]]]
"""(step, value) of every metric."""
_DPI = 110
_MAX_NAMED_CLASSES = 30
_MAX_NAMED_RANKS = 8
"""More curves than this have no legend: only the slowest one is named."""
_MAX_BARS = 16
_COLUMNS = 3


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


# The plots of a run.


def draw_plots(history: History, class_names: Sequence[str], folder: Path) -> list[Path]:
    """Writes one PNG for each plot that the history has numbers for; returns their paths."""
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
        except Exception as error:  # noqa: BLE001 - whatever is in a spool, a missing plot must not end a run
            _log.warning("a plot was not drawn: %s: %s", type(error).__name__, error)
            continue
        drawn += [path] if path is not None else []
    return drawn


def error_limit(curves: Sequence[Sequence[float]]) -> float:
    """Where the error axis ends, %: twice the largest last error, in tens, 10 to 100.

    As in the paper's figures, the end of training fills the plot and the first steps are cut off.
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
            # A single evaluation draws no line.
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
    """None if the last evaluation's matrix is not in the spool, or is not for these classes."""
    try:
        tree = json.loads(history.texts[CONFUSION])
        if tree["num_classes"] != len(class_names):
            return None
        counts = np.zeros((len(class_names), len(class_names)), dtype=np.int64)
        for true, predicted, number in tree["counts"]:
            counts[true, predicted] = number
    except (KeyError, TypeError, ValueError, IndexError, OverflowError, RecursionError):  # others may write to storage
        return None
    return draw_confusion(counts, class_names, path)


def draw_confusion(counts: NDArray[np.int64], class_names: Sequence[str], path: Path) -> Path:
    """`counts` [C, C]: samples by true class (rows) and predicted class; colour is the share of the true class."""
    figure = new_figure((6.0, 6.0))
    axes = style(figure.add_subplot(), f"predicted class ({counts.trace():,} of {counts.sum():,} right)", "true class")
    axes.grid(visible=False)
    axes.imshow(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1), cmap="Blues", vmin=0.0, vmax=1.0)
    if len(counts) <= _MAX_NAMED_CLASSES:
        axes.set_xticks(range(len(counts)), class_names, rotation=90)
        axes.set_yticks(range(len(counts)), class_names)
        for true, predicted in zip(*np.nonzero(counts), strict=True):
            number = counts[true, predicted]
            dark = number > 0.5 * counts[true].sum()
            axes.text(predicted, true, str(number), ha="center", va="center", color="white" if dark else "black")
    return save(figure, path)


# Which worker slowed the others down, and how: by computing, or by waiting for images.


class StepShares(NamedTuple):
    """One worker's seconds per step, means over the run."""

    worker: str
    """Its rank, or `median` of many workers."""
    computing_s: float
    data_wait_s: float
    others_wait_s: float

    @property
    def busy_s(self) -> float:
        return self.computing_s + self.data_wait_s


def step_shares(points: Points) -> list[StepShares]:
    """By rank, each over the time in which it was part of the run and had curves of its own; the median of many workers
    is last."""
    keys = {str(rank): f"worker/{rank}/{{}}" for rank in _ranks(points)}
    if "workers/step_s/median" in points:
        keys["median"] = "workers/{}/median"
    found = []
    for worker, key in keys.items():
        step_s, data_wait_s, others_wait_s = (
            mean(value for _, value in points[key.format(name)])
            for name in ("step_s", "data_wait_s", "all_reduce_wait_s")
        )
        found.append(StepShares(worker, max(0.0, step_s - data_wait_s - others_wait_s), data_wait_s, others_wait_s))
    return found


def slowest(points: Points) -> int:
    """The rank whose own speed, its median over the run, is the least."""
    return min(_ranks(points), key=lambda rank: median(value for _, value in points[f"worker/{rank}/images_per_s"]))


def draw_ranks(points: Points, path: Path) -> Path | None:
    """Left: images per second that each worker would do alone; right: what its steps consist of. None without workers.

    Of many workers: the least, the median and the greatest, and those that have curves of their own.
    """
    shares_of = step_shares(points)
    if not shares_of:
        return None
    figure = new_figure((9.6, 4.0))
    speed, shares = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_speeds(style(speed, "step", "images per second, each worker alone"), points)
    _draw_shares(style(shares, "milliseconds per step, mean", "rank"), shares_of)
    return save(figure, path)


def _draw_speeds(axes: Axes, points: Points) -> None:
    ranks = _ranks(points)
    named = ranks if len(ranks) <= _MAX_NAMED_RANKS else [slowest(points)]
    for rank in ranks:
        steps, values = finite(points[f"worker/{rank}/images_per_s"])
        if rank in named:
            label = f"rank {rank}" if len(ranks) <= _MAX_NAMED_RANKS else f"rank {rank}, the slowest of {len(ranks)}"
            axes.plot(steps, values, linewidth=1.2, label=label, zorder=3)
        else:
            axes.plot(steps, values, linewidth=0.6, color="0.7")
    for quantile, line in (("max", ":"), ("median", "-"), ("min", ":")):
        if of_all := points.get(f"workers/images_per_s/{quantile}"):
            label = f"{quantile} of all workers"
            axes.plot(*finite(of_all), linewidth=1.2, linestyle=line, color="0.4", label=label)
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower right", fontsize="small")


def _draw_shares(axes: Axes, shares: Sequence[StepShares]) -> None:
    if len(shares) > _MAX_BARS:
        shares = sorted(shares, key=lambda share: -share.busy_s)[:_MAX_BARS]
        axes.set_title(f"the {_MAX_BARS} that were busy longest", fontsize="small")
    rows = range(len(shares))
    left = [0.0] * len(shares)
    for label, color, widths in (
        ("computing", "tab:blue", [share.computing_s for share in shares]),
        ("waiting for images", "tab:orange", [share.data_wait_s for share in shares]),
        ("waiting for the others", "0.85", [share.others_wait_s for share in shares]),
    ):
        widths_ms = [1000 * width for width in widths]
        axes.barh(rows, widths_ms, left=left, color=color, label=label)
        left = [a + b for a, b in zip(left, widths_ms, strict=True)]
    axes.set_yticks(rows, [share.worker for share in shares], fontsize="small")
    axes.set_ylim(max(len(shares), 4) - 0.5, -0.5)  # downwards; a single worker does not fill the plot
    axes.grid(visible=False, axis="y")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, fontsize="x-small", frameon=False)


def _ranks(points: Points) -> list[int]:
    return sorted(int(found[1]) for key in points if (found := re.fullmatch(r"worker/(\d+)/images_per_s", key)))


# The schedules of some recipes side by side.


@dataclass(frozen=True)
class ScheduleCurve:
    title: str
    epochs: Sequence[float]
    rates: Sequence[float]
    """Learning rate at each of `epochs`."""
    sizes: Sequence[int]
    """Side of training images, px, at each of `epochs`; drawn where it changes."""
    note: str = ""


def draw_schedules(curves: Sequence[ScheduleCurve], path: Path) -> Path:
    """One small plot each, three in a row, as one PNG."""
    num_rows = -(-len(curves) // _COLUMNS)
    figure = new_figure((3.1 * min(_COLUMNS, len(curves)), 2.1 * num_rows))
    for number, curve in enumerate(curves, start=1):
        axes = style(figure.add_subplot(num_rows, min(_COLUMNS, len(curves)), number), "epoch", "learning rate")
        axes.set_title(curve.title, fontsize=9)
        axes.plot(curve.epochs, curve.rates, color="tab:blue", linewidth=1.4)
        axes.set_ylim(0, 1.08 * max(curve.rates))
        if len(set(curve.sizes)) > 1:
            right = axes.twinx()
            right.plot(curve.epochs, curve.sizes, color="tab:orange", linewidth=1.2, drawstyle="steps-post")
            right.set_ylabel("image, px", color="tab:orange")
            right.set_ylim(0, 1.08 * max(curve.sizes))
            right.spines["top"].set_visible(False)
        if curve.note:
            axes.text(0.5, 0.5, curve.note, transform=axes.transAxes, ha="center", fontsize=8)
    return save(figure, path)
