"""Ray Tune's schedulers, asked by our driver instead of Tune's: a verdict is acted upon in order, with a checkpoint.

Tune's own controller ends a trial by killing its actor. A Ray Train worker group inside it then outlives the trial
unless the dashboard runs (ray 2.60), and its MLflow run has no end. Here a trial that is told to stop stops itself.
"""

from __future__ import annotations

import logging
import math
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, HyperBandScheduler, MedianStoppingRule
from ray.tune.schedulers.trial_scheduler import TrialScheduler

from resnet_dist.config.space import Asha, Fifo, HyperBand, Median, SchedulerConfig, Space
from resnet_dist.sweeps.ledger import Verdict

_TIME, _SCORE = "share", "score"
_VERDICTS: dict[str, Verdict] = {
    TrialScheduler.CONTINUE: "go on",
    TrialScheduler.NOOP: "go on",
    TrialScheduler.STOP: "stop",
    TrialScheduler.PAUSE: "wait",
}


class _KnownTrial:
    """What Tune's schedulers look at of a `ray.tune.experiment.Trial`."""

    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id
        self.status = Trial.PENDING
        self.is_saving = False

    def __str__(self) -> str:
        return self.trial_id


class TuneScheduler:
    """Implements `tune.sweep.Scheduler`, and what Tune's schedulers ask of a controller."""

    def __init__(self, space: Space) -> None:
        self._scheduler = _scheduler(space.scheduler, "max" if space.higher_is_better else "min")
        self._units = _units(space.scheduler)
        self._first_rung = space.scheduler.first_rung if isinstance(space.scheduler, Asha) else 0.0
        self._trials: dict[str, _KnownTrial] = {}
        self._abandoned: list[str] = []

    def add(self, trial: str) -> None:
        self._trials[trial] = _KnownTrial(trial)
        self._scheduler.on_trial_add(self, self._trials[trial])

    def start(self, trial: str) -> None:
        self._trials[trial].status = Trial.RUNNING

    def report(self, trial: str, share: float, score: float) -> Verdict:
        known = self._trials[trial]
        known.status = Trial.RUNNING
        verdict = _VERDICTS[self._scheduler.on_trial_result(self, known, self._result(share, score))]
        if verdict == "wait":
            known.status = Trial.PAUSED
        return verdict

    def end(self, trial: str, share: float, score: float) -> None:
        """A trial that diverged before its first rung counts there with its worst score, so that it raises the bar."""
        known = self._trials[trial]
        if known.status in (Trial.TERMINATED, Trial.ERROR):
            return
        known.status = Trial.TERMINATED
        self._scheduler.on_trial_complete(self, known, self._result(max(share, self._first_rung), score))

    def resumable(self) -> list[str]:
        if not isinstance(self._scheduler, HyperBandScheduler):
            return []
        chosen = self._scheduler.choose_trial_to_run(self)
        return [chosen.trial_id] if chosen is not None and chosen.status == Trial.PAUSED else []

    def abandoned(self) -> list[str]:
        abandoned, self._abandoned = self._abandoned, []
        return abandoned

    # What a scheduler asks of Tune's controller.

    def get_trials(self) -> list[_KnownTrial]:
        return list(self._trials.values())

    def get_live_trials(self) -> set[_KnownTrial]:
        return {trial for trial in self._trials.values() if trial.status not in (Trial.TERMINATED, Trial.ERROR)}

    def stop_trial(self, trial: _KnownTrial) -> None:
        self._scheduler.on_trial_remove(self, trial)
        trial.status = Trial.TERMINATED
        self._abandoned.append(trial.trial_id)

    def _result(self, share: float, score: float) -> dict[str, Any]:
        return {_TIME: share * self._units, _SCORE: score, "training_iteration": share * self._units}


def _scheduler(config: SchedulerConfig, mode: str) -> TrialScheduler:
    common: dict[str, Any] = {"time_attr": _TIME, "metric": _SCORE, "mode": mode}
    match config:
        case Fifo():
            return FIFOScheduler()
        case Asha():
            # Tune reckons the number of rungs from max_t; without `stop_last_trials` max_t does nothing else.
            last = config.first_rung * config.reduction_factor ** (config.rungs - 1)
            return AsyncHyperBandScheduler(
                **common,
                grace_period=config.first_rung,
                reduction_factor=config.reduction_factor,
                max_t=last * config.reduction_factor**0.5,
                stop_last_trials=False,
            )
        case Median():
            # Without an infinite slice it pauses trials while there is too little to compare them with: one after the
            # other instead of all at once.
            return MedianStoppingRule(
                **common,
                grace_period=config.grace,
                min_samples_required=config.min_trials,
                min_time_slice=math.inf,
                hard_stop=True,
            )
        case HyperBand():
            return HyperBandScheduler(**common, max_t=round(_units(config)), reduction_factor=config.reduction_factor)


def _units(config: SchedulerConfig) -> float:
    """HyperBand counts in whole units of time: with eta^2 of them its rungs lie at 1/eta^2, 1/eta and the end."""
    return round(config.reduction_factor**2) if isinstance(config, HyperBand) else 1.0


logging.getLogger("ray.tune.schedulers").setLevel(logging.ERROR)
