"""A sweep's figures. Each is drawn once, for a PNG file and for the page, whose CSS decides the colours there."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import quantiles
from typing import TYPE_CHECKING, Any

from data_prep.shown import shown
from resnet_dist.config.recipe import Recipe
from resnet_dist.config.space import COORDINATES, LogUniform, Space, listed_values
from resnet_dist.sweeps.analysis.ranking import Ranked, Ranking
from resnet_dist.sweeps.ledger import SweepState, TrialState
from resnet_dist.sweeps.points import weight_decay_of
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

    done = [row for row in ranking.rows if row.num_runs]
    shares = importance(space, done)
    train = recipes[ranking.rows[0].number].train if ranking.rows else None
    epochs = train.total_epochs if train else 0
    steps_per_epoch = max(num_samples // train.global_batch_size, 1) if train else 1
    settings: dict[Any, Any] = {"font.size": 9.5, "text.parse_math": False, "svg.fonttype": "none"}
    for key in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color"):
        settings[key] = _light("ink")
    drawn = {}
    with rc_context(settings):
        for name, figure in {
            "score_map": score_map(space, ranking.rows, _two_keys(space, shares), recipes, steps_per_epoch),
            "learning_curves": learning_curves(
                space,
                state.trials.values(),
                [share * epochs for share in rung_shares(space.scheduler)],
                [row for row in ranking.rows if math.isfinite(row.score)][:NUM_NAMED],
            ),
            "by_parameter": by_parameter(space, done, shares),
            "best_so_far": best_so_far(space, state),
        }.items():
            if figure is not None:
                save(figure, folder / f"{name}.png")
                drawn[name] = _svg(figure, name)
    return drawn


def _two_keys(space: Space, shares: Mapping[str, float]) -> tuple[str, str] | None:
    """The parameters of the map: rate and decay if both are searched, else the two that explain most."""
    keys = [key for key in space.free if key in (*COORDINATES, *COORDINATES.values())]
    if len(keys) != 2:
        keys = sorted(space.free, key=lambda key: -shares.get(key, 0.0))[:2]
    return (keys[0], keys[1]) if len(keys) == 2 else None


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
    text = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 role="img">', text, count=1)
    names = {light: name for name, (light, _) in COLOURS.items()}
    text = re.sub("|".join(names), lambda found: f"var(--{names[found[0]]})", text)
    return text.replace("xlink:href", "href")


def score_map(
    space: Space,
    rows: Sequence[Ranked],
    keys: tuple[str, str] | None,
    recipes: Mapping[int, Recipe],
    steps_per_epoch: int,
) -> Figure | None:
    """The score over two parameters; None unless both vary.

    Squares if the points form a grid, else dots. Of points that differ in other parameters only, the best is shown.
    Only points that reached their end have a colour of the scale; the best ones have their rank. Over rate and decay
    there are lines of equal tau.

    Args:
        rows: best first.
        recipes: of every point, by its number.
        steps_per_epoch: of a trial.
    """
    if keys is None:
        return None
    rows = [row for row in rows if all(key in row.point for key in keys) and (row.num_runs or row.epoch)]
    places: dict[tuple[float, float], tuple[int, Ranked]] = {}
    across, up = (_scale(space, key, [row.point[key] for row in rows]) for key in keys)
    for rank, row in enumerate(rows, 1):
        places.setdefault((across.at(row.point[keys[0]]), up.at(row.point[keys[1]])), (rank, row))
    lefts, bottoms = ([*dict.fromkeys(sorted(values))] for values in zip(*places, strict=True)) if places else ([], [])
    if len(lefts) < 2 or len(bottoms) < 2:
        return None
    figure = _figure(4.3)
    axes = _axes(figure.add_subplot(), keys[0], keys[1])
    across.apply(axes.xaxis)
    up.apply(axes.yaxis)
    done = {place: row.score for place, (_, row) in places.items() if row.num_runs}
    colours = _colours(space, list(done.values()))
    is_grid = len(places) == len(lefts) * len(bottoms)
    if is_grid:
        _squares(axes, done, lefts, bottoms, colours)
    elif done:
        size = 70 if len(done) <= 64 else 30
        backwards = list(done)[::-1]  # the best on top
        axes.scatter(
            *_columns(backwards),
            c=[done[p] for p in backwards],
            s=size,
            **colours,
            edgecolors=_light("muted"),
            linewidths=0.4,
        )
    for label, statuses, marker, colour in (
        ("diverged", ("diverged",), "x", "bad"),
        ("failed", ("failed",), "P", "bad"),
        ("stopped early", ("stopped",), "v", "other"),
        ("not over", ("running", "paused", "waiting"), ".", "muted"),
    ):
        if some := [p for p, (_, row) in places.items() if row.status in statuses and p not in done]:
            axes.scatter(*_columns(some), marker=marker, c=_light(colour), s=24, label=label)
    for place, (rank, row) in places.items():
        if is_grid and place in done and len(done) <= 64:
            text = _light("surface") if _step(done[place], colours) > _NUM_STEPS // 2 else _light("ink")
            axes.annotate(f"{row.score:.4g}", place, ha="center", va="center", fontsize=8, color=text)
        elif place in done and rank <= NUM_NAMED:
            axes.annotate(
                str(rank),
                place,
                xytext=(6, 4),
                textcoords="offset points",
                fontsize=10,
                weight="bold",
                color=_light(f"best{rank - 1}"),
            )
    if keys == ("optim.lr", "optim.weight_decay") and across.is_log and up.is_log:
        _tau_lines(axes, recipes[rows[0].number].optim.momentum, steps_per_epoch)
    if done:
        bar = figure.colorbar(
            _mappable(colours),
            ax=axes,
            label=space.metric,
            aspect=30,
            extend="min" if space.higher_is_better else "max",  # beyond the scale all share its last colour
        )
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0)
    _legend(figure)
    return figure


def learning_curves(
    space: Space, trials: Collection[TrialState], rungs: Sequence[float], named: Sequence[Ranked]
) -> Figure | None:
    """One line per trial: the best points in colour, all others grey. None without an evaluation.

    Args:
        rungs: in epochs.
        named: the best points, best first.
    """
    if not any(trial.reports for trial in trials):
        return None
    figure = _figure(4.3)
    axes = _axes(figure.add_subplot(), "epoch", space.metric)
    for rung in rungs:
        axes.axvline(rung, color=_light("muted"), linestyle=(0, (1, 3)), linewidth=1)
    ranks = {row.number: rank for rank, row in enumerate(named)}
    trunks = {trial.number: trial for trial in trials if trial.is_first_run}
    drawn: list[tuple[int | None, list[float]]] = []
    for trial in sorted(trials, key=lambda trial: -ranks.get(trial.number, len(ranks))):
        epochs = [report.epoch for report in trial.reports]
        scores = [space.score(report.metrics) for report in trial.reports]
        rank = ranks.get(trial.number)
        drawn.append((rank, scores))
        if trial.kind == "cooldown" and trial.number in trunks:  # it begins where it left its trunk
            fork = [report for report in trunks[trial.number].reports if report.epoch <= trial.rung][-1:]
            epochs = [report.epoch for report in fork] + epochs
            scores = [space.score(report.metrics) for report in fork] + scores
        if not epochs:
            continue
        colour = _light("other") if rank is None else _light(f"best{rank}")
        if rank is None and trial.status in ("diverged", "failed"):
            colour = _light("bad")
        axes.plot(
            epochs,
            scores,
            color=colour,
            linewidth=0.8 if rank is None else 1.6 if trial.is_first_run else 1.0,
            linestyle={"point": "-", "short": (0, (5, 2)), "cooldown": (0, (1, 1))}[trial.kind],
            label=f"{rank + 1}  {trial.name}" if rank is not None and _is_main(trial, trunks) else None,
            zorder=2 if rank is None else 3,
        )
        marker = _end_marker(trial)
        if marker or len(epochs) == 1:
            axes.plot(epochs[-1], scores[-1], marker or ".", color=colour, markersize=4, zorder=3)
    _limit(axes, space, [score for rank, s in drawn for score in (s if rank is not None else s[1:] or s)])
    best = sorted(axes.get_legend_handles_labels()[0], key=lambda line: str(line.get_label()))
    _legend(figure, best + _curve_keys(trials, ranks, bool(rungs)))
    return figure


def by_parameter(space: Space, rows: Sequence[Ranked], shares: Mapping[str, float]) -> Figure | None:
    """The score of the points that reached their end over each parameter that varies; None if none does.

    Args:
        shares: how much of the differences each parameter explains; it is in the title.
    """
    rows = [row for row in rows if row.num_runs][::-1]  # the best on top
    keys = [key for key in space.free if len({repr(row.point[key]) for row in rows if key in row.point}) > 1]
    if not keys:
        return None
    keys.sort(key=lambda key: -shares.get(key, 0.0))
    num_rows = math.ceil(len(keys) / 2)
    figure = _figure(3.3 if len(keys) == 1 else 0.3 + 2.2 * num_rows)
    grid = figure.subplots(num_rows, min(len(keys), 2), sharey=True, squeeze=False).flatten()
    for axes in grid[len(keys) :]:
        axes.set_visible(False)
    for number, (axes, key) in enumerate(zip(grid, keys, strict=False)):
        has = [row for row in rows if key in row.point]
        scale = _scale(space, key, [row.point[key] for row in has], max_ticks=4 if len(keys) > 1 else 7)
        _axes(axes, key, space.metric if number % 2 == 0 else "")
        scale.apply(axes.xaxis)
        axes.scatter(
            [scale.at(row.point[key]) for row in has],
            [row.score for row in has],
            c=[_light("best0" if row is rows[-1] else "other") for row in has],
            s=[40 if row is rows[-1] else 16 for row in has],
            zorder=3,
        )
        if key in shares:
            axes.set_title(f"explains {shares[key]:.0%}", fontsize=9, color=_light("muted"), loc="left")
    _limit(grid[0], space, [row.score for row in rows])
    return figure


def best_so_far(space: Space, state: SweepState) -> Figure | None:
    """The best score of a single whole run, and each of them, over the epochs that all trials had trained by then."""
    spent, scores, total = [], [], 0.0
    for trial in sorted((t for t in state.trials.values() if t.end), key=lambda t: t.end.time_s if t.end else 0.0):
        total += trial.spent_epochs
        if trial.status == "finished" and trial.kind == "point":
            spent.append(total)
            scores.append(space.score(trial.metrics))
    if not spent:
        return None
    best = scores[:1]
    for score in scores[1:]:
        best.append(score if space.is_better(score, best[-1]) else best[-1])
    figure = _figure(3.3)
    axes = _axes(figure.add_subplot(), "epochs trained, all trials", space.metric)
    axes.scatter(spent, scores, s=12, c=_light("other"), label="a whole run", zorder=2)
    axes.step([*spent, total], [*best, best[-1]], where="post", color=_light("best0"), label="the best so far")
    axes.set_xlim(left=0)
    _limit(axes, space, scores)
    _legend(figure)
    return figure


def importance(space: Space, rows: Sequence[Ranked]) -> Mapping[str, float]:
    """How much of the differences between points each parameter explains: Optuna's fANOVA (Hutter et al. 2014).

    Shares that sum to 1, largest first, of the keys that every point has and that took more than one value; empty with
    fewer than eight points. Diverged trials are left out: the one cliff would explain
    everything.
    """
    keys = [key for key in space.free if all(key in row.point for row in rows)]
    keys = [key for key in keys if len({repr(row.point[key]) for row in rows}) > 1]
    if len(rows) < _LEAST_POINTS or len(keys) < 2:
        return {}
    import optuna  # takes a second

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions = {key: _distribution(space, key, [row.point[key] for row in rows]) for key in keys}
    study = optuna.create_study(direction="maximize" if space.higher_is_better else "minimize")
    values = {key: distributions[key][1] for key in keys}
    for number, row in enumerate(rows):
        study.add_trial(
            optuna.trial.create_trial(
                params={key: values[key][number] for key in keys},
                distributions={key: distributions[key][0] for key in keys},
                value=row.score,
            )
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = optuna.importance.get_param_importances(
            study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0)
        )
    return found if all(math.isfinite(share) for share in found.values()) else {}


def _distribution(space: Space, key: str, values: list[Any]) -> tuple[Any, list[Any]]:
    """A parameter's distribution and values for Optuna: numbers by their range here, all else by its index."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        low, high = float(min(values)), float(max(values))
        log = low > 0 and (isinstance(space.space[key], LogUniform) or high / low > 10)
        return FloatDistribution(low, high, log=log), [float(value) for value in values]
    names = [repr(value) for value in values]
    return CategoricalDistribution(sorted(set(names))), names


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
    are_numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    positive = [value for value in values if are_numbers and value > 0]
    is_wide = bool(positive) and max(positive) > 10 * min(positive)
    if not values or not are_numbers or (is_wide and len(positive) < len(values)):  # 0 has no logarithm
        names = [repr(value) for value in listed or () if value in values] or sorted(set(map(repr, values)))
        labels = {repr(value): _shortened(str(value)) for value in values}
        return _Scale(lambda value: names.index(repr(value)), [(i, labels[name]) for i, name in enumerate(names)])
    low, high = min(values), max(values)
    is_log = low > 0 and (is_wide or isinstance(space.space[key], LogUniform))
    position: Callable[[Any], float] = math.log10 if is_log else float
    if len(set(values)) <= max_ticks:
        ticks = sorted(set(values))
    elif is_log:
        subs = (1, 2, 5) if high / low < 100 else (1, 3) if high / low < 1000 else (1,)
        ticks = [tick for tick in LogLocator(subs=subs).tick_values(low, high) if low <= tick <= high]
    else:
        ticks = [tick for tick in MaxNLocator(max_ticks - 1).tick_values(low, high) if low <= tick <= high]
    step = math.ceil(len(ticks) / max_ticks) or 1
    return _Scale(position, [(position(tick), f"{tick:g}") for tick in ticks[::step]], is_log)


