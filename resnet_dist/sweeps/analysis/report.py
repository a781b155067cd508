"""A sweep's report, from the ledger alone, at any time: ranking, figures, one page, and `best_recipe.yaml`."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from data_prep.beton.files import make_folder, write_text_atomically
from resnet_dist.config.loading import to_yaml
from resnet_dist.config.recipe import Recipe
from resnet_dist.config.space import Space
from resnet_dist.errors import UserError
from resnet_dist.sweeps.analysis.figures import draw
from resnet_dist.sweeps.analysis.page import cost_in_words, page, statuses
from resnet_dist.sweeps.analysis.ranking import Ranking, rank
from resnet_dist.sweeps.ledger import SweepState, read_ledger, replay
from resnet_dist.sweeps.points import Builder, coordinates_of, describe

_SHOWN = 15
"""How many lines of the ranking the text has."""


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
    recipes = {row.number: builder.proxy(row.point) for row in ranking.rows}
    figures = draw(space, state, ranking, recipes, builder.num_proxy_samples, folder)
    text = _text(state, ranking, recipes, began.name)
    recipe = best_recipe_text(builder, state, ranking, sweep_dir)
    write_text_atomically(folder / "ranking.md", text)
    write_text_atomically(folder / "ranking.csv", _csv(space, ranking))
    html = page(builder, began, state, ranking, recipes, figures, sweep_dir, recipe)
    write_text_atomically(folder / "index.html", html)
    if recipe is not None:
        write_text_atomically(sweep_dir / "best_recipe.yaml", recipe)
    return Report(folder, text, sweep_dir / "best_recipe.yaml" if recipe is not None else None)


def _text(state: SweepState, ranking: Ranking, recipes: Mapping[int, Recipe], name: str) -> str:
    """Markdown, for a terminal."""
    lines = [
        *(f"# {name}", "", ranking.verdict(), ""),
        *(f"- {key}: {value}" for key, value in cost_in_words(state, recipes)),
        *(
            "",
            f"| rank | {ranking.metric} | spread | runs | status | point | trials |",
            "|---|---|---|---|---|---|---|",
        ),
    ]
    shown = [row for row in ranking.rows if row.status != "waiting" or row.epoch][:_SHOWN]
    for place, (row, status) in enumerate(zip(shown, statuses(state, shown, recipes), strict=True), 1):
        score = f"{row.score:.4f}" if math.isfinite(row.score) else ""
        spread = "" if row.spread is None else f"{row.spread:.3g}"
        cells = (str(place), score, spread, str(row.num_runs), status, describe(row.point), " ".join(row.trials))
        lines.append(f"| {' | '.join(cells)} |")
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
