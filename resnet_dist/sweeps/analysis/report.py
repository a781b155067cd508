"""A sweep's report, from the ledger alone, at any time: ranking, figures, one page, and `best_recipe.yaml`."""

from __future__ import annotations

import base64
import csv
import html
import io
import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.beton.files import make_folder, write_text_atomically
from resnet_dist.config.loading import to_yaml
from resnet_dist.config.space import LogUniform, Space
from resnet_dist.errors import UserError
from resnet_dist.sweeps.analysis.figures import (
    best_so_far,
    heat_map,
    importance_bars,
    learning_curves,
    parallel_coordinates,
)
from resnet_dist.sweeps.analysis.ranking import Ranking, rank
from resnet_dist.sweeps.ledger import SweepState, read_ledger, replay, summary
from resnet_dist.sweeps.points import Builder, coordinates_of, describe
from resnet_dist.sweeps.scheduler import rung_shares

_SHOWN = 15
"""How many lines of the ranking the text has."""
_LEAST_POINTS = 8
"""How many points the importance of parameters needs."""


@dataclass(frozen=True)
class Report:
    folder: Path
    text: str
    best_recipe: Path | None


def write_report(sweep_dir: Path) -> Report:
    """Draws everything again. Raises UserError if there is no sweep in `sweep_dir`."""
    state = replay(read_ledger(sweep_dir))
    if state.began is None:
        raise UserError(f"{sweep_dir}: no sweep was started here")
    began = state.began
    space = Space.model_validate(began.space)
    builder = Builder(space, began.base, began.num_proxy_samples, began.num_base_samples)
    ranking = rank(space, state)
    folder = sweep_dir / "report"
    make_folder(folder)
    shares = importance(space, ranking)
    figures = _draw(space, state, ranking, builder, shares, folder)
    text = _text(space, state, ranking, builder, sweep_dir)
    write_text_atomically(folder / "ranking.md", text)
    write_text_atomically(folder / "ranking.csv", _csv(space, ranking))
    write_text_atomically(folder / "index.html", _page(began.name, text, figures))
    recipe = best_recipe_text(builder, state, ranking, sweep_dir)
    if recipe is not None:
        write_text_atomically(sweep_dir / "best_recipe.yaml", recipe)
    return Report(folder, text, sweep_dir / "best_recipe.yaml" if recipe is not None else None)


