"""A sweep's figures. Each is drawn once, for a PNG file and for the page, whose CSS decides the colours there."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import quantiles
from typing import TYPE_CHECKING, Any

from data_prep.shown import shown
from resnet_dist.config.recipe import Recipe
from resnet_dist.config.space import COORDINATES, LogUniform, Space, listed_values
from resnet_dist.sweeps.analysis.ranking import Ranked, Ranking
from resnet_dist.sweeps.ledger import SweepState, TrialReported, TrialState, trial_name
from resnet_dist.sweeps.points import is_number, weight_decay_of
from resnet_dist.sweeps.scheduler import rung_shares
from resnet_dist.tracking.plots import new_figure, save, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LEAST_POINTS = 8
"""How many points the importance of parameters needs."""
NUM_NAMED = 5
"""How many of the best points have a colour of their own."""
_NUM_STEPS = 7
_DASHES, _DOTS = (0, (5, 2)), (0, (1, 1.5))
_TAUS = (0.1, 0.3, 1, 3, 10, 30, 100)
"""Epochs; the contours of a map of rate and decay."""
_WIDTH = 5.4
"""Inches. Narrow, so that the text can be read where the page is as wide as a phone."""


def _blend(first: str, last: str, share: float) -> str:
    ends = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in (first, last)]
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(*ends, strict=True))


COLOURS: Mapping[str, tuple[str, str]] = {
    "surface": ("#ffffff", "#15181c"),
    "ink": ("#1c2126", "#e4e8ec"),
    "muted": ("#656e78", "#99a2ac"),
    "line": ("#dde2e7", "#30363d"),
    "other": ("#b7bfc8", "#505963"),
    "bad": ("#b3261e", "#f28b82"),
    "best0": ("#0b5fc2", "#6db1ff"),
    "best1": ("#c05a00", "#f2a65a"),
    "best2": ("#1d8457", "#57c794"),
    "best3": ("#8446b3", "#c59af2"),
    "best4": ("#96760a", "#d9bb4a"),
    **{
        f"score{step}": (
            _blend("#e6edf6", "#0a4da0", step / (_NUM_STEPS - 1)),
            _blend("#232c38", "#84c0ff", step / (_NUM_STEPS - 1)),
        )
        for step in range(_NUM_STEPS)
    },
}
"""By name: on a light page, which is what PNG files have, and on a dark one. The light ones differ from each other."""


def _light(name: str) -> str:
    return COLOURS[name][0]


def draw(
    space: Space, state: SweepState, ranking: Ranking, recipes: Mapping[int, Recipe], num_samples: int, folder: Path
) -> dict[str, str]:
    """Writes one PNG file for each figure that the sweep has data for; returns them as SVG, by name.

    Args:
        recipes: the trials', by the number of the point.
        num_samples: images of the trials' training set.
    """
    from matplotlib import rc_context

    measure = _measure(space, ranking.rows)
    shares = importance(space, ranking.rows, measure)
    train = recipes[ranking.rows[0].number].train if ranking.rows else None
    rungs = [share * train.total_epochs for share in rung_shares(space.scheduler)] if train else []
    settings: dict[Any, Any] = {"font.size": 9.5, "text.parse_math": False, "svg.fonttype": "none"}
    for key in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color"):
        settings[key] = _light("ink")
    drawn = {}
    with rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # of a name; the page shows it
        for name, figure in {
            "score_map": score_map(space, ranking.rows, measure, shares, recipes, num_samples),
            "learning_curves": learning_curves(space, state.trials.values(), rungs, ranking.rows),
            "by_parameter": by_parameter(space, ranking.rows, measure, shares),
            "best_so_far": best_so_far(space, state),
        }.items():
            if figure is not None:
                save(figure, folder / f"{name}.png")
                drawn[name] = _svg(figure, name)
    return drawn


@dataclass(frozen=True)
class _Measure:
    """What points are compared by."""

    label: str
    values: Mapping[int, float]
    """By the number of the point, best first."""
    higher_is_better: bool
    worst: float | None = None
    """A value that says no more than that the training broke down."""


def _measure(space: Space, rows: Sequence[Ranked]) -> _Measure:
    """The score, if most points reached their end. Else the place in the ranking: scores of points that came to
    different rungs cannot be compared.
    """
    judged = [row for row in rows if math.isfinite(row.score)]
    done = {row.number: row.score for row in judged if row.num_runs}
    if 2 * len(done) >= len(judged):
        return _Measure(space.metric, done, space.higher_is_better, space.worst_score)
    return _Measure("place in the ranking", {row.number: float(rank) for rank, row in enumerate(judged, 1)}, False)


def _svg(figure: Figure, name: str) -> str:
    """The figure as an element of a page that defines `--ink` and all other names of `COLOURS`.

    Args:
        name: differs from that of every other figure of the page.
    """
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context({"svg.hashsalt": name}):  # ids are unique on the page, and the same every time
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = out.getvalue()
    text = re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])
    text = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1>", text, count=1)
    names = {light: name for name, (light, _) in COLOURS.items()}
    text = re.sub("|".join(names), lambda found: f"var(--{names[found[0]]})", text)
    return text.replace("xlink:href", "href")


def score_map(
    space: Space,
    rows: Sequence[Ranked],
    measure: _Measure,
    shares: Mapping[str, float],
    recipes: Mapping[int, Recipe],
    num_samples: int,
) -> Figure | None:
    """The points over rate and decay, if both are searched, or else over the two parameters that explain most; None
    unless both vary.

    Squares if the points form a grid, else dots. Of points that differ in other parameters only, the best is shown.
    The best ones have their rank. Over rate and decay there are lines of equal tau.

    Args:
        rows: best first.
    """
    keys = [key for key in space.free if key in (*COORDINATES, *COORDINATES.values())]
    if len(keys) != 2:
        keys = sorted(space.free, key=lambda key: -shares.get(key, 0.0))[:2]
    ranked = [pair for pair in enumerate(rows) if all(key in pair[1].point for key in keys)]
    ranked = [(rank, row) for rank, row in ranked if row.num_runs or row.epoch]
    if len(keys) < 2 or not ranked:
        return None
    across, up = (_scale(space, key, [row.point[key] for _, row in ranked]) for key in keys)
    places: dict[tuple[float, float], tuple[int, Ranked]] = {}
    for rank, row in ranked:
        places.setdefault((across.at(row.point[keys[0]]), up.at(row.point[keys[1]])), (rank, row))
    lefts, bottoms = (sorted(set(values)) for values in zip(*places, strict=True))
    if len(lefts) < 2 or len(bottoms) < 2:
        return None
    figure = new_figure((_WIDTH, 4.3))
    axes = _axes(figure.add_subplot(), keys[0], keys[1])
    across.apply(axes.xaxis)
    up.apply(axes.yaxis)
    values = {place: measure.values[row.number] for place, (_, row) in places.items() if row.number in measure.values}
    colours = _colours(measure, list(values.values()))
    is_grid = len(places) == len(lefts) * len(bottoms)
    if is_grid:
        _squares(axes, values, lefts, bottoms, colours)
    else:
        edge = {**colours, "edgecolors": _light("muted"), "linewidths": 0.4}
        for marker, size, is_done in (
            ("v", 34 if len(values) <= 64 else 12, False),
            ("o", 70 if len(values) <= 64 else 24, True),
        ):
            some = [p for p in reversed(values) if bool(places[p][1].num_runs) == is_done]  # the best on top
            _dots(axes, some, marker=marker, s=size, c=[values[p] for p in some], **edge)
    for label, statuses, marker, colour in (
        ("diverged", ("diverged",), "x", "bad"),
        ("failed", ("failed",), "P", "bad"),
        ("dropped early", ("stopped",), "v", "other"),
        ("not over", ("running", "paused", "waiting"), ".", "muted"),
    ):
        some = [p for p, (_, row) in places.items() if row.status in statuses and not row.num_runs]
        if some:  # what is on the scale has been drawn
            blank = [p for p in some if p not in values]
            _dots(axes, blank, marker=marker, s=24, c=_light(colour), label=label)
    for place, (rank, _) in places.items():
        if rank < NUM_NAMED and place in values and not is_grid:
            offset: dict[str, Any] = {"xytext": (6, 4), "textcoords": "offset points", "weight": "bold"}
            axes.annotate(str(rank + 1), place, color=_light(f"best{rank}"), fontsize=10, **offset)
    if keys == ["optim.lr", "optim.weight_decay"] and across.is_log and up.is_log:
        recipe = recipes[rows[0].number]
        _tau_lines(axes, recipe.optim.momentum, max(num_samples // recipe.train.global_batch_size, 1))
    if values:
        from matplotlib.ticker import MaxNLocator

        drawn = next(drawn for drawn in axes.collections if drawn.get_array() is not None)
        extend = "min" if measure.higher_is_better else "max"  # beyond the scale all share its last colour
        bar = figure.colorbar(drawn, ax=axes, label=measure.label, aspect=30, extend=extend)
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0)
        bar.ax.yaxis.set_major_locator(MaxNLocator(7, integer=measure.worst is None))
        if not measure.higher_is_better:
            bar.ax.invert_yaxis()
    _legend(figure)
    return figure


def learning_curves(
    space: Space, trials: Collection[TrialState], rungs: Sequence[float], rows: Sequence[Ranked]
) -> Figure | None:
    """One line per trial: those of the best points in colour, all others grey. None without an evaluation.

    Args:
        rungs: in epochs.
        rows: best first.
    """
    if not any(trial.reports for trial in trials):
        return None
    named = [row.number for row in rows if math.isfinite(row.score)][:NUM_NAMED]
    figure = new_figure((_WIDTH, 4.3))
    axes = _axes(figure.add_subplot(), "epoch", space.metric)
    for rung in rungs:
        axes.axvline(rung, color=_light("muted"), linestyle=_DOTS, linewidth=1)
    forks: dict[tuple[int, float], TrialReported] = {
        (trial.number, report.epoch): report for trial in trials if trial.is_first_run for report in trial.reports
    }
    seen: list[float] = []
    for trial in sorted(trials, key=lambda trial: trial.number in named):
        reports = trial.reports
        is_named, is_dead = trial.number in named, trial.status in ("diverged", "failed")
        seen += [space.score(report.metrics) for report in (reports if is_named else reports[1:] or reports)]
        if trial.kind == "cooldown" and (trial.number, trial.rung) in forks:
            reports = [forks[trial.number, trial.rung], *reports]
        if not reports:
            continue
        epochs, scores = [report.epoch for report in reports], [space.score(report.metrics) for report in reports]
        colour = _light(f"best{named.index(trial.number)}" if is_named else "bad" if is_dead else "other")
        width = 0.8 if not is_named else 1.6 if trial.is_first_run else 1.0
        line = {"point": "-", "short": _DASHES, "cooldown": _DOTS}[trial.kind]
        axes.plot(epochs, scores, linestyle=line, color=colour, linewidth=width)
        marker = "x" if is_dead else "o" if trial.status == "stopped" or trial.kind == "cooldown" else ""
        if marker or len(epochs) == 1:
            axes.plot(epochs[-1], scores[-1], marker or ".", color=colour, markersize=4)
    _limit(axes, seen, space.higher_is_better, space.worst_score)
    _legend(figure, _curve_legend(trials, named, bool(rungs)))
    return figure


def _curve_legend(trials: Collection[TrialState], named: Sequence[int], has_rungs: bool) -> list[Any]:
    from matplotlib.lines import Line2D

    def line(label: str, colour: str, **more: Any) -> Line2D:
        return Line2D([], [], color=_light(colour), label=label, **{"linewidth": 1, "markersize": 4, **more})

    kinds, statuses = {trial.kind for trial in trials}, {trial.status for trial in trials if trial.reports}
    entries = [
        *(
            (True, line(f"{rank + 1}  {trial_name(number)}", f"best{rank}", linewidth=1.6))
            for rank, number in enumerate(named)
        ),
        (any(trial.number not in named for trial in trials), line("other points", "other")),
        ("short" in kinds, line("short schedule", "muted", linestyle=_DASHES)),
        ("cooldown" in kinds, line("cooldown", "muted", linestyle=_DOTS, marker="o")),
        ("stopped" in statuses, line("stopped", "other", linestyle="", marker="o")),
        (bool(statuses & {"diverged", "failed"}), line("diverged or failed", "bad", marker="x")),
        (has_rungs, line("rung", "muted", linestyle=_DOTS)),
    ]
    return [entry for is_there, entry in entries if is_there]


def by_parameter(space: Space, rows: Sequence[Ranked], measure: _Measure, shares: Mapping[str, float]) -> Figure | None:
    """The points over each parameter that varies, the one that explains most first; None if none does.

    Args:
        rows: best first.
    """
    rows = [row for row in reversed(rows) if row.number in measure.values]  # the best on top
    keys = [key for key in space.free if len({repr(row.point[key]) for row in rows if key in row.point}) > 1]
    if not keys:
        return None
    keys.sort(key=lambda key: -shares.get(key, 0.0))
    num_rows = math.ceil(len(keys) / 2)
    figure = new_figure((_WIDTH, 3.3 if len(keys) == 1 else 0.3 + 2.2 * num_rows))
    grid = figure.subplots(num_rows, min(len(keys), 2), sharey=True, squeeze=False).flatten()
    for number, (axes, key) in enumerate(zip(grid, keys, strict=False)):
        some = [row for row in rows if key in row.point]
        scale = _scale(space, key, [row.point[key] for row in some], max_ticks=4 if len(keys) > 1 else 7)
        _axes(axes, key, measure.label if number % 2 == 0 else "")
        scale.apply(axes.xaxis)
        places = [(scale.at(row.point[key]), measure.values[row.number]) for row in some]
        _dots(axes, places, c=_light("other"), s=16 if len(places) <= 64 else 6)
        if some[-1] is rows[-1]:
            _dots(axes, places[-1:], c=_light("best0"), s=40, zorder=3)
        if key in shares:
            axes.set_title(f"explains {shares[key]:.0%}", fontsize=9, color=_light("muted"), loc="left")
    for axes in grid[len(keys) :]:
        axes.set_visible(False)
    _limit(grid[0], list(measure.values.values()), measure.higher_is_better, measure.worst)
    if measure.worst is None:
        grid[0].invert_yaxis()
    return figure


def best_so_far(space: Space, state: SweepState) -> Figure | None:
    """The best score of a single whole run, and each of them, over the epochs that all trials had trained by then; None
    with fewer than two.
    """
    spent, scores, total = [], [], 0.0
    for trial in sorted((t for t in state.trials.values() if t.end), key=lambda t: t.end.time_s if t.end else 0.0):
        total += trial.spent_epochs
        if trial.status == "finished" and trial.kind == "point":
            spent.append(total)
            scores.append(space.score(trial.metrics))
    if len(spent) < 2:
        return None
    best = scores[:1]
    for score in scores[1:]:
        best.append(score if space.is_better(score, best[-1]) else best[-1])
    figure = new_figure((_WIDTH, 3.3))
    axes = _axes(figure.add_subplot(), "epochs trained, all trials", space.metric)
    axes.scatter(spent, scores, s=12, c=_light("other"), label="a whole run", zorder=2)
    axes.step([*spent, total], [*best, best[-1]], where="post", color=_light("best0"), label="the best so far")
    axes.set_xlim(left=0)
    _limit(axes, scores, space.higher_is_better, space.worst_score)
    _legend(figure)
    return figure


def importance(space: Space, rows: Sequence[Ranked], measure: _Measure) -> Mapping[str, float]:
    """How much of the differences between points each parameter explains: Optuna's fANOVA (Hutter et al. 2014).

    Shares that sum to 1, largest first, of the keys that every point has and that took more than one value; empty with
    fewer than eight points. Diverged points are left out: that one cliff would explain everything.
    """
    rows = [row for row in rows if row.number in measure.values]
    keys = [key for key in space.free if all(key in row.point for row in rows)]
    keys = [key for key in keys if len({repr(row.point[key]) for row in rows}) > 1]
    if len(rows) < _LEAST_POINTS or len(keys) < 2:
        return {}
    import optuna  # takes a second

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    columns, ranges = {}, dict[str, Any]()
    for key in keys:
        values = [row.point[key] for row in rows]
        columns[key] = list(map(float, map(_scale(space, key, values).at, values)))
        ranges[key] = optuna.distributions.FloatDistribution(min(columns[key]), max(columns[key]))
    study = optuna.create_study()
    for index, row in enumerate(rows):
        params = {key: column[index] for key, column in columns.items()}
        value = measure.values[row.number]
        study.add_trial(optuna.trial.create_trial(params=params, distributions=ranges, value=value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = optuna.importance.get_param_importances(
            study, evaluator=optuna.importance.FanovaImportanceEvaluator(n_trees=32, max_depth=12, seed=0)
        )
    return found if all(math.isfinite(share) for share in found.values()) else {}


# What the figures share.


@dataclass(frozen=True)
class _Scale:
    """Where a parameter's values are on an axis: numbers at their value or its logarithm, all else side by side."""

    at: Callable[[Any], float]
    ticks: Sequence[tuple[float, str]]
    is_log: bool = False

    def apply(self, axis: Any) -> None:
        axis.set_ticks([place for place, _ in self.ticks], [label for _, label in self.ticks])
        if sum(len(label) for _, label in self.ticks) > 28 and axis.axis_name == "x":
            axis.set_tick_params(rotation=30)


