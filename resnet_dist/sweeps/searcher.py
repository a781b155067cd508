"""Searches that learn from the ledger: Optuna's TPE and CMA-ES."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from resnet_dist.config.space import Choice, CmaSearch, LogUniform, Parameter, QUniform, Space, TpeSearch, Uniform
from resnet_dist.sweeps.ledger import Began, Event, TrialAdded, TrialEnded, TrialReported, final_score
from resnet_dist.sweeps.points import Point, is_active, rounded
from resnet_dist.sweeps.sweep import PROPOSALS


class OptunaSearcher:
    """Implements `sweep.Searcher` with one of Optuna's samplers.

    Optuna's study is rebuilt from the ledger: each event goes into it once, in the ledger's order. Each proposal draws
    with its own seed, so the successor of a killed driver proposes what that driver would have.
    """

    def __init__(self, space: Space) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._space = space
        self.study = optuna.create_study(direction="maximize" if space.higher_is_better else "minimize")
        self._trials: dict[str, optuna.Trial] = {}
        """By the ledger's names."""
        self._proposed: tuple[Point, optuna.Trial] | None = None
        self._num_events = 0

    def suggest(self, events: Sequence[Event], num_refused: int = 0) -> Point:
        """See `sweep.Searcher`."""
        self._read(events)
        return self._propose(num_refused)

    def _read(self, events: Sequence[Event]) -> None:
        for event in events[self._num_events :]:
            match event:
                case Began():
                    for point, score in event.known:
                        self.study.add_trial(evaluated(self._space, dict(point), score))
                case TrialAdded() if event.seed_number == 0:
                    self._trials[event.trial] = self._trial_at(dict(event.point))
                case TrialReported() if event.trial in self._trials:
                    self._trials[event.trial].report(self._space.score(event.metrics), round(event.epoch))
                case TrialEnded() if event.trial in self._trials:
                    self._end(self._trials[event.trial], event)
        self._num_events = len(events)

    def _trial_at(self, point: Point) -> optuna.Trial:
        """Optuna's trial at a point that was added, whoever proposed it."""
        if self._proposed is None and point not in self._space.first_points:
            # A killed driver proposed it. It is drawn again, because CMA-ES keeps its state with the points it draws.
            for num_refused in range(PROPOSALS):
                if rounded(self._propose(num_refused)) == rounded(point):  # earlier versions had more digits
                    break
        if self._proposed is not None and rounded(self._proposed[0]) == rounded(point):
            trial = self._proposed[1]
            self._proposed = None
            return trial
        self._refuse()
        self.study.enqueue_trial(_as_numbers(self._space, point))
        trial = self.study.ask()
        suggest(self._space, trial)
        return trial

    def _propose(self, num_refused: int) -> Point:
        self._refuse()
        search = self._space.search
        seed = getattr(search, "seed", 0) + 1_000_003 * len(self._trials) + 10_007 * num_refused
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self.study.sampler = _sampler(self._space, seed % 2**31)
            trial = self.study.ask()
        point = suggest(self._space, trial)
        self._proposed = point, trial
        return point

    def _refuse(self) -> None:
        """Gives up the newest proposal: it will not be trained."""
        if self._proposed is not None:
            self.study.tell(self._proposed[1], state=optuna.trial.TrialState.FAIL)
            self._proposed = None

    def _end(self, trial: optuna.Trial, end: TrialEnded) -> None:
        """A trial that was stopped early counts by its last report."""
        match end.outcome:
            case "failed":
                self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
            case "stopped":
                self.study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            case _:
                self.study.tell(trial, final_score(self._space, end))


def suggest(space: Space, trial: Any) -> Point:
    """Draws each parameter that is active (Optuna's define-by-run); numbers to six digits, as all points have."""
    point: Point = {}
    for key, parameter in space.free.items():
        if not is_active(parameter, point):
            continue
        match parameter:
            case LogUniform(low=low, high=high):
                point[key] = _within(trial.suggest_float(key, low, high, log=True), low, high)
            case Uniform(low=low, high=high):
                point[key] = _within(trial.suggest_float(key, low, high), low, high)
            case QUniform(num_values=num):
                point[key] = parameter.value(trial.suggest_int(key, 0, num - 1))
            case Choice(values=values):
                point[key] = values[trial.suggest_categorical(key, list(range(len(values))))]
    return point


def _within(value: float, low: float, high: float) -> float:
    return min(max(float(f"{value:.6g}"), low), high)


def evaluated(space: Space, point: Point, score: float) -> optuna.trial.FrozenTrial:
    """A finished Optuna trial at a point of the space."""
    distributions = {key: distribution(space.space[key]) for key in point}
    return optuna.trial.create_trial(params=_as_numbers(space, point), distributions=distributions, value=score)


def distribution(parameter: Parameter) -> BaseDistribution:
    match parameter:
        case LogUniform(low=low, high=high):
            return FloatDistribution(low, high, log=True)
        case Uniform(low=low, high=high):
            return FloatDistribution(low, high)
        case QUniform(num_values=num):
            return IntDistribution(0, num - 1)
        case Choice(values=values):
            return CategoricalDistribution(list(range(len(values))))
        case _:
            raise AssertionError(f"{parameter.kind} is not searched")


def _as_numbers(space: Space, point: Mapping[str, Any]) -> dict[str, Any]:
    """Steps and choices by their index, as `suggest` draws them."""
    numbers: dict[str, Any] = {}
    for key, value in point.items():
        parameter = space.space[key]
        if isinstance(parameter, QUniform):
            numbers[key] = round((value - parameter.low) / parameter.step)
        elif isinstance(parameter, Choice):
            numbers[key] = parameter.values.index(value)
        else:
            numbers[key] = value
    return numbers


def _sampler(space: Space, seed: int) -> optuna.samplers.BaseSampler:
    match space.search:
        case TpeSearch(startup_trials=startup_trials):
            # multivariate: lr and wd are coupled. constant_liar: running trials count as bad, so that trials at the
            # same time are not all at the same place.
            return optuna.samplers.TPESampler(
                n_startup_trials=startup_trials, multivariate=True, group=True, constant_liar=True, seed=seed
            )
        case CmaSearch(startup_trials=startup_trials):
            return optuna.samplers.CmaEsSampler(
                n_startup_trials=startup_trials, consider_pruned_trials=space.scheduler.kind != "fifo", seed=seed
            )
        case _:
            raise AssertionError(f"{space.search.kind} needs no model")
