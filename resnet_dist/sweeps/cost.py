"""What a sweep will cost before it has begun, and what it saved. Pure."""

from __future__ import annotations

import math

from resnet_dist.config.space import Asha, HyperBand, Median, SchedulerConfig, Space
from resnet_dist.sweeps.ledger import SweepState, spent_epochs


def most_epochs(space: Space, num_points: int, epochs_per_trial: float) -> float:
    """If no trial is stopped early."""
    return num_points * epochs_per_trial * space.seeds


def rung_shares(scheduler: SchedulerConfig) -> list[float]:
    """Where on its schedule a trial is judged, or first judged, as shares of the schedule, ascending."""
    match scheduler:
        case Asha(first_rung=share, rungs=rungs, reduction_factor=factor):
            return [share * factor**rung for rung in range(rungs)]
        case HyperBand(reduction_factor=factor):
            return [1 / factor**2, 1 / factor]
        case Median(grace=share):
            return [share]
        case _:
            return []


def judged_epoch(share: float, epochs_per_trial: float, eval_every_epochs: int) -> float:
    """The epoch of the first evaluation at or after a rung: only there a trial can be judged.

    >>> judged_epoch(0.11, 24, 1), judged_epoch(0.11, 24, 5)
    (3.0, 5.0)
    """
    evaluations = math.ceil(share * epochs_per_trial / eval_every_epochs - 1e-9)
    return float(min(evaluations * eval_every_epochs, epochs_per_trial))


def expected_epochs(space: Space, num_points: int, epochs_per_trial: float, eval_every_epochs: int = 1) -> float:
    """If each rung lets 1 / reduction_factor through, as it does in the long run; the first trials at a rung always go
    on, so a short sweep costs more. Of the median rule nothing is known beforehand."""
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


def saved_epochs(state: SweepState, epochs_per_trial: float) -> float:
    """What the trials that were stopped early did not spend."""
    stopped = [trial for trial in state.trials.values() if trial.status == "stopped"]
    return sum(epochs_per_trial - trial.epoch for trial in stopped)


def summary(state: SweepState, epochs_per_trial: float) -> dict[str, float]:
    counts = dict.fromkeys(("finished", "stopped", "diverged", "failed"), 0.0)
    for trial in state.trials.values():
        if trial.status in counts:
            counts[trial.status] += 1
    return {
        **counts,
        "trials": float(len(state.trials)),
        "epochs_spent": spent_epochs(state),
        "epochs_saved": saved_epochs(state, epochs_per_trial),
        "wall_hours": state.wall_until(state.last_s) / 3600,
        "trial_hours": sum(trial.seconds for trial in state.trials.values()) / 3600,
    }