def _scale(space: Space, key: str, values: Sequence[Any], max_ticks: int = 8) -> _Scale:
    from matplotlib.ticker import LogLocator, MaxNLocator

    listed = listed_values(space.space[key])
    are_numbers = all(map(is_number, values))
    positive = [value for value in values if are_numbers and value > 0]
    is_wide = bool(positive) and max(positive) > 10 * min(positive)
    if not values or not are_numbers or (is_wide and len(positive) < len(values)):  # 0 has no logarithm
        labels = {repr(value): _shortened(str(value)) for value in values}
        names = [name for name in map(repr, listed or ()) if name in labels]  # in the order of the space
        names += sorted(set(labels) - set(names))
        return _Scale(lambda value: names.index(repr(value)), [(i, labels[name]) for i, name in enumerate(names)])
    low, high = min(values), max(values)
    is_log = low > 0 and (is_wide or isinstance(space.space[key], LogUniform))
    ticks = sorted(set(values))
    if listed is None or len(ticks) > max_ticks:
        subs = (1, 2, 5) if high < 100 * low else (1, 3) if high < 1000 * low else (1,)
        for locator in (LogLocator(subs=subs) if is_log else MaxNLocator(max_ticks - 1), MaxNLocator(max_ticks - 1)):
            ticks = [tick for tick in locator.tick_values(low, high) if low <= tick <= high]
            if len(ticks) > 1:
                break
    position: Callable[[Any], float] = math.log10 if is_log else float
    step = math.ceil(len(ticks) / max_ticks) or 1
    return _Scale(position, [(position(tick), f"{tick:.4g}") for tick in ticks[::step]], is_log)


