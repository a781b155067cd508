"""The report's page: one HTML file that needs nothing else, not even a script, to be read."""

from __future__ import annotations

import math
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from data_prep.shown import joined, one_line
from resnet_dist.config.recipe import Recipe
from resnet_dist.config.space import (
    COORDINATES,
    Annealed,
    Asha,
    Choice,
    Derived,
    Fifo,
    Grid,
    Halving,
    HyperBand,
    LogUniform,
    Median,
    Parameter,
    QUniform,
    Record,
    SchedulerConfig,
    Space,
    Uniform,
    listed_values,
)
from resnet_dist.sweeps.analysis.figures import COLOURS, NUM_NAMED
from resnet_dist.sweeps.analysis.ranking import Ranked, Ranking
from resnet_dist.sweeps.ledger import Began, SweepState, TrialState, ledger_file, saved_epochs, summary, trial_name
from resnet_dist.sweeps.points import Builder, coordinates_of, describe, is_number, shown_value
from resnet_dist.sweeps.scheduler import rung_shares

_SHOWN = 30
"""How many points the table shows at first."""
_NUM_CLASSES = 12
"""How many names of classes are listed."""
_MAX_DECIMALS = 6


class _Cell(NamedTuple):
    text: str
    value: Any = None
    """What the column is sorted by; None: this one is last."""


class _Row(NamedTuple):
    cells: Sequence[_Cell]
    colour: str = ""
    """A name of `COLOURS`."""