def _shortened(text: str, most: int = 16) -> str:
    text = shown(text)
    return text if len(text) <= most else text[: most - 1] + "…"


def _squares(
    axes: Axes,
    scores: Mapping[tuple[float, float], float],
    lefts: list[float],
    bottoms: list[float],
    colours: dict[str, Any],
) -> None:
    import numpy as np

    values = np.full((len(bottoms), len(lefts)), np.nan)
    for (left, bottom), score in scores.items():
        values[bottoms.index(bottom), lefts.index(left)] = score
    axes.grid(visible=False)
    axes.pcolormesh(_edges(lefts), _edges(bottoms), values, edgecolors=_light("surface"), linewidth=1.5, **colours)


def _edges(values: list[float]) -> list[float]:
    """The middles between the values, and as much beyond the ends."""
    middles = [(low + high) / 2 for low, high in pairwise(values)]
    return [2 * values[0] - middles[0], *middles, 2 * values[-1] - middles[-1]]


def _columns(places: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    places = list(places)
    return [left for left, _ in places], [bottom for _, bottom in places]


def _tau_lines(axes: Axes, momentum: float, steps_per_epoch: int) -> None:
    """On axes that are the logarithms of rate and decay."""
    (left, right), (bottom, top) = limits = axes.get_xlim(), axes.get_ylim()
    for tau in _TAUS:
        decay = weight_decay_of(tau, lr=10**left, momentum=momentum, steps_per_epoch=steps_per_epoch)
        at_left = math.log10(decay)
        axes.plot(
            [left, right], [at_left, at_left - (right - left)], color=_light("muted"), linestyle="--", linewidth=0.8
        )
        # The label is where the line leaves the picture, on the left or at the top.
        place = (left, at_left) if at_left < top else (left + at_left - top, top)
        if left <= place[0] < right and at_left > bottom:
            axes.annotate(
                f"τ {tau:g}", place, xytext=(3, -10), textcoords="offset points", fontsize=8, color=_light("muted")
            )
    axes.set_xlim(limits[0])
    axes.set_ylim(limits[1])


def _colours(space: Space, scores: Sequence[float]) -> dict[str, Any]:
    """The worst quarter shares the last colour: what matters is how the good ones differ."""
    from matplotlib.colors import ListedColormap

    if not scores:
        return {}
    ordered = sorted(scores, reverse=space.higher_is_better)
    best, middle = ordered[0], ordered[(len(ordered) - 1) * 3 // 4]
    if best == middle:
        middle = ordered[-1] if ordered[-1] != best else best - (1 if space.higher_is_better else -1)
    steps = [_light(f"score{step}") for step in range(_NUM_STEPS)]
    cmap = ListedColormap(steps if space.higher_is_better else steps[::-1])
    return {"cmap": cmap, "vmin": min(best, middle), "vmax": max(best, middle)}


def _step(score: float, colours: dict[str, Any]) -> int:
    """Which of the steps of the scale a score has, the best being the last."""
    share = (score - colours["vmin"]) / (colours["vmax"] - colours["vmin"])
    index = min(max(int(share * _NUM_STEPS), 0), _NUM_STEPS - 1)
    return index if colours["cmap"].colors[-1] == _light(f"score{_NUM_STEPS - 1}") else _NUM_STEPS - 1 - index


def _mappable(colours: dict[str, Any]) -> Any:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(colours["vmin"], colours["vmax"]), colours["cmap"])


def _limit(axes: Axes, space: Space, scores: Sequence[float]) -> None:
    """Ends the axis where the worst scores would press all others together: three quartile ranges beyond the middle."""
    scores = [score for score in scores if score != space.worst_score] or list(scores)
    if len(scores) < 4:
        return
    low, middle, high = quantiles(scores, n=4)
    reach = 3 * (high - low)
    pad = 0.04 * (min(max(scores), middle + reach) - max(min(scores), middle - reach))
    if space.higher_is_better and min(scores) < middle - reach:
        axes.set_ylim(middle - reach, max(scores) + pad)
    elif not space.higher_is_better and max(scores) > middle + reach:
        axes.set_ylim(min(scores) - pad, middle + reach)
    elif max(scores) > min(scores):
        axes.set_ylim(min(scores) - pad, max(scores) + pad)


def _is_main(trial: TrialState, trunks: Mapping[int, TrialState]) -> bool:
    """Whether the trial is the one that the legend names: its point's first run, or else its short schedules."""
    return trial.is_first_run if trial.number in trunks else trial.kind == "short"


def _end_marker(trial: TrialState) -> str:
    if trial.status in ("diverged", "failed"):
        return "x"
    return "o" if trial.status == "stopped" or trial.kind == "cooldown" else ""


def _curve_keys(trials: Collection[TrialState], ranks: Mapping[int, int], has_rungs: bool) -> list[Any]:
    """What the legend says about lines that no single point has."""
    from matplotlib.lines import Line2D

    def line(label: str, colour: str, **more: Any) -> Line2D:
        return Line2D([], [], color=_light(colour), label=label, **{"linewidth": 1, "markersize": 4, **more})

    kinds, statuses = {trial.kind for trial in trials}, {trial.status for trial in trials if trial.reports}
    keys = []
    if {trial.number for trial in trials} - set(ranks):
        keys.append(line("other points", "other"))
    if "short" in kinds:
        keys.append(line("short schedule", "muted", linestyle=(0, (5, 2))))
    if "cooldown" in kinds:
        keys.append(line("cooldown", "muted", linestyle=(0, (1, 1)), marker="o"))
    if "stopped" in statuses:
        keys.append(line("stopped", "other", marker="o", linestyle=""))
    if statuses & {"diverged", "failed"}:
        keys.append(line("diverged or failed", "bad", marker="x"))
    if has_rungs:
        keys.append(line("rung", "muted", linestyle=(0, (1, 3))))
    return keys


def _figure(height: float) -> Figure:
    return new_figure((_WIDTH, height))


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