def _shortened(text: str, most: int = 16) -> str:
    text = shown(text)
    return text if len(text) <= most else text[: most - 1] + "…"


def _squares(
    axes: Axes,
    values: Mapping[tuple[float, float], float],
    lefts: list[float],
    bottoms: list[float],
    colours: dict[str, Any],
) -> None:
    import numpy as np

    filled = np.full((len(bottoms), len(lefts)), np.nan)
    for (left, bottom), value in values.items():
        filled[bottoms.index(bottom), lefts.index(left)] = value
    axes.grid(visible=False)
    across, up = _edges(lefts), _edges(bottoms)
    squares = axes.pcolormesh(across, up, filled, edgecolors=_light("surface"), linewidth=1.5, **colours)
    for (left, bottom), value in values.items() if len(values) <= 64 else ():
        middles = [(low + high) / 2 for edges in (across, up) for low, high in pairwise(edges)]
        place = middles[lefts.index(left)], middles[len(lefts) + bottoms.index(bottom)]
        text = "surface" if sum(squares.to_rgba(np.array(value))[:3]) < 1.6 else "ink"
        axes.annotate(f"{value:.4g}", place, ha="center", va="center", fontsize=8, color=_light(text))


def _edges(values: list[float]) -> list[float]:
    """The middles between the values, and as much beyond the ends."""
    middles = [(low + high) / 2 for low, high in pairwise(values)]
    return [2 * values[0] - middles[0], *middles, 2 * values[-1] - middles[-1]]