def page(
    builder: Builder,
    began: Began,
    state: SweepState,
    ranking: Ranking,
    recipes: Mapping[int, Recipe],
    figures: Mapping[str, str],
    sweep_dir: Path,
    recipe: str | None,
) -> str:
    """
    Args:
        recipes: the trials', by the number of the point.
        figures: SVG, by name.
        recipe: the text of `best_recipe.yaml`, if there is one.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    space = builder.space
    first, _, more = ranking.verdict().partition(". ")
    columns, points = _points(builder, state, ranking, recipes)
    return environment.get_template("page.html").render(
        zip=zip,
        colours=COLOURS,
        figures=figures,
        name=began.name,
        day=time.strftime("%d %B %Y", time.gmtime(state.last_s)).lstrip("0"),
        metric=space.metric,
        verdict=first.removesuffix(".") + ".",
        more=more,
        best=_best(builder, ranking),
        command=f"resnet-dist train {sweep_dir / 'best_recipe.yaml'} \\\n    --on PROFILE",
        recipe=recipe,
        base=space.base,
        proxy=describe(space.proxy),
        columns=columns,
        points=points,
        shown=_SHOWN,
        trial_columns=_TRIAL_COLUMNS,
        trials=[_trial(space, trial) for trial in state.trials.values()],
        failures=[_failure(trial) for trial in state.trials.values() if trial.last_fault or _is_dead(trial)],
        failure_columns=[("trial", "name"), ("epoch", "n"), ("what", ""), ("why", "wide"), ("point", "wide")],
        costs=_costs(state, recipes),
        cost=cost_in_words(state, recipes),
        made=_made(space, began),
        ledger=ledger_file(sweep_dir),
    )


# The points.


def _points(
    builder: Builder, state: SweepState, ranking: Ranking, recipes: Mapping[int, Recipe]
) -> tuple[list[tuple[Any, str]], list[_Row]]:
    """Titles and kinds of the columns; one row for each point, best first."""
    space = builder.space
    epochs: dict[int, float] = defaultdict(float)
    for trial in state.trials.values():
        epochs[trial.number] += trial.spent_epochs
    rows = [row for row in ranking.rows if row.epoch or row.status != "waiting"]
    searched = set(space.free) & {*COORDINATES, *COORDINATES.values()}
    values = [_coordinates(recipes[row.number], builder.num_proxy_samples) | row.point for row in rows]
    # The other pair of coordinates, rate and decay or rate per 256 images and tau, as far as it varies.
    derived = [key for key in (*COORDINATES, *COORDINATES.values()) if searched and key not in space.free]
    derived = [key for key in derived if len(rows) == 1 or len({value[key] for value in values}) > 1]
    columns = {
        "rank": [_Cell(str(rank), rank) for rank in range(1, len(rows) + 1)],
        "point": [_Cell(trial_name(row.number), row.number) for row in rows],
        space.metric: _scores(space, [row.score for row in rows]),
        "± seeds": _scores(space, [row.spread for row in rows]),
        "runs": [_Cell(str(row.num_runs), row.num_runs) for row in rows],
        **{key: _aligned([value.get(key, "") for value in values]) for key in (*space.free, *derived)},
        "epochs": [_Cell(f"{epochs[row.number]:.4g}", epochs[row.number]) for row in rows],
        "status": [_Cell(words, words) for words in statuses(state, rows, recipes)],
    }
    if all(row.spread is None for row in rows):
        del columns["± seeds"]
    named = [row.number for row in rows if math.isfinite(row.score)][:NUM_NAMED]
    colours = [f"best{named.index(row.number)}" if row.number in named else "" for row in rows]
    kinds = {"status": "wide", "point": "name"}
    titles = [
        (
            _breakable(title),
            kinds.get(title, "n" if all(cell.value is None or is_number(cell.value) for cell in cells) else ""),
        )
        for title, cells in columns.items()
    ]
    return titles, [_Row(cells, colour) for *cells, colour in zip(*columns.values(), colours, strict=True)]


def _coordinates(recipe: Recipe, num_samples: int) -> dict[str, Any]:
    return {
        **coordinates_of(recipe, num_samples),
        "optim.lr": recipe.optim.lr,
        "optim.weight_decay": recipe.optim.weight_decay,
    }


def statuses(state: SweepState, rows: Sequence[Ranked], recipes: Mapping[int, Recipe]) -> list[str]:
    """How each point ended, or what it is doing."""
    # The longest schedule so far: a rung starts the next one the moment it decides.
    farthest = max((t.rung if t.kind == "short" else math.inf for t in state.trials.values()), default=0.0)
    return [_status(row, recipes[row.number].train.total_epochs, farthest) for row in rows]


def _status(row: Ranked, total_epochs: int, farthest: float) -> str:
    if row.num_runs:
        diverged = f"; {row.num_diverged} of {row.num_runs} runs diverged" if row.num_diverged else ""
        level = "; cannot be told from the best" if row.in_noise else ""
        return f"reached its end{diverged}{level}"
    match row.status, row.judged_by:
        case "diverged" | "failed", _:
            is_between = row.epoch % 1 == 0 and row.epoch > 0
            return (
                f"{row.status} after epoch {row.epoch:g}"
                if is_between
                else f"{row.status} in epoch {row.epoch // 1 + 1:g}"
            )
        case "stopped", "short" if row.epoch == farthest:
            return f"waits after a schedule of {_epochs(row.epoch)} for the others of its rung"
        case "stopped", "short":
            return f"dropped after a schedule of {_epochs(row.epoch)}"
        case "stopped", "cooldown":
            return f"dropped by its cooldown after epoch {row.epoch:g}"
        case "stopped", _:
            return f"stopped after epoch {row.epoch:g} of {total_epochs}"
        case "waiting", _:
            return f"to be resumed from epoch {row.epoch:g}"
        case "paused", _:
            return f"waits after epoch {row.epoch:g} for the others of its rung"
    return f"running, epoch {row.epoch:g} of {total_epochs}"


def _best(builder: Builder, ranking: Ranking) -> list[tuple[str, str]]:
    """Names and values."""
    best = ranking.best
    if best is None:
        return []
    interval = f" ± {ranking.margin:.2g} (95 % interval)" if ranking.margin else ""
    spread = f"; one run varies by {best.spread:.2g} (standard deviation)" if best.spread is not None else ""
    recipe = builder.full(best.point)
    values = {key: shown_value(value) for key, value in best.point.items()}
    for key, value in _coordinates(recipe, builder.num_base_samples or builder.num_proxy_samples).items():
        if key not in values and {*COORDINATES, *COORDINATES.values()} & set(values):
            values[key] = f"{value:.4g} in the recipe"
    return [
        (f"{ranking.metric} of the proxy", f"{best.score:.4g}{interval}, {best.runs_in_words}{spread}"),
        *values.items(),
    ]


# The trials.

_TRIAL_COLUMNS = [
    *(("trial", "name"), ("what", ""), ("end", ""), ("epochs", "n"), ("minutes", "n"), ("starts lost", "n")),
    *(("scores, by epoch", "wide"), ("last metrics", "wide"), ("point", "wide"), ("MLflow run", "")),
]


def _trial(space: Space, trial: TrialState) -> _Row:
    scores = ", ".join(f"{report.epoch:g}: {space.score(report.metrics):.6g}" for report in trial.reports)
    return _Row(
        [
            _Cell(trial.name),
            _Cell(_kind_in_words(trial)),
            _Cell(trial.status if trial.end else f"not over ({trial.status})"),
            _Cell(f"{trial.spent_epochs:.6g}"),
            _Cell(f"{trial.seconds / 60:.1f}"),
            _Cell(str(trial.num_faults)),
            _Cell(scores),
            _Cell(", ".join(f"{key} {value:.6g}" for key, value in trial.metrics.items())),
            _Cell(describe(trial.point)),
            _Cell(trial.end.run_id if trial.end else ""),
        ]
    )


def _kind_in_words(trial: TrialState) -> str:
    match trial.kind:
        case "short":
            return f"schedule of {_epochs(trial.rung)}"
        case "cooldown":
            return f"cooldown after {_epochs(trial.rung)}"
    return "whole run" + (f", seed + {trial.seed_number}" if trial.seed_number else "")


def _is_dead(trial: TrialState) -> bool:
    return trial.status in ("diverged", "failed")


def _failure(trial: TrialState) -> _Row:
    times = "once" if trial.num_faults == 1 else f"{trial.num_faults} times"
    what = trial.status if _is_dead(trial) else f"died {times}, resumed from its checkpoint"
    why = trial.last_fault or (trial.end.reason if trial.end else "")
    if trial.status == "diverged":
        why = "a loss or a weight is not finite, so the score counts as the worst"
    cells = (trial.name, f"{trial.epoch:g}", what, one_line(why, 2000), describe(trial.point))
    return _Row([_Cell(text) for text in cells])


# The cost.


class _Cost(NamedTuple):
    epochs: str
    what: str
    percent: str
    colour: str


def _costs(state: SweepState, recipes: Mapping[int, Recipe]) -> list[_Cost]:
    """What the epochs were spent on."""
    kinds = {
        "in runs that reached their end": "best0",
        "in runs with further seeds": "score3",
        "in short schedules": "best2",
        "in cooldowns": "best1",
        "in runs that were stopped early": "other",
        "in runs that diverged or failed": "bad",
        "in runs that are not over": "muted",
        "not trained: saved by stopping early": "line",
    }
    spent = dict.fromkeys(kinds, 0.0)
    for trial in state.trials.values():
        match trial:
            case TrialState(kind="short"):
                what = "in short schedules"
            case TrialState(kind="cooldown"):
                what = "in cooldowns"
            case TrialState(status="diverged" | "failed"):
                what = "in runs that diverged or failed"
            case TrialState(status="stopped"):
                what = "in runs that were stopped early"
            case TrialState(status="finished"):
                what = "in runs with further seeds" if trial.seed_number else "in runs that reached their end"
            case _:
                what = "in runs that are not over"
        spent[what] += trial.spent_epochs
    spent["not trained: saved by stopping early"] = saved_epochs(state, _length(recipes))
    total = sum(spent.values())
    return [
        _Cost(f"{epochs:,.4g}" if epochs < 1000 else f"{epochs:,.0f}", what, f"{100 * epochs / total:.2f}", kinds[what])
        for what, epochs in spent.items()
        if epochs > 0
    ]


def cost_in_words(state: SweepState, recipes: Mapping[int, Recipe]) -> list[tuple[str, str]]:
    """Names and values."""
    numbers = summary(state, _length(recipes))
    open_trials = sum(trial.end is None for trial in state.trials.values())
    counts = [f"{numbers[key]:g} {key}" for key in ("finished", "stopped", "diverged", "failed") if numbers[key]]
    counts += [f"{open_trials} not over"] if open_trials else []
    spent, saved = numbers["epochs_spent"], numbers["epochs_saved"]
    of = f"; {saved:,.4g} saved by stopping early, {saved / (spent + saved):.0%} of all" if saved else ""
    starts = "one start" if state.num_drivers == 1 else f"{state.num_drivers} starts"
    return [
        ("Trials", f"{numbers['trials']:g}: {', '.join(counts)}"),
        ("Epochs", f"{spent:,.5g} spent{of}"),
        ("Time", f"{duration(numbers['wall_hours'])}, {duration(numbers['trial_hours'])} of trials, {starts}"),
    ]


def duration(hours: float) -> str:
    return f"{hours:.3g} h" if hours >= 1 else f"{60 * hours:.2g} min"


def _length(recipes: Mapping[int, Recipe]) -> float:
    """Epochs of a whole trial."""
    return float(max((recipe.train.total_epochs for recipe in recipes.values()), default=0))


# How it was made.


def _made(space: Space, began: Began) -> list[tuple[Any, str]]:
    names = ", ".join(began.class_names[:_NUM_CLASSES])
    more = len(began.class_names) - _NUM_CLASSES
    classes = f"; {len(began.class_names)} classes: {names}" + (f" and {more} more" if more > 0 else "")
    seeds = "" if space.seeds == 1 else f", {space.seeds} seeds for each that reaches its end"
    known = f"{len(began.first_points)} points tried first" if began.first_points else ""
    return [
        *((_breakable(key), parameter_in_words(parameter)) for key, parameter in space.space.items()),
        ("Base recipe", space.base),
        ("Proxy", f"{describe(space.proxy) or 'none: trials are whole runs'}"),
        ("Points", f"{_search_in_words(space)}{seeds}"),
        ("Early stopping", scheduler_in_words(space.scheduler)),
        ("Score", f"{space.metric} of the last evaluation"),
        ("Data", f"{began.num_proxy_samples:,} images to train on{classes if names else ''} ({began.data_digest})"),
        *([("Known before", known)] if known else []),
        *(("Budget", f"{key} {value:g}") for key, value in space.budget.model_dump().items() if value is not None),
    ]


def parameter_in_words(parameter: Parameter) -> str:
    match parameter:
        case LogUniform(low=low, high=high):
            words = f"{low:g} to {high:g}, evenly over the logarithm"
        case Uniform(low=low, high=high):
            words = f"{low:g} to {high:g}"
        case QUniform(low=low, high=high, step=step):
            words = f"{low:g} to {high:g} in steps of {step:g}"
        case Derived(of=of, factor=factor, power=power):
            words = f"{factor:g} times {of}" + (f" to the power of {power:g}" if power != 1 else "")
        case Choice() | Grid():
            words = ", ".join(shown_value(value) for value in listed_values(parameter) or ())
    conditions = [
        f"{key} is {' or '.join(map(str, wanted)) if isinstance(wanted, list) else wanted}"
        for key, wanted in parameter.when.items()
    ]
    return words + (f"; only where {' and '.join(conditions)}" if conditions else "")


def _search_in_words(space: Space) -> str:
    num = "all points" if space.trials is None else "1 point" if space.trials == 1 else f"{space.trials} points"
    return (
        num
        + {
            "random": " drawn at random",
            "grid": " of the grid",
            "sobol": " of a Sobol sequence: random, but evenly spread",
            "tpe": ", most proposed by Optuna's TPE from the results before",
            "cma": ", most proposed by CMA-ES from the results before",
        }[space.search.kind]
    )


def scheduler_in_words(scheduler: SchedulerConfig) -> str:
    match scheduler:
        case Fifo():
            return "none: every point is trained to its end"
        case Asha(reduction_factor=factor):
            return (
                f"asha: at {_shares(rung_shares(scheduler))} of its schedule a trial continues if it is among the best "
                f"1/{factor:g} of those that came there before it, by the score it has then"
            )
        case Median(grace=grace):
            return (
                f"median: after {grace:.0%} of its schedule a trial stops if its best score is below the median of "
                "the others' means"
            )
        case HyperBand(reduction_factor=factor):
            return f"hyperband: brackets of trials are judged together, and the best 1/{factor:g} of each continue"
        case Annealed(rungs=shares, cooldown=cooldown, reduction_factor=factor):
            return (
                f"annealed: at {_shares(shares)} of its schedule every trial is forked into a cooldown of "
                f"{cooldown:.0%} of its steps so far, in which the rate goes to zero; the best 1/{factor:g} by the "
                "score after it continue"
            )
        case Halving(rungs=rungs, reduction_factor=factor, carry=carry):
            kept = "tau in epochs" if carry == "tau" else "tau as a share of the schedule"
            return (
                f"halving: whole schedules of {joined(map(str, rungs))} epochs, each from the start; the best "
                f"1/{factor:g} go to the next, longer one, which keeps {kept}"
            )
        case Record(cooldowns=shares, shorts=shorts):
            kinds = [f"cooldowns at {_shares(shares)} of the schedule"] if shares else []
            kinds += [f"short schedules of {joined(map(str, shorts))} epochs"] if shorts else []
            return f"none: every point is trained to its end; {' and '.join(kinds)} are recorded beside it"


# Words and numbers.


def _shares(shares: Iterable[float]) -> str:
    return joined(f"{share:.0%}" for share in shares)


def _epochs(number: float) -> str:
    return "1 epoch" if number == 1 else f"{number:g} epochs"


def _breakable(key: str) -> Markup:
    """A key that may be broken at its dots and underscores."""
    return Markup("<wbr>").join(re.split(r"(?<=[._/])", key))


def _aligned(values: Sequence[Any]) -> list[_Cell]:
    """A column: floats with the same number of decimals, so that they are aligned; three digits of the smallest.

    "": this point does not have the parameter.
    """
    floats = [value for value in values if isinstance(value, float) and math.isfinite(value)]
    if not floats or not all(value == "" or is_number(value) for value in values):
        return [_Cell(shown_value(value), None if value == "" else value) for value in values]
    decimals = max(_decimals(value) for value in floats)
    form = f".{decimals}f" if decimals <= _MAX_DECIMALS else ".2e"
    return [_Cell("") if value == "" else _Cell(f"{value:{form}}", value) for value in values]


def _decimals(value: float) -> int:
    """How many a number needs for three significant digits, or for all it has."""
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return max(len(mantissa.rstrip("0").rstrip(".").partition(".")[2]) - int(exponent), 0)


def _scores(space: Space, scores: Sequence[float | None]) -> list[_Cell]:
    decimals = 4 if space.metric == "val/loss" else 2
    return [
        _Cell("") if score is None or not math.isfinite(score) else _Cell(f"{score:.{decimals}f}", score)
        for score in scores
    ]
