"""`tune --dry-run`: the trials, what they may cost, and where they would run. Nothing is started."""

from __future__ import annotations

from data_prep.redaction import redacted
from resnet_dist.config.loading import tree_to_yaml
from resnet_dist.config.space import Asha, HyperBand, Space
from resnet_dist.launch.preflight import nodes_to_come
from resnet_dist.sweeps.ledger import SweepState, ledger_file, read_ledger, replay, spent_epochs
from resnet_dist.sweeps.points import coordinates_of, describe
from resnet_dist.sweeps.prepare import PreparedSweep, require_trial_fits, trials_at_once
from resnet_dist.sweeps.scheduler import judged_epoch, rung_shares

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
    point = prepared.planned[0] if prepared.planned else {}
    length = prepared.total_epochs(point)
    most = most_epochs(space, num_points, length)
    expected = expected_epochs(space, num_points, length, prepared.builder.proxy(point).eval.every_epochs)
    at_once = _at_once(prepared)
    rows = {
        "name": prepared.name,
        "folder": prepared.sweep_dir,
        "trials": f"{num_points} points, {space.seeds} run(s) of each that reaches its end"
        + (f", up to {space.race.max_seeds} of those that cannot be told from the best" if space.race else "")
        + (
            f" (trials is {space.trials}: the space has no more distinct points)"
            if num_points < (space.trials or 0)
            else ""
        ),
        "length of a trial": f"{length:g} epochs of {samples:,} images",
        "cost": f"{most:,.0f} epochs if none is stopped early"
        + (f", about {expected:,.0f} in the long run" if expected < most else "")
        + (" before the race" if space.race else "")
        + f" ({most * samples:,.0f} images)",
        "budget": ", ".join(f"{k} {v:g}" for k, v in space.budget.model_dump().items() if v is not None) or "no limit",
        "already spent": f"{spent_epochs(state):g} epochs",
        **_warm_start(prepared),
        "a trial gets": _trial_gets(prepared),
        "at once": "as many as the cluster holds" if at_once is None else f"{at_once} trials",
        "time": _time(prepared, state, expected * samples, at_once),
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
    return {"warm start": f"{len(began.known)} points with scores for the model, {len(began.first_points)} tried first"}


def _time(prepared: PreparedSweep, state: SweepState, images: float, at_once: int | None) -> str:
    speed, source = prepared.space.resources.images_per_s, "resources.images_per_s"
    if speed is None:
        speed, source = _measured(prepared, state), "measured in this sweep"
    if speed is None:
        return "not known before a trial has run; set resources.images_per_s"
    return f"about {images / speed / (at_once or 1) / 3600:.2g} hours at {speed:g} images/s a trial ({source})"


def _measured(prepared: PreparedSweep, state: SweepState) -> float | None:
    """Images a second of one trial so far, start-up and evaluation included."""
    trials = [trial for trial in state.trials.values() if trial.reports]
    seconds = sum(trial.seconds for trial in trials)
    images = sum(trial.epoch for trial in trials) * prepared.builder.num_proxy_samples
    return float(f"{images / seconds:.3g}") if seconds > 0 and images > 0 else None


def most_epochs(space: Space, num_points: int, epochs_per_trial: float) -> float:
    """The cost if no trial is stopped early."""
    return num_points * epochs_per_trial * space.seeds


def expected_epochs(space: Space, num_points: int, epochs_per_trial: float, eval_every_epochs: int = 1) -> float:
    """The cost if each rung lets 1 / reduction_factor of the trials continue, as it does in the long run.

    The first trials at a rung always continue, so a short sweep costs more. Nothing can be estimated for the median
    rule.
    """
    match space.scheduler:
        case Asha(reduction_factor=factor) | HyperBand(reduction_factor=factor):
            judged = [judged_epoch(s, epochs_per_trial, eval_every_epochs) for s in rung_shares(space.scheduler)]
            shares = [epoch / epochs_per_trial for epoch in judged] + [1.0]
        case _:
            return most_epochs(space, num_points, epochs_per_trial)
    spent, alive, done = 0.0, float(num_points), 0.0
    for share in shares:
        spent += alive * (share - done)
        alive, done = max(alive / factor, 1.0), share
    survivors = max(num_points / factor ** (len(shares) - 1), 1.0)
    return epochs_per_trial * (spent + survivors * (space.seeds - 1))