def _dots(axes: Axes, places: Sequence[tuple[float, float]], **more: Any) -> None:
    axes.scatter([left for left, _ in places], [bottom for _, bottom in places], **more)


def _tau_lines(axes: Axes, momentum: float, steps_per_epoch: int) -> None:
    """On axes that are the logarithms of rate and decay."""
    (left, right), (bottom, top) = limits = axes.get_xlim(), axes.get_ylim()
    for tau in _TAUS:
        decay = weight_decay_of(tau, lr=10**left, momentum=momentum, steps_per_epoch=steps_per_epoch)
        at_left, at_right = math.log10(decay), math.log10(decay) - (right - left)
        axes.plot([left, right], [at_left, at_right], color=_light("muted"), linestyle="--", linewidth=0.7)
        # The label is outside, where the line leaves the picture: at the top or on the right.
        note: dict[str, Any] = {
            "textcoords": "offset points",
            "fontsize": 8,
            "color": _light("muted"),
            "annotation_clip": False,
        }
        if left < left + at_left - top < right:
            axes.annotate(f"τ {tau:g}", (left + at_left - top, top), xytext=(0, 2), ha="center", **note)
        elif bottom < at_right < top:
            axes.annotate(f"τ {tau:g}", (right, at_right), xytext=(3, 0), va="center", **note)
    axes.set_xlim(limits[0])
    axes.set_ylim(limits[1])


