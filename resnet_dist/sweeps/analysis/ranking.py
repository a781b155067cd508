"""Which point is best, and whether its lead is more than noise. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from scipy.special import stdtrit

from resnet_dist.config.space import Space
from resnet_dist.sweeps.ledger import SweepState, TrialState
from resnet_dist.sweeps.points import Point

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Ranked:
    """One point with all its runs."""

    number: int
    point: Point
    trials: tuple[str, ...]
    status: str
    """Its first run's."""
    epoch: float
    """How far its first run came."""
    score: float
    """Mean over the runs that reached their end, or the newest score if none did; NaN if there is none. A run with a
    further seed that diverged counts with the worst score."""
    num_runs: int
    """Runs that reached their end, and those with further seeds that diverged."""
    num_diverged: int
    spread: float | None
    """Standard deviation over those runs, if there are two or more."""
    in_noise: bool = False
    """Whether its difference from the best, and that of every point between them, may be chance."""


@dataclass(frozen=True)
class Ranking:
    metric: str
    rows: tuple[Ranked, ...]
    """Best first: points that reached their end, by score; then those stopped early, the farthest first; then
    diverged ones."""
    noise: float | None
    """Standard deviation of one run over seeds, pooled over the points that were repeated; None if none was."""

    @property
    def best(self) -> Ranked | None:
        return self.rows[0] if self.rows and self.rows[0].num_runs else None

    def verdict(self) -> str:
        """How certain the first place is, in one sentence."""
        if self.best is None:
            is_over = all(row.status in ("diverged", "failed", "stopped") for row in self.rows)
            return "no trial reached its end" if is_over and self.rows else "no trial has reached its end yet"
        if sum(row.num_runs > 0 for row in self.rows) == 1:
            return "no other point reached its end, so there is nothing to compare the first place with"
        if not self.noise:
            if all(row.num_runs <= 1 for row in self.rows):
                return "noise unknown: every point has one seed (`--set seeds=3`)"
            return "noise unknown: the seeds of each point gave the same score"
        level = [row for row in self.rows[1:] if row.in_noise]
        spread = self.best.spread
        deviation = (
            f"its runs vary by {spread:.3g} (standard deviation over {self.best.num_runs} seeds)"
            if spread is not None
            else f"one run varies by {self.noise:.3g} (standard deviation over seeds, pooled)"
        )
        if not level:
            return f"the first place is more than chance: {deviation}"
        return f"{len(level)} more points are inside the noise of the best: {deviation}"


def rank(space: Space, state: SweepState) -> Ranking:
    points: dict[int, list[TrialState]] = {}
    for trial in state.trials.values():
        points.setdefault(trial.number, []).append(trial)
    rows = [_ranked(space, trials) for trials in points.values()]
    sign = -1.0 if space.higher_is_better else 1.0
    rows.sort(
        key=lambda row: (
            row.num_runs == 0,
            row.status in ("diverged", "failed"),
            0.0 if row.num_runs else -row.epoch,
            sign * row.score if math.isfinite(row.score) else math.inf,
            row.number,
        )
    )
    scores = {n: _scores(space, [t for t in trials if t.kind == "point"]) for n, trials in points.items()}
    if rows and rows[0].num_runs:
        best = scores[rows[0].number]
        everything = list(scores.values())
        # Up to the first that is significantly worse: a point behind it that varies more is no rival.
        level = itertools.takewhile(lambda row: may_be_level(scores[row.number], best, everything), rows[1:])
        rivals = {row.number for row in level}
        rows = [replace(row, in_noise=row.number in rivals) for row in rows]
    return Ranking(space.metric, tuple(rows), _pooled(list(scores.values()))[0])


def _ranked(space: Space, trials: list[TrialState]) -> Ranked:
    whole = [trial for trial in trials if trial.kind == "point"]
    first = whole[0] if whole else max(trials, key=lambda trial: trial.rung)
    scores = _scores(space, whole)
    newest = space.score(first.metrics) if first.metrics and first.status not in ("diverged", "failed") else math.nan
    return Ranked(
        number=first.number,
        point=first.point,
        trials=tuple(trial.name for trial in trials),
        status="stopped" if first.kind == "short" and first.status == "finished" else first.status,
        epoch=first.epoch,
        score=fmean(scores) if scores else newest,
        num_runs=len(scores),
        num_diverged=sum(trial.status == "diverged" for trial in whole),
        spread=_pooled([scores])[0],
    )


def _scores(space: Space, trials: Sequence[TrialState]) -> list[float]:
    """Scores of the runs that reached their end, and of those that diverged although the first seed did not."""
    if not trials or trials[0].status in ("diverged", "failed"):
        return []
    over = [trial for trial in trials if trial.status in ("finished", "diverged")]
    return [space.score(trial.metrics if trial.status == "finished" else {}) for trial in over]


def may_be_level(scores: Sequence[float], best: Sequence[float], everything: Sequence[Sequence[float]]) -> bool:
    """Whether the difference of two means may be chance: Student's test (1908) for two samples, two-sided.

    The standard deviation is pooled over these two points' runs only, because points far from the best vary much more:
    on the digits by 1 to 3 in loss at rates too high, by 0.02 to 0.15 near the best. If one of the two has a single
    run, it is pooled over all repeated points in `everything`. False if no point was repeated.
    """
    deviation, freedom = _pooled([scores, best] if min(len(scores), len(best)) > 1 else everything)
    if not deviation or not scores or not best:
        return False
    standard_error = deviation * math.sqrt(1 / len(scores) + 1 / len(best))
    return abs(fmean(scores) - fmean(best)) <= float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * standard_error


def _pooled(groups: Sequence[Sequence[float]]) -> tuple[float | None, int]:
    """The standard deviation within groups (None without a group of two), and its degrees of freedom."""
    freedom = sum(len(group) - 1 for group in groups if len(group) > 1)
    if freedom == 0:
        return None, 0
    squares = sum((value - fmean(group)) ** 2 for group in groups if len(group) > 1 for value in group)
    return math.sqrt(squares / freedom), freedom
