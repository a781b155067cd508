"""Racing: which points may be the best, and which of them get another seed. Pure.

Scores are those of whole runs, and higher is better: a metric to be minimized is negated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from scipy.special import ndtri, stdtrit

from resnet_dist.config.space import Race, Space
from resnet_dist.sweeps.ledger import TrialState

CONFIDENCE = 0.95
_LEAST = 4
"""Runs of a round, if so many points are left."""


def scores_by_seed(space: Space, trials: Iterable[TrialState]) -> dict[int, list[float | None]]:
    """The scores of each point's whole runs, by seed number; None for one that has none, because it failed or runs.

    Points whose first run did not finish are left out. A run with a further seed that diverged counts with the worst
    score.
    """
    sign = 1.0 if space.higher_is_better else -1.0
    points: dict[int, list[float | None]] = {}
    for trial in trials:
        if trial.kind == "point" and (trial.number in points or trial.status == "finished"):
            is_scored = trial.status in ("finished", "diverged")
            score = space.score(trial.metrics if trial.status == "finished" else {})
            points.setdefault(trial.number, []).append(sign * score if is_scored else None)
    return points


def contenders(scores: Mapping[int, Sequence[float]]) -> dict[int, float]:
    """The points that cannot be told from the best, best mean first, and by how much each may be better than the best.

    That is the upper end of the interval of the difference of the two means, by Student's test (1908) for two samples,
    two-sided at 95 %, with the level divided by the number of comparisons (Bonferroni); inf where no point was
    repeated. A race looks after each round, for which the level is not lowered further: simulated races that stop at
    this rule keep the best point in 96 to 99 % of all cases where points differ (tune_spaces/results/README.md).

    The standard deviation is pooled over the runs of all points from the best down to the one compared. Most points
    have too few runs for a deviation of their own, and points far from the best vary much more: on the digits by 1 to 3
    in loss where the rate is too high, by 0.02 to 0.15 near the best. The list ends with the first point that is
    significantly worse, because one behind it that only varies more is no rival.

    Args:
        scores: of each point's runs, one or more.
    """
    means = {point: fmean(runs) for point, runs in scores.items()}
    ranked = sorted(scores, key=lambda point: (-means[point], point))
    gains = dict.fromkeys(ranked[:1], 0.0)
    for place, point in enumerate(ranked[1:], 2):
        best, near = ranked[0], [scores[other] for other in ranked[:place]]
        deviation, freedom = pooled(near)
        if deviation is None:  # all above have a single run
            deviation, freedom = pooled(scores.values())
        if deviation is None:
            gains[point] = math.inf
            continue
        margin = float(stdtrit(freedom, _level(len(scores)))) * deviation
        margin *= math.sqrt(1 / len(scores[point]) + 1 / len(scores[best]))
        gain = means[point] - means[best] + margin
        if gain < 0:
            break
        gains[point] = gain
    return gains


def next_round(race: Race, runs: Mapping[int, Sequence[float | None]]) -> list[tuple[int, int]]:
    """The runs of the race's next round as (point, seed number), best point first; empty when the race is over.

    The better half of the contenders, the best among them, get one more seed each; at least four points do. The race
    leaves out points that cannot be better than the best by more than `min_difference`, and is over when no others are
    left or all have `max_seeds` runs. A point that was left out comes back if the best falls. Sampling the best and
    its nearest rivals is Kalyanakrishnan et al.'s LUCB (2012); a race of all contenders (Maron and Moore 1994) decides
    as well and costs a quarter more.

    Args:
        runs: each point's scores by seed number; None for a run that failed.
    """
    scores = {point: [score for score in by_seed if score is not None] for point, by_seed in runs.items()}
    gains = contenders({point: known for point, known in scores.items() if known})
    rivals = [point for point, gain in list(gains.items())[1:] if gain > race.min_difference]
    if not rivals:
        return []
    unfinished = [point for point in (next(iter(gains)), *rivals) if len(runs[point]) < race.max_seeds]
    return [(point, len(runs[point])) for point in unfinished[: max(_LEAST, math.ceil(len(unfinished) / 2))]]


def runs_to_tell(difference: float, deviation: float, num_points: int) -> float:
    """About how many runs of each of two points would show the `difference` of their means; inf if there is none.

    Args:
        deviation: the standard deviation of one run.
        num_points: how many points are compared.
    """
    if difference == 0:
        return math.inf
    return float(math.ceil(2 * (float(ndtri(_level(num_points))) * deviation / difference) ** 2))


def mean_margin(scores: Sequence[float], near: Iterable[Sequence[float]]) -> float | None:
    """Half the 95 % interval of a point's mean, with the deviation pooled over the points in `near`; None: unknown."""
    deviation, freedom = pooled(near)
    if deviation is None:
        return None
    return float(stdtrit(freedom, _level(2))) * deviation / math.sqrt(len(scores))


def pooled(groups: Iterable[Sequence[float]]) -> tuple[float | None, int]:
    """The standard deviation within groups (None without a group of two), and its degrees of freedom."""
    repeated = [group for group in groups if len(group) > 1]
    freedom = sum(len(group) - 1 for group in repeated)
    if freedom == 0:
        return None, 0
    return math.sqrt(sum((value - fmean(group)) ** 2 for group in repeated for value in group) / freedom), freedom


def _level(num_points: int) -> float:
    """The probability below the critical value of one of `num_points - 1` two-sided comparisons with the best."""
    return 1 - (1 - CONFIDENCE) / 2 / max(num_points - 1, 1)