def _colours(measure: _Measure, values: Sequence[float]) -> dict[str, Any]:
    """The worst quarter shares the last colour: what matters is how the good ones differ."""
    from matplotlib.colors import ListedColormap

    if not values:
        return {}
    ordered = sorted(values, reverse=measure.higher_is_better)
    best, middle = ordered[0], ordered[(len(ordered) - 1) * 3 // 4]
    if best == middle:
        middle = ordered[-1] if ordered[-1] != best else best - (1 if measure.higher_is_better else -1)
    steps = [_light(f"score{step}") for step in range(_NUM_STEPS)]
    cmap = ListedColormap(steps if measure.higher_is_better else steps[::-1])
    return {"cmap": cmap, "vmin": min(best, middle), "vmax": max(best, middle)}


def _limit(axes: Axes, scores: Sequence[float], higher_is_better: bool, worst: float | None) -> None:
    """Ends the axis where the worst scores would press all others together: three quartile ranges beyond the middle."""
    scores = [score for score in scores if score != worst] or list(scores)
    if len(scores) < 4 or min(scores) == max(scores):
        return
    first, middle, third = quantiles(scores, n=4)
    low, high = min(scores), max(scores)
    if higher_is_better:
        low = max(low, middle - 3 * (third - first))
    else:
        high = min(high, middle + 3 * (third - first))
    axes.set_ylim(low - 0.04 * (high - low), high + 0.04 * (high - low))


def _axes(axes: Axes, xlabel: str, ylabel: str) -> Axes:
    style(axes, _shortened(xlabel, 40), _shortened(ylabel, 40))
    axes.grid(visible=True, color=_light("line"), alpha=1, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_facecolor("none")
    axes.spines[["left", "bottom"]].set_color(_light("other"))
    axes.tick_params(length=0, which="both")
    return axes


def _legend(figure: Figure, handles: Sequence[Any] | None = None) -> None:
    """Below the axes, where it covers nothing."""
    if handles is None:
        handles = figure.axes[0].get_legend_handles_labels()[0]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
