"""Training and validation error of runs, read from run folders or MLflow, and drawn as the paper draws them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from resnet_dist.config.loading import read_model_name
from resnet_dist.errors import UserError
from resnet_dist.tracking.experiment import find_run, list_runs, metric_history
from resnet_dist.tracking.mlflow_run import recorded_run
from resnet_dist.tracking.plots import error_limit, new_figure, save, style
from resnet_dist.tracking.spool import History, read_history

Series = list[tuple[int, float]]
TRAIN, VAL = "train/top1_error", "val/top1_error"


@dataclass(frozen=True)
class ErrorCurves:
    """One run: errors in percent over optimizer steps."""

    label: str
    net: str
    train: Series
    val: Series

    @property
    def is_plain(self) -> bool:
        return self.net.startswith("plain")

    @property
    def depth(self) -> int | None:
        """Layers, as the net's name says; None for nets without a number."""
        digits = re.search(r"\d+$", self.net)
        return int(digits.group()) if digits else None


def curve_of(history: History, label: str, net: str) -> ErrorCurves:
    """Training points are averaged between evaluations: a single one is a mean over few images."""
    val = [point for point in history.points.get(VAL, []) if math.isfinite(point[1])]
    train = [point for point in history.points.get(TRAIN, []) if math.isfinite(point[1])]
    return ErrorCurves(label, net, averaged(train, [step for step, _ in val]), val)


def averaged(points: Series, ends: Sequence[int]) -> Series:
    """The mean of the points in each interval (ends[k-1], ends[k]], at the interval's end; points after the last end
    stay.

    Points have equal weights: each covers the same number of steps, except the last of an epoch.
    """
    means: Series = []
    start = 0
    for end in ends:
        inside = [value for step, value in points if start < step <= end]
        if inside:
            means.append((end, sum(inside) / len(inside)))
        start = end
    return means + [(step, value) for step, value in points if step > start]


def read_curves(runs: Sequence[str], tracking_uri: str | None) -> list[ErrorCurves]:
    """The error curves of runs. Each is given as a run's folder, or as an MLflow run's name or id.

    Raises UserError for a run that does not exist or has no curves, Fault if the server does not respond.
    """
    curves = [
        _from_folder(Path(run)) if (Path(run) / "mlflow_run.json").is_file() else _from_mlflow(run, tracking_uri)
        for run in runs
    ]
    for run, curve in zip(runs, curves, strict=True):
        if not curve.train and not curve.val:
            raise UserError(f"{run}: has no training curves yet")
    return curves


def _from_folder(folder: Path) -> ErrorCurves:
    handle = recorded_run(folder, "")
    if handle is None:
        raise UserError(f"{folder}: has no MLflow run yet")
    recipe = folder / "recipe.yaml"
    net = read_model_name(recipe) if recipe.is_file() else folder.name
    return curve_of(read_history(folder, handle.run_id), folder.resolve().name, net)


def _from_mlflow(run: str, tracking_uri: str | None) -> ErrorCurves:
    if tracking_uri is None:
        raise UserError(f"{run}: is not the folder of a run; give --tracking-uri to look it up in MLflow")
    row = find_run(list_runs(tracking_uri), run)
    history = History({key: metric_history(tracking_uri, row.run_id, key) for key in (TRAIN, VAL)})
    return curve_of(history, row.name, row.params.get("model.name", row.name))


# ---- figures ---------------------------------------------------------------------------------------------------------
# Colours show depths, as in figure 6 of He et al. 2015.

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOUR_OF_DEPTH = {8: "tab:gray", 20: "#c8a900", 32: "tab:cyan", 44: "tab:green", 56: "tab:red", 110: "black"}
_OTHER_COLOURS = ("tab:blue", "tab:orange", "tab:purple", "tab:brown", "tab:pink", "tab:olive")


def draw_errors(curves: Sequence[ErrorCurves], path: Path, *, max_error: float | None = None) -> Path:
    """Error (%) over steps, training thin and validation bold; plain nets beside residual ones, if there are both.

    Args:
        max_error: where the y-axis ends; None: at twice the largest last error, at most 100.
    """
    plain = [curve for curve in curves if curve.is_plain]
    others = [curve for curve in curves if not curve.is_plain]
    groups = [(title, group) for title, group in (("plain", plain), ("ResNet", others)) if group]
    figure, row = _panels(len(groups))
    colours = _colours(curves)
    for axes, (title, group) in zip(row, groups, strict=True):
        for curve in group:
            colour = colours[curve.label]
            axes.plot(*_columns(curve.train), color=colour, linewidth=0.8)
            axes.plot(*_columns(curve.val), color=colour, linewidth=2.2, label=curve.label)
        if len(groups) > 1:
            axes.set_title(title)
        axes.legend(
            loc="upper right",
            frameon=False,
            fontsize="small",
            title="thin: training, bold: validation",
            title_fontsize=8,
        )
    ends = [[value for _, value in points] for curve in curves for points in (curve.train, curve.val)]
    row[0].set_ylim(0, max_error or error_limit(ends))
    return save(figure, path)


def draw_depths(curves: Sequence[ErrorCurves], path: Path) -> Path:
    """Training error on the left, validation error on the right: figure 1 of He et al. 2015."""
    figure, (left, right) = _panels(2)
    colours = _colours(curves)
    for curve in curves:
        left.plot(*_columns(curve.train), color=colours[curve.label], linewidth=1.6, label=curve.label)
        right.plot(*_columns(curve.val), color=colours[curve.label], linewidth=1.6, label=curve.label)
    left.set_title("training")
    right.set_title("validation")
    right.legend(loc="upper right", frameon=False, fontsize="small")
    left.set_ylim(0, 100)
    return save(figure, path)


def draw_lines(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    path: Path,
    *,
    x_label: str,
    y_label: str,
    logarithmic: bool = False,
    marker: str | None = "o",
) -> Path:
    """Named lines of (x, y)."""
    figure = new_figure()
    axes = style(figure.add_subplot(), x_label, y_label)
    for name, points in lines.items():
        axes.plot(*_columns(points), marker=marker, markersize=3, linewidth=1.2, label=name)
    if logarithmic:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize="small")
    return save(figure, path)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """Plots of errors over steps side by side, on the same axes."""
    figure = new_figure((1.2 + 4.6 * count, 4.2))
    row: list[Axes] = list(figure.subplots(1, count, sharex=True, sharey=True, squeeze=False)[0])
    for axes in row:
        style(axes, "step", "error (%)" if axes is row[0] else "")
    return figure, row


def _colours(curves: Sequence[ErrorCurves]) -> dict[str, str]:
    """One colour per curve: its depth's, unless another curve of its kind has that."""
    others = cycle(_OTHER_COLOURS)
    taken: set[tuple[bool, str]] = set()
    colours: dict[str, str] = {}
    for curve in curves:
        own = _COLOUR_OF_DEPTH.get(curve.depth or 0)
        colour = own if own and (curve.is_plain, own) not in taken else next(others)
        taken.add((curve.is_plain, colour))
        colours[curve.label] = colour
    return colours


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
