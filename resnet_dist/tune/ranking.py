"""Which point is best, and whether the difference to the next is more than noise. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from resnet_dist.config.space import Space
from resnet_dist.tune.points import Point
from resnet_dist.tune.score import score_of
from resnet_dist.tune.state import SweepState, TrialState

_Z95 = 1.96


@dataclass(frozen=True)
class Ranked:
    """One point with all its runs."""

    number: int
    point: Point
    trials: tuple[str, ...]
    status: str
    """Of its first run."""
    epoch: float
    """How far its first run came."""
    score: float
    """Mean over the runs that reached their end, or the newest score of one that did not; NaN if there is none."""
    num_runs: int
    """Runs that reached their end."""
    spread: float | None
    """Standard deviation over those runs, if there are two or more."""
    in_noise: bool = False
    """Whether its distance from the best may be chance."""


@dataclass(frozen=True)
class Ranking:
    metric: str
    rows: tuple[Ranked, ...]
    """Best first: points that reached their end, by score; those stopped early, the farthest first; diverged ones."""
    noise: float | None
    """Standard deviation of one run over seeds, pooled over the points that were repeated; None if none was."""

    @property
    def best(self) -> Ranked | None:
        return self.rows[0] if self.rows and self.rows[0].num_runs else None

    def verdict(self) -> str:
        """One sentence: how sure the first place is."""
        if self.best is None:
            return "no trial has reached its end yet"
        if self.noise is None:
            return "how much of the differences is chance is not known: no point was run with more than one seed"
        level = [row for row in self.rows[1:] if row.in_noise]
        deviation = f"one run varies by {self.noise:.3g} (standard deviation over seeds)"
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
    noise = _pooled([_scores(space, trials) for trials in points.values()])
    if noise is not None and rows and rows[0].num_runs:
        rows = [rows[0], *(_compared(row, rows[0], noise) for row in rows[1:])]
    return Ranking(space.metric, tuple(rows), noise)


def _ranked(space: Space, trials: list[TrialState]) -> Ranked:
    first = trials[0]
    scores = _scores(space, trials)
    newest = (
        score_of(space, first.metrics) if first.metrics and first.status not in ("diverged", "failed") else math.nan
    )
    return Ranked(
        number=first.number,
        point=first.point,
        trials=tuple(trial.name for trial in trials),
        status=first.status,
        epoch=first.epoch,
        score=fmean(scores) if scores else newest,
        num_runs=len(scores),
        spread=_pooled([scores]),
    )


def _scores(space: Space, trials: Sequence[TrialState]) -> list[float]:
    return [score_of(space, trial.metrics) for trial in trials if trial.status == "finished"]


def _pooled(groups: Sequence[Sequence[float]]) -> float | None:
    """Standard deviation within groups; None without a group of two."""
    freedom = sum(len(group) - 1 for group in groups if len(group) > 1)
    if freedom == 0:
        return None
    squares = sum((value - fmean(group)) ** 2 for group in groups if len(group) > 1 for value in group)
    return math.sqrt(squares / freedom)


def _compared(row: Ranked, best: Ranked, noise: float) -> Ranked:
    """Two means differ by more than chance if by more than 1.96 standard errors of their difference."""
    if not row.num_runs:
        return row
    standard_error = noise * math.sqrt(1 / row.num_runs + 1 / best.num_runs)
    in_noise = abs(row.score - best.score) <= _Z95 * standard_error
    return Ranked(**{**row.__dict__, "in_noise": in_noise})
