"""`tune --dry-run`: the trials, what they may cost, and where they would run. Nothing is started."""

from __future__ import annotations

from collections.abc import Sequence

from data_prep.redaction import redacted
from data_prep.shown import joined
from resnet_dist.config.loading import tree_to_yaml
from resnet_dist.config.space import Annealed, Asha, Halving, HyperBand, Median, Record, Space
from resnet_dist.launch.preflight import nodes_to_come
from resnet_dist.sweeps.analysis.page import duration
from resnet_dist.sweeps.forecast import (
    PointCost,
    Speed,
    contenders,
    epochs_to_come,
    measured_speed,
    seconds_left,
)
from resnet_dist.sweeps.ledger import SweepState, ledger_file, read_ledger, replay, spent_epochs
from resnet_dist.sweeps.points import coordinates_of, describe, shown_value
from resnet_dist.sweeps.prepare import PreparedSweep, require_trial_fits, trials_at_once
from resnet_dist.sweeps.scheduler import judged_epoch

_SHOWN = 100


def describe_sweep(prepared: PreparedSweep) -> str:
    state = replay(read_ledger(prepared.sweep_dir)) if ledger_file(prepared.sweep_dir).exists() else SweepState()
    space = tree_to_yaml(prepared.space.model_dump(mode="json", exclude_defaults=True))
    rows = _rows(prepared, state)
    warnings = "".join(f"warning: {warning}\n" for warning in prepared.warnings)
    return redacted(f"# space\n{space}\n# trials\n{_trials(prepared, state)}\n# sweep\n{rows}{warnings}")


def _trials(prepared: PreparedSweep, state: SweepState) -> str:
    if prepared.planned is None:
        return f"{prepared.space.trials} points, proposed one after the other by {prepared.space.search.kind}\n"
    lines = []
    for number, point in enumerate(prepared.planned[:_SHOWN]):
        recipe = prepared.builder.proxy(point)
        coordinates = coordinates_of(recipe, prepared.builder.num_proxy_samples)
        known = state.trials.get(f"t{number:04d}")
        lines.append(
            f"t{number:04d}  {describe(point)}  (lr {recipe.optim.lr:.4g}, "
            f"weight decay {recipe.optim.weight_decay:.4g}, tau {coordinates['tau_epochs']:.3g} epochs)"
            + (f"  {known.status}" if known else "")
        )
    if len(prepared.planned) > _SHOWN:
        lines.append(f"and {len(prepared.planned) - _SHOWN} more")
    return "\n".join(lines) + "\n"


def _rows(prepared: PreparedSweep, state: SweepState) -> str:
    space, samples = prepared.space, prepared.builder.num_proxy_samples
    num_points = len(prepared.planned) if prepared.planned is not None else (space.trials or 0)
    costs = prepared.costs(state, num_points)
    first = costs[0]
    most = sum(cost.length for cost in costs.values()) * space.seeds
    coming = epochs_to_come(space, state, costs)
    expected = spent_epochs(state) + sum(map(sum, coming))
    at_once = _at_once(prepared)
    rows = {
        "name": prepared.name,
        "folder": prepared.sweep_dir,
        "trials": f"{num_points} points, {space.seeds} run(s) of each that reaches its end"
        + (
            f" (trials is {space.trials}: the space has no more distinct points)"
            if num_points < (space.trials or 0)
            else ""
        ),
        "length of a trial": f"{first.length:g} epochs of {samples:,} images",
        **_rungs(space, num_points, first),
        "cost": _cost(space, expected, most, samples),
        **_race(space),
        "budget": ", ".join(f"{k} {v:g}" for k, v in space.budget.model_dump().items() if v is not None) or "no limit",
        "already spent": f"{spent_epochs(state):g} epochs",
        **_warm_start(prepared),
        "a trial gets": _trial_gets(prepared),
        "at once": "as many as the cluster holds" if at_once is None else f"{at_once} trials",
        "time": _time(prepared, state, coming, at_once),
        "MLflow": f"experiment {prepared.profile.experiment} at {prepared.profile.tracking_uri}",
    }
    width = max(map(len, rows))
    return "".join(f"{key:<{width}}  {value}\n" for key, value in rows.items())


def _trial_gets(prepared: PreparedSweep) -> str:
    resources, profile = prepared.space.resources, prepared.trial_profile
    if resources.path == "light":
        return f"{resources.cpus} CPUs, {resources.gpus:g} GPUs in a process that is kept (light)"
    return f"{profile.workers} workers of {profile.cpus_per_worker} CPUs, {profile.gpus_per_worker} GPUs (train)"


