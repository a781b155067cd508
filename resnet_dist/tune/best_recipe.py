"""`best_recipe.yaml`: the base recipe with the best point's values, and where they come from. Pure."""

from __future__ import annotations

import time
from pathlib import Path

from resnet_dist.config.loading import to_yaml
from resnet_dist.tune.ranking import Ranking
from resnet_dist.tune.recipes import Builder, coordinates_of, describe
from resnet_dist.tune.state import SweepState


def best_recipe_text(builder: Builder, state: SweepState, ranking: Ranking, sweep_dir: Path) -> str | None:
    """A recipe's file with its provenance on top; None while no trial has reached its end.

    Values of (lr_per_256, tau_epochs) are turned into rate and decay for the base recipe's own batch and data.
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
        lines.append(
            "Beware     the base recipe's data were not at hand: rate and decay were reckoned with the proxy's"
        )
    return "".join(f"# {line}".rstrip() + "\n" for line in lines) + "\n" + to_yaml(recipe)
