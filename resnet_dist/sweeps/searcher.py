"""Ray Tune's search on Optuna (`ray.tune.search.optuna.OptunaSearch`): TPE and CMA-ES over a space.

What it proposes depends on the space's seed and on the order of what it was asked and told: going through the ledger of
a killed sweep brings it where it was.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from ray.tune.result import TRAINING_ITERATION
from ray.tune.search.optuna import OptunaSearch

from resnet_dist.config.space import Choice, CmaSearch, LogUniform, Parameter, QUniform, Space, TpeSearch, Uniform
from resnet_dist.sweeps.ledger import Outcome
from resnet_dist.sweeps.points import Point, is_active

_SCORE = "score"
_STUDY = "sweep"


class TuneSearcher:
    """Implements `tune.sweep.Searcher`."""

    def __init__(self, space: Space, known: Sequence[tuple[Point, float]] = (), num_before: int = 0) -> None:
        """`known`: points of earlier sweeps over the same proxy, with their scores. `num_before`: proposals of killed
        drivers; the draws after them are new ones, not those of the first driver again.
        """
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        logging.getLogger("ray.tune.search").setLevel(logging.ERROR)
        storage = optuna.storages.InMemoryStorage()
        self._search = OptunaSearch(
            lambda trial: suggest(space, trial),
            metric=_SCORE,
            mode="max" if space.higher_is_better else "min",
            sampler=_sampler(space, num_before),
            study_name=_STUDY,
            storage=storage,
        )
        self._space, self._num_proposed = space, 0
        self._proposals: dict[str, str] = {}
        self.study = optuna.load_study(study_name=_STUDY, storage=storage)
        for point, score in known:
            self.study.add_trial(evaluated(space, point, score))

    def propose(self, trial: str, known: Point | None = None) -> Point:
        if known is None and self._num_proposed < len(self._space.first_points):
            known = dict(self._space.first_points[self._num_proposed])
        if known is not None:
            # Not drawn anew: where a sweep goes on, what was trained and what the study holds must be the same point.
            self.study.enqueue_trial(_as_numbers(self._space, known))
        self._num_proposed += 1
        # Tune's name of a proposal: a trial may get a second one.
        self._proposals[trial] = f"{trial}#{self._num_proposed}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return self._search.suggest(self._proposals[trial]) or {}

    def report(self, trial: str, epoch: float, score: float) -> None:
        self._search.on_trial_result(self._proposals[trial], {_SCORE: score, TRAINING_ITERATION: round(epoch)})

    def end(self, trial: str, outcome: Outcome, score: float) -> None:
        """A trial that was stopped early counts by what it reported on its way, as Optuna's pruned trials do."""
        if outcome == "failed":
            self._search.on_trial_complete(self._proposals[trial], error=True)
        elif outcome == "stopped":
            self._search.on_trial_complete(self._proposals[trial])
        else:
            self._search.on_trial_complete(self._proposals[trial], {_SCORE: score})


def suggest(space: Space, trial: Any) -> Point:
    """Optuna's define-by-run: a parameter is asked for where it is active."""
    point: Point = {}
    for key, parameter in space.free.items():
        if not is_active(parameter, point):
            continue
        match parameter:
            case LogUniform(low=low, high=high):
                point[key] = trial.suggest_float(key, low, high, log=True)
            case Uniform(low=low, high=high):
                point[key] = trial.suggest_float(key, low, high)
            case QUniform(num_values=num):
                point[key] = parameter.value(trial.suggest_int(key, 0, num - 1))
            case Choice(values=values):
                point[key] = values[trial.suggest_categorical(key, list(range(len(values))))]
    return point


def evaluated(space: Space, point: Point, score: float) -> optuna.trial.FrozenTrial:
    """A finished Optuna trial at a point that lies in the space."""
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
    """Steps and choices by their number, as `suggest` asks for them."""
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


def _sampler(space: Space, num_before: int) -> optuna.samplers.BaseSampler:
    search = space.search
    seed = (getattr(search, "seed", 0) + 1_000_003 * num_before) % 2**31
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        match search:
            case TpeSearch():
                # multivariate: lr and wd are coupled. constant_liar: trials in flight count as bad, so that those that
                # run at once do not crowd.
                return optuna.samplers.TPESampler(
                    n_startup_trials=search.startup_trials,
                    multivariate=True,
                    group=True,
                    constant_liar=True,
                    seed=seed,
                )
            case CmaSearch():
                return optuna.samplers.CmaEsSampler(
                    n_startup_trials=search.startup_trials,
                    consider_pruned_trials=space.scheduler.kind != "fifo",
                    seed=seed,
                )
            case _:
                raise AssertionError(f"{search.kind} needs no model")