def _draw(
    space: Space, state: SweepState, ranking: Ranking, builder: Builder, shares: Mapping[str, float], folder: Path
) -> list[Path]:
    recipes = {row.number: builder.proxy(row.point) for row in ranking.rows}
    train = (recipes[ranking.rows[0].number] if ranking.rows else builder.proxy({})).train
    steps_per_epoch = max(builder.num_proxy_samples // train.global_batch_size, 1)
    rungs = [share * train.total_epochs for share in rung_shares(space.scheduler)]
    done = [row for row in ranking.rows if row.num_runs]
    drawn = [
        heat_map(space, ranking.rows, recipes, steps_per_epoch, folder / "heat_map.png"),
        learning_curves(space, state.trials.values(), rungs, folder / "learning_curves.png"),
        parallel_coordinates(space, done, folder / "parallel_coordinates.png"),
        importance_bars(shares, folder / "importance.png"),
        best_so_far(*_progress(space, state), space.metric, folder / "best_so_far.png"),
    ]
    return [path for path in drawn if path is not None]


def _progress(space: Space, state: SweepState) -> tuple[list[float], list[float]]:
    """Epochs spent and best score of a whole run, at each trial's end."""
    spent: list[float] = []
    best: list[float] = []
    total = 0.0
    for trial in sorted((t for t in state.trials.values() if t.end), key=lambda t: t.end.time_s if t.end else 0.0):
        total += trial.epoch
        if trial.status == "finished":
            score = space.score(trial.metrics)
            spent.append(total)
            best.append(score if not best or space.is_better(score, best[-1]) else best[-1])
    return spent, best


def _duration(hours: float) -> str:
    return f"{hours:.3g} h" if hours >= 1 else f"{60 * hours:.2g} min"


def _text(space: Space, state: SweepState, ranking: Ranking, builder: Builder, sweep_dir: Path) -> str:
    """Markdown."""
    length = float(builder.proxy(ranking.rows[0].point).train.total_epochs) if ranking.rows else 0.0
    numbers = summary(state, length)
    open_trials = sum(trial.end is None for trial in state.trials.values())
    lines = [
        f"# {state.began.name if state.began else sweep_dir.name}",
        "",
        ranking.verdict(),
        "",
        f"{numbers['trials']:g} trials: {numbers['finished']:g} finished, {numbers['stopped']:g} stopped early, "
        f"{numbers['diverged']:g} diverged, {numbers['failed']:g} failed, {open_trials} not over.",
        f"{numbers['epochs_spent']:.4g} epochs spent, {numbers['epochs_saved']:.4g} saved by stopping early; "
        f"{_duration(numbers['trial_hours'])} of trials in {_duration(numbers['wall_hours'])}; "
        f"{state.num_drivers} starts.",
        "",
        f"By {space.metric} of the last evaluation.",
        "",
        "| rank | score | runs | spread | ended | point | trials |",
        "|---|---|---|---|---|---|---|",
    ]
    shown = [row for row in ranking.rows if row.status != "waiting" or row.epoch][:_SHOWN]
    for place, row in enumerate(shown, 1):
        spread = "" if row.spread is None else f"{row.spread:.3g}"
        score = "" if row.score != row.score else f"{row.score:.4f}" + (" (inside the noise)" if row.in_noise else "")
        how = {"point": "at", "short": "after a whole schedule to", "cooldown": "cooled down after"}[row.judged_by]
        ended = row.status if row.num_runs else f"{row.status} {how} epoch {row.epoch:g}"
        if row.num_runs and row.num_diverged:
            ended = f"{row.num_diverged} of {row.num_runs} diverged"
        lines.append(
            f"| {place} | {score} | {row.num_runs} | {spread} | {ended} | {describe(row.point)} "
            f"| {' '.join(row.trials)} |"
        )
    if len(ranking.rows) > len(shown):
        lines += ["", f"and {len(ranking.rows) - len(shown)} more in ranking.csv"]
    return "\n".join(lines) + "\n"


def _csv(space: Space, ranking: Ranking) -> str:
    out = io.StringIO()
    writer = csv.writer(out)
    keys = list(space.free)
    writer.writerow(["rank", "number", "status", "epoch", space.metric, "runs", "spread", "in_noise", *keys])
    for place, row in enumerate(ranking.rows, 1):
        values = [row.point.get(key, "") for key in keys]
        spread = "" if row.spread is None else row.spread
        writer.writerow(
            [place, row.number, row.status, row.epoch, row.score, row.num_runs, spread, row.in_noise, *values]
        )
    return out.getvalue()


def _page(name: str, text: str, figures: list[Path]) -> str:
    """One file that can be sent to somebody, with the figures in it."""
    images = "".join(
        f"<h2>{html.escape(path.stem.replace('_', ' '))}</h2>"
        f'<img src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        for path in figures
    )
    style = "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto}img{max-width:100%}pre{overflow-x:auto}"
    return (
        f'<!doctype html><meta charset="utf-8"><title>{html.escape(name)}</title><style>{style}</style>'
        f"<pre>{html.escape(text)}</pre>{images}\n"
    )


def best_recipe_text(builder: Builder, state: SweepState, ranking: Ranking, sweep_dir: Path) -> str | None:
    """The best recipe's YAML with its provenance on top; None while no trial has reached its end.

    (lr_per_256, tau_epochs) are converted to rate and decay for the base recipe's own batch and data.
    """
    best, began = ranking.best, state.began
    if best is None or began is None:
        return None
    space, recipe = builder.space, builder.full(best.point)
    runs = [state.trials[name] for name in best.trials if state.trials[name].status == "finished"]
    spread = f" +- {best.spread:.3g} (standard deviation)" if best.spread is not None else ""
    proxy = ", ".join(f"{key} {value}" for key, value in space.proxy.items())
    coordinates = coordinates_of(recipe, builder.num_base_samples or builder.num_proxy_samples)
    day = time.strftime("%Y-%m-%d", time.gmtime(state.last_s))
    lines = [
        f"Found by the sweep {began.name} ({began.sweep_hash}) on {day}.",
        "",
        f"  resnet-dist train {sweep_dir / 'best_recipe.yaml'} --on PROFILE",
        "",
        f"Base       {space.base}",
        f"Changed    {describe(best.point)}",
        f"Proxy      {proxy or 'none: trials were whole runs'}",
        f"Result     {space.metric} {best.score:.4g}{spread} of the proxy, mean of {best.num_runs} run(s): "
        f"{', '.join(run.name for run in runs)}; not of this whole recipe",
        f"Certainty  {ranking.verdict()}",
        f"Searched   {len(ranking.rows)} points, {space.search.kind}, {space.scheduler.kind}, data {began.data_digest}",
        f"MLflow     {', '.join(run.end.run_id for run in runs if run.end and run.end.run_id)}",
        f"Here       {', '.join(f'{key} {value:.4g}' for key, value in coordinates.items())}",
    ]
    if builder.num_base_samples is None:
        lines.append("Beware     the base recipe's data were not here: rate and decay were computed with the proxy's")
    return "".join(f"# {line}".rstrip() + "\n" for line in lines) + "\n" + to_yaml(recipe)


def importance(space: Space, ranking: Ranking) -> Mapping[str, float]:
    """How much of the differences between points each parameter explains: Optuna's fANOVA (Hutter et al. 2014).

    Shares that sum to 1, largest first, of the keys that every point has and that took more than one value; empty with
    fewer than eight points that reached their end. Diverged trials are left out: the one cliff would explain
    everything.
    """
    rows = [row for row in ranking.rows if row.num_runs]
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