def _at_once(prepared: PreparedSweep) -> int | None:
    nodes = nodes_to_come(prepared.profile)
    if nodes is None:
        return prepared.space.resources.max_concurrent
    require_trial_fits(prepared.space, prepared.trial_profile, nodes)
    return trials_at_once(prepared.space, prepared.trial_profile, nodes)


def _warm_start(prepared: PreparedSweep) -> dict[str, str]:
    if not prepared.space.warm_start:
        return {}
    began = prepared.began
    known, first = len(began.tried), len(began.first_points)
    return {"warm start": f"{known} points are known and not trained again, {first} are tried first"}


def _cost(space: Space, expected: float, most: float, samples: int) -> str:
    """In epochs, and in images of the proxy's training set."""
    whole = f"{most:,.0f} epochs"
    images = f"{expected * samples:,.0f} images"
    match space.scheduler:
        case Annealed() | Halving():
            share = f"{expected / most:.0%} of the {whole} that all points take to their end"
            return f"{_epochs(expected)} if none diverges: {share} ({images})"
        case Asha() | HyperBand():
            return f"{whole} if none is stopped early, about {expected:,.0f} in the long run ({images})"
        case Median():
            return f"{whole} at most; how many the median rule saves cannot be estimated ({images})"
        case _:
            return f"{_epochs(expected)} ({images})"


def _rungs(space: Space, num_points: int, cost: PointCost) -> dict[str, str]:
    """What each rung trains and keeps: one row for each."""
    scheduler, rungs = space.scheduler, cost.rungs
    if isinstance(scheduler, Record):
        judged = [judged_epoch(share, cost.length, 1) for share in scheduler.cooldowns]
        more = [f"cooldowns after epochs {joined(map(shown_value, judged))}"] if judged else []
        more += [f"whole schedules of {joined(map(str, scheduler.shorts))} epochs"] if scheduler.shorts else []
        return {"each point": f"{_epochs(cost.stages[0])}: {', '.join([f'its {cost.length:g}', *more])}"}
    if not rungs:
        return {}
    numbers = contenders(space, num_points, len(rungs))
    is_exact = isinstance(scheduler, Annealed | Halving)
    about = "" if is_exact else "about "
    rows = {}
    for place, (number, epochs) in enumerate(zip(numbers, cost.stages, strict=True)):
        who = f"{number:.3g} points" if place == 0 else f"{'the best' if is_exact else about.strip()} {number:.3g}"
        end = rungs[place] if place < len(rungs) else cost.length
        if isinstance(scheduler, Halving):
            what = f"a whole schedule of {_epochs(end)}"
        else:
            what = f"to epoch {end:g}" if place < len(rungs) else f"to the end, epoch {end:g}"
            if isinstance(scheduler, Annealed) and place < len(rungs):
                before = rungs[place - 1] if place else 0.0
                what += f" and a cooldown of {_epochs(epochs - (end - before))}"
        keeps = "" if place == len(rungs) else f"; keeps {about}{numbers[place + 1]:.3g}"
        name = f"rung {place + 1}" if place < len(rungs) else "last"
        rows[name] = f"{who}, {what}: {about}{_epochs(number * epochs)}{keeps}"
    if space.seeds > 1:
        further = _epochs(numbers[-1] * (space.seeds - 1) * cost.length)
        rows["seeds"] = f"{about}{numbers[-1]:.3g} points, {space.seeds - 1} more of each: {about}{further}"
    return rows


def _epochs(number: float) -> str:
    return f"{number:,.4g} epoch{'s' * (number != 1)}"


def _race(space: Space) -> dict[str, str]:
    if space.race is None:
        return {}
    return {
        "race": f"then up to {space.race.max_seeds} runs of each point that cannot be told from the best, not counted"
    }


def _time(prepared: PreparedSweep, state: SweepState, coming: Sequence[Sequence[float]], at_once: int | None) -> str:
    images_per_s, samples = prepared.space.resources.images_per_s, prepared.builder.num_proxy_samples
    speed, source = measured_speed(state), "measured in this sweep"
    if images_per_s is not None:
        speed = Speed(samples / images_per_s)
        source = f"at {images_per_s:g} images/s a trial (resources.images_per_s)"
    if speed is None:
        return "not known before a trial has run; set resources.images_per_s"
    return f"about {duration(seconds_left(prepared.space, coming, speed, at_once or 1) / 3600)} {source}"
