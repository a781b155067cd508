"""A sweep's figures as PNG files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnet_dist.config.space import Metric, higher_is_better
from resnet_dist.sweeps.points import weight_decay_of
from resnet_dist.tracking.plots import new_figure, save, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TAUS = (0.1, 0.3, 1, 3, 10, 30, 100)
"""Epochs; the contours of a heat map."""


@dataclass(frozen=True)
class Dot:
    """One point of a sweep, as drawn."""

    lr: float
    weight_decay: float
    score: float
    """NaN if there is none."""
    status: str
    epoch: float


@dataclass(frozen=True)
class LearningCurve:
    epochs: Sequence[float]
    scores: Sequence[float]
    status: str


def heat_map(dots: Sequence[Dot], metric: Metric, *, momentum: float, steps_per_epoch: int, path: Path) -> Path | None:
    """Learning rate x weight decay, both logarithmic, with lines of equal tau; None unless both vary.

    Squares if the points form a grid, else dots. Of points that differ in other keys only, the best is shown. Only
    points that reached their end have a colour of the scale.
    """
    dots = _best_of_each_place(dots, metric)
    rates, decays = sorted({dot.lr for dot in dots}), sorted({dot.weight_decay for dot in dots})
    if len(rates) < 2 or len(decays) < 2 or min(rates[0], decays[0]) <= 0:
        return None
    axes = _axes((7.6, 5.6), "learning rate", "weight decay")
    _logarithmic(axes)
    done = [dot for dot in dots if dot.status == "finished"]
    scale = _scale([dot.score for dot in done], metric)
    if len(dots) == len(rates) * len(decays):
        shown = _squares(axes, done, rates, decays, scale)
    else:
        shown = axes.scatter(
            [d.lr for d in done], [d.weight_decay for d in done], c=[d.score for d in done], s=130, **scale
        )
    for status, marker, colour, label in (
        ("diverged", "X", "crimson", "diverged"),
        ("failed", "P", "black", "failed"),
        ("stopped", "v", "0.55", "stopped early"),
    ):
        some = [dot for dot in dots if dot.status == status]
        if some:
            axes.scatter(
                [d.lr for d in some], [d.weight_decay for d in some], marker=marker, c=colour, s=45, label=label
            )
    for dot in done if len(done) <= 64 else []:
        axes.annotate(
            f"{dot.score:.4g}", (dot.lr, dot.weight_decay), ha="center", va="center", fontsize=7, **_outlined()
        )
    _tau_lines(axes, momentum, steps_per_epoch)
    if done:
        worse = "min" if higher_is_better(metric) else "max"  # beyond the scale all share its last colour
        axes.get_figure(root=True).colorbar(shown, ax=axes, label=metric, extend=worse)  # type: ignore[union-attr]
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=8)
    return _saved(axes, path)


def learning_curves(curves: Sequence[LearningCurve], metric: Metric, rungs: Sequence[float], path: Path) -> Path | None:
    """One line per trial; one that was stopped early ends in a dot. `rungs`: in epochs."""
    if not any(curve.epochs for curve in curves):
        return None
    axes = _axes((7.6, 4.4), "epoch", metric)
    for rung in rungs:
        axes.axvline(rung, color="0.6", linestyle=":", linewidth=1.2)
        axes.annotate(
            "rung",
            (rung, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(3, -3),
            textcoords="offset points",
            fontsize=7,
            color="0.4",
            va="top",
        )
    for curve in sorted(curves, key=lambda curve: curve.status == "finished"):
        colour = {"finished": "tab:blue", "stopped": "0.6"}.get(curve.status, "crimson")
        axes.plot(curve.epochs, curve.scores, color=colour, linewidth=1.0, alpha=0.8)
        if curve.status != "finished" and curve.epochs:
            axes.plot(curve.epochs[-1], curve.scores[-1], "o", color=colour, markersize=4)
    return _saved(axes, path)


def parallel_coordinates(
    points: Sequence[Mapping[str, Any]], scores: Sequence[float], metric: Metric, path: Path
) -> Path | None:
    """One line through the values of each point that reached its end; better points are darker and in front."""
    keys = [key for key in (points[0] if points else {}) if all(key in point for point in points)]
    if len(points) < 2 or not keys:
        return None
    axes = _axes((1.8 * (len(keys) + 1) + 2.2, 4.4), "", "")
    columns = [_column([point[key] for point in points]) for key in keys] + [_column(list(scores))]
    scale = _scale(scores, metric)
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    colours = colormaps[scale["cmap"]](Normalize(scale["vmin"], scale["vmax"])(list(scores)))
    order = sorted(range(len(points)), key=lambda i: scores[i], reverse=not higher_is_better(metric))
    for index in order:
        axes.plot(range(len(columns)), [column[0][index] for column in columns], color=colours[index], linewidth=1.4)
    axes.set_xticks(range(len(columns)), [*keys, metric])
    axes.set_yticks([])
    for place, (_, labels) in enumerate(columns):
        axes.axvline(place, color="0.3", linewidth=0.8)
        for height, label in labels:
            axes.annotate(label, (place, height), xytext=(4, 0), textcoords="offset points", fontsize=8, va="center")
    return _saved(axes, path)


def bars(shares: Mapping[str, float], label: str, path: Path) -> Path | None:
    if not shares:
        return None
    axes = _axes((6.4, 0.6 + 0.5 * len(shares)), label, "")
    axes.barh(list(shares)[::-1], list(shares.values())[::-1], color="tab:blue")
    return _saved(axes, path)


def best_so_far(spent: Sequence[float], best: Sequence[float], metric: Metric, path: Path) -> Path | None:
    """`spent`: epochs of all trials together when each ended."""
    if not spent:
        return None
    axes = _axes((6.4, 3.6), "epochs trained, all trials", f"best {metric} of a single run")
    axes.step(spent, best, where="post", color="tab:blue")
    axes.plot(spent, best, ".", color="tab:blue")
    return _saved(axes, path)


def _best_of_each_place(dots: Sequence[Dot], metric: Metric) -> list[Dot]:
    sign = 1 if higher_is_better(metric) else -1
    best: dict[tuple[float, float], Dot] = {}
    for dot in sorted(dots, key=lambda dot: (dot.status == "finished", sign * dot.score)):
        best[dot.lr, dot.weight_decay] = dot
    return list(best.values())


def _squares(axes: Axes, done: Sequence[Dot], rates: list[float], decays: list[float], scale: dict[str, Any]) -> Any:
    import numpy as np

    values = np.full((len(decays), len(rates)), np.nan)
    for dot in done:
        values[decays.index(dot.weight_decay), rates.index(dot.lr)] = dot.score
    return axes.pcolormesh(_edges(rates), _edges(decays), values, **scale)


def _edges(values: list[float]) -> list[float]:
    """Geometric middles between the values, and as much beyond the ends."""
    middles = [math.sqrt(low * high) for low, high in pairwise(values)]
    return [values[0] ** 2 / middles[0], *middles, values[-1] ** 2 / middles[-1]]


def _tau_lines(axes: Axes, momentum: float, steps_per_epoch: int) -> None:
    limits = axes.get_xlim(), axes.get_ylim()
    rates = [limits[0][0], limits[0][1]]
    for tau in _TAUS:
        decays = [weight_decay_of(tau, lr=lr, momentum=momentum, steps_per_epoch=steps_per_epoch) for lr in rates]
        axes.plot(rates, decays, color="0.25", linestyle="--", linewidth=0.8)
        # The label is where the line leaves the picture, on the left or at the top.
        top = decays[0] * rates[0] / limits[1][1]
        place = (rates[0], decays[0]) if limits[1][0] < decays[0] < limits[1][1] else (top, limits[1][1])
        if limits[0][0] <= place[0] < limits[0][1] and decays[0] > limits[1][0]:
            axes.annotate(
                f"τ {tau:g} epochs", place, xytext=(3, -9), textcoords="offset points", fontsize=7, **_outlined()
            )
    axes.set_xlim(limits[0])
    axes.set_ylim(limits[1])


def _column(values: list[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    """Heights 0..1 of the values, and labels at heights; numbers that span a factor of ten are logarithmic."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        low, high = min(values), max(values)
        log = low > 0 and high / low > 10
        ends = (math.log(low), math.log(high)) if log else (low, high)
        width = (ends[1] - ends[0]) or 1.0
        heights = [((math.log(value) if log else value) - ends[0]) / width for value in values]
        return heights, [(0.0, f"{low:.3g}"), (1.0, f"{high:.3g}")] if high > low else [(0.0, f"{low:.3g}")]
    names = sorted({str(value) for value in values})
    places = {name: index / max(len(names) - 1, 1) for index, name in enumerate(names)}
    return [places[str(value)] for value in values], [(place, name) for name, place in places.items()]


def _scale(scores: Sequence[float], metric: Metric) -> dict[str, Any]:
    """The worst quarter shares the last colour: what matters is how the good ones differ."""
    if not scores:
        return {}
    ordered = sorted(scores, reverse=higher_is_better(metric))
    best, middle = ordered[0], ordered[(len(ordered) - 1) * 3 // 4]
    if best == middle:
        middle = ordered[-1] if ordered[-1] != best else best - 1
    cmap = "viridis" if higher_is_better(metric) else "viridis_r"
    return {"cmap": cmap, "vmin": min(best, middle), "vmax": max(best, middle)}


def _axes(size_inches: tuple[float, float], xlabel: str, ylabel: str) -> Axes:
    return style(new_figure(size_inches).add_subplot(), xlabel, ylabel)


def _logarithmic(axes: Axes) -> None:
    """Both axes, labelled at 1, 2 and 5 of every decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def _outlined() -> dict[str, Any]:
    """Black text that can be read on any colour."""
    from matplotlib.patheffects import withStroke

    return {"path_effects": [withStroke(linewidth=2.5, foreground="white")], "zorder": 10}


def _saved(axes: Axes, path: Path) -> Path:
    figure = axes.get_figure(root=True)
    assert figure is not None
    return save(figure, path)
