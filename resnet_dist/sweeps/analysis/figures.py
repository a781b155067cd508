"""A sweep's figures as PNG files."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnet_dist.config.recipe import Recipe
from resnet_dist.config.space import Space
from resnet_dist.sweeps.analysis.ranking import Ranked
from resnet_dist.sweeps.ledger import TrialState
from resnet_dist.sweeps.points import weight_decay_of
from resnet_dist.tracking.plots import new_figure, save, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TAUS = (0.1, 0.3, 1, 3, 10, 30, 100)
"""Epochs; the contours of a heat map."""


def heat_map(
    space: Space, rows: Sequence[Ranked], recipes: Mapping[int, Recipe], steps_per_epoch: int, path: Path
) -> Path | None:
    """Learning rate x weight decay, both logarithmic, with lines of equal tau; None unless both vary.

    Squares if the points form a grid, else dots. Of points that differ in other keys only, the best is shown. Only
    points that reached their end have a colour of the scale.

    Args:
        recipes: of every point, by its number.
        steps_per_epoch: of a trial.
    """
    sign = 1 if space.higher_is_better else -1
    places: dict[tuple[float, float], Ranked] = {}
    for row in sorted(rows, key=lambda row: (row.status == "finished", sign * row.score)):  # the best last
        optim = recipes[row.number].optim
        places[optim.lr, optim.weight_decay] = row
    rates, decays = (sorted(set(values)) for values in zip(*places, strict=True)) if places else ([], [])
    if len(rates) < 2 or len(decays) < 2 or min(rates[0], decays[0]) <= 0:
        return None
    axes = _axes((7.6, 5.6), "learning rate", "weight decay")
    _logarithmic(axes)
    done = {place: row.score for place, row in places.items() if row.status == "finished"}
    scale = _scale(space, list(done.values()))
    if len(places) == len(rates) * len(decays):
        shown = _squares(axes, done, rates, decays, scale)
    else:
        shown = axes.scatter(*_columns(done), c=list(done.values()), s=130, **scale)
    for status, marker, colour, label in (
        ("diverged", "X", "crimson", "diverged"),
        ("failed", "P", "black", "failed"),
        ("stopped", "v", "0.55", "stopped early"),
    ):
        if some := [place for place, row in places.items() if row.status == status]:
            axes.scatter(*_columns(some), marker=marker, c=colour, s=45, label=label)
    if len(done) <= 64:
        for place, score in done.items():
            axes.annotate(f"{score:.4g}", place, ha="center", va="center", fontsize=7, **_outlined())
    _tau_lines(axes, recipes[rows[0].number].optim.momentum, steps_per_epoch)
    if done:
        worse = "min" if space.higher_is_better else "max"  # beyond the scale all share its last colour
        axes.get_figure(root=True).colorbar(shown, ax=axes, label=space.metric, extend=worse)  # type: ignore[union-attr]
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=8)
    return _saved(axes, path)


def learning_curves(space: Space, trials: Collection[TrialState], rungs: Sequence[float], path: Path) -> Path | None:
    """One line per trial; one that was stopped early ends in a dot. `rungs`: in epochs."""
    if not any(trial.reports for trial in trials):
        return None
    axes = _axes((7.6, 4.4), "epoch", space.metric)
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
    for trial in sorted(trials, key=lambda trial: trial.status == "finished"):
        epochs = [report.epoch for report in trial.reports]
        scores = [space.score(report.metrics) for report in trial.reports]
        colour = {"finished": "tab:blue", "stopped": "0.6"}.get(trial.status, "crimson")
        axes.plot(epochs, scores, color=colour, linewidth=1.0, alpha=0.8)
        if trial.status != "finished" and epochs:
            axes.plot(epochs[-1], scores[-1], "o", color=colour, markersize=4)
    return _saved(axes, path)


def parallel_coordinates(space: Space, rows: Sequence[Ranked], path: Path) -> Path | None:
    """One line through the values of each point that reached its end; better points are darker and in front."""
    keys = [key for key in (rows[0].point if rows else {}) if all(key in row.point for row in rows)]
    if len(rows) < 2 or not keys:
        return None
    axes = _axes((1.8 * (len(keys) + 1) + 2.2, 4.4), "", "")
    scores = [row.score for row in rows]
    columns = [_column([row.point[key] for row in rows]) for key in keys] + [_column(scores)]
    scale = _scale(space, scores)
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    colours = colormaps[scale["cmap"]](Normalize(scale["vmin"], scale["vmax"])(scores))
    for index in sorted(range(len(rows)), key=lambda i: scores[i], reverse=not space.higher_is_better):
        axes.plot(range(len(columns)), [column[0][index] for column in columns], color=colours[index], linewidth=1.4)
    axes.set_xticks(range(len(columns)), [*keys, space.metric])
    axes.set_yticks([])
    for place, (_, labels) in enumerate(columns):
        axes.axvline(place, color="0.3", linewidth=0.8)
        for height, label in labels:
            axes.annotate(label, (place, height), xytext=(4, 0), textcoords="offset points", fontsize=8, va="center")
    return _saved(axes, path)


def importance_bars(shares: Mapping[str, float], path: Path) -> Path | None:
    if not shares:
        return None
    axes = _axes((6.4, 0.6 + 0.5 * len(shares)), "share of the differences explained (fANOVA)", "")
    axes.barh(list(shares)[::-1], list(shares.values())[::-1], color="tab:blue")
    return _saved(axes, path)


def best_so_far(spent: Sequence[float], best: Sequence[float], metric: str, path: Path) -> Path | None:
    """`spent`: epochs of all trials together when each ended."""
    if not spent:
        return None
    axes = _axes((6.4, 3.6), "epochs trained, all trials", f"best {metric} of a single run")
    axes.step(spent, best, where="post", color="tab:blue")
    axes.plot(spent, best, ".", color="tab:blue")
    return _saved(axes, path)


def _squares(
    axes: Axes,
    scores: Mapping[tuple[float, float], float],
    rates: list[float],
    decays: list[float],
    scale: dict[str, Any],
) -> Any:
    import numpy as np

    values = np.full((len(decays), len(rates)), np.nan)
    for (rate, decay), score in scores.items():
        values[decays.index(decay), rates.index(rate)] = score
    return axes.pcolormesh(_edges(rates), _edges(decays), values, **scale)


def _columns(places: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    places = list(places)
    return [rate for rate, _ in places], [decay for _, decay in places]


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


def _scale(space: Space, scores: Sequence[float]) -> dict[str, Any]:
    """The worst quarter shares the last colour: what matters is how the good ones differ."""
    if not scores:
        return {}
    ordered = sorted(scores, reverse=space.higher_is_better)
    best, middle = ordered[0], ordered[(len(ordered) - 1) * 3 // 4]
    if best == middle:
        middle = ordered[-1] if ordered[-1] != best else best - 1
    cmap = "viridis" if space.higher_is_better else "viridis_r"
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
