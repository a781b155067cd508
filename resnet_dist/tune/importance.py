"""How much of the differences between points each parameter explains: Optuna's fANOVA (Hutter et al. 2014)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

from resnet_dist.config.space import Space
from resnet_dist.config.space_parameters import LogUniform
from resnet_dist.tune.ranking import Ranking

_LEAST_POINTS = 8


def importance(space: Space, ranking: Ranking) -> Mapping[str, float]:
    """Shares that sum to 1, largest first; empty with fewer than eight points that reached their end.

    Over the keys that every such point has and that took more than one value. Trials that diverged are left out: one
    cliff would explain everything.
    """
    rows = [row for row in ranking.rows if row.num_runs]
    keys = [key for key in space.free if all(key in row.point for row in rows)]
    keys = [key for key in keys if len({repr(row.point[key]) for row in rows}) > 1]
    if len(rows) < _LEAST_POINTS or len(keys) < 2:
        return {}
    import optuna  # a second of imports

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
    """Numbers by their range here, everything else by its place in a list."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        low, high = float(min(values)), float(max(values))
        log = low > 0 and (isinstance(space.space[key], LogUniform) or high / low > 10)
        return FloatDistribution(low, high, log=log), [float(value) for value in values]
    names = [repr(value) for value in values]
    return CategoricalDistribution(sorted(set(names))), names
