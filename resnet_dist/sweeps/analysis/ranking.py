"""Which point is best, and whether its lead is more than noise. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from data_prep.shown import joined
from resnet_dist.config.space import Space
from resnet_dist.sweeps.ledger import SweepState, TrialKind, TrialState, trial_name
from resnet_dist.sweeps.points import Point, describe, shown_value
from resnet_dist.sweeps.racing import contenders, mean_margin, pooled, runs_to_tell, scores_by_seed

_NAMED = 3
"""How many of the points that cannot be told from the best are named."""
_DROPPED: Mapping[TrialKind, str] = {
    "cooldown": "by a score after a cooldown",
    "short": "by a shorter schedule",
    "point": "by a score before the end",
}
_MOST_RUNS = 30
"""More runs than this are not proposed to tell points apart."""


@dataclass(frozen=True)
class Ranked:
    """One point with all its runs."""

    number: int
    point: Point
    trials: tuple[str, ...]
    status: str
    """Its first run's. "stopped" also if it lost at a rung of short schedules."""
    epoch: float
    """How far it came: its first run, or the short schedule or the cooldown that its score is from."""
    score: float
    """Mean over the runs that reached their end; if none did, of the last short schedule or cooldown, or else the
    newest score. NaN if there is none. A run with a further seed that diverged counts with the worst score."""
    num_runs: int
    """Runs that reached their end, and those with further seeds that diverged."""
    num_diverged: int
    spread: float | None
    """Standard deviation over those runs, if there are two or more."""
    judged_by: TrialKind = "point"
    """What the score is from. short, cooldown: the point was dropped at a rung, or has not come farther yet."""
    possible_gain: float | None = None
    """If it cannot be told from the best: by how much it may be better. None for the best and for all others."""
    runs_needed: float = math.inf
    """About how many runs of it and of the best would tell them apart, if their means stay as they are."""

    @property
    def in_noise(self) -> bool:
        """Whether its difference from the best, and that of every point between them, may be chance."""
        return self.possible_gain is not None

    @property
    def runs_in_words(self) -> str:
        """Of which the score is the mean."""
        return "one run" if self.num_runs == 1 else f"mean of {self.num_runs} runs"


@dataclass(frozen=True)
class Ranking:
    metric: str
    rows: tuple[Ranked, ...]
    """Best first: points that reached their end, by score; then those that were dropped, the farthest first; then
    diverged ones."""
    noise: float | None
    """Standard deviation of one run over seeds, pooled over the points that were repeated; None if none was."""
    margin: float | None = None
    """Half the 95 % interval of the best point's score; None where its runs say nothing about it."""
    is_over: bool = True
    """Whether all known trials are."""
    earlier: tuple[Mapping[str, Any], float] | None = None
    """The best point that the sweep began with, from `warm_start`, if it is better than all of the sweep's own."""

    @property
    def best(self) -> Ranked | None:
        return self.rows[0] if self.rows and self.rows[0].num_runs else None

    def verdict(self) -> str:
        """What was found and how certain it is, in one to three sentences."""
        if self.best is None:
            return "No trial reached its end." if self.is_over and self.rows else "No trial has reached its end yet."
        sentences = [f"{self._best_in_words(self.best)}; {self._others_in_words(self.best)}"]
        level = [row for row in self.rows if row.in_noise]
        if level and self.noise:
            gain = max(row.possible_gain or 0.0 for row in level)
            subject = "It" if len(level) == 1 else "One of them"
            sentences.append(f"{subject} may be better by up to {gain:.2g}; {_what_would_tell(level)}")
        dropped = Counter(row.judged_by for row in self.rows if not row.num_runs and row.status == "stopped")
        if dropped:
            counts = [f"{_count(dropped[kind])} {how}" for kind, how in _DROPPED.items() if dropped[kind]]
            sentences.append(f"Dropped without a whole run: {joined(counts)}")
        if self.earlier is not None:
            point, score = self.earlier
            sentences.append(f"An earlier sweep has a better point: {describe(point)} with {self.metric} {score:.4g}")
        return ". ".join(sentences) + "."

    def _best_in_words(self, best: Ranked) -> str:
        margin = "" if not self.margin else f" ± {self.margin:.2g}"
        diverged = f", {best.num_diverged} of them diverged" if best.num_diverged else ""
        so_far = "" if self.is_over else " so far"
        return (
            f"Best{so_far}: {describe(best.point)} ({trial_name(best.number)}) with {self.metric} "
            f"{best.score:.4g}{margin} ({best.runs_in_words}{diverged})"
        )

    def _others_in_words(self, best: Ranked) -> str:
        done = [row for row in self.rows[1:] if row.num_runs]
        if not done:
            return "no other point reached its end, so there is nothing to compare it with"
        if self.noise is None:
            return "whether its lead is chance is unknown: every point has one run (--set race.max_seeds=8 adds some)"
        if self.noise == 0:
            return "whether its lead is chance is unknown: the seeds of each point gave the same score"
        level = [row for row in done if row.in_noise]
        if not level:
            others = {1: "the other one", 2: "both others"}.get(len(done), f"all {len(done)} others")
            return f"its lead over {others} is more than chance"
        named = [_short(row, best) for row in level[:_NAMED]]
        if len(level) > _NAMED:
            named.append(f"{len(level) - _NAMED} more")
        return f"{_count(len(level))} other{'s' * (len(level) > 1)} cannot be told from it: {joined(named)}"


def _what_would_tell(level: Sequence[Ranked]) -> str:
    told = [row.runs_needed for row in level if row.runs_needed <= _MOST_RUNS]
    if not told:
        subject, either = ("it is", "either") if len(level) == 1 else ("they are", "any")
        return f"{subject} so close that more seeds would hardly tell: take {either}"
    which = "" if len(told) == len(level) else f" {_count(len(told))} of"
    runs = f"{max(told):g}"
    return f"about {runs} runs of each would tell{which} them apart (--set race.max_seeds={runs})"


def _short(row: Ranked, best: Ranked) -> str:
    """`0.1 / 0.0005 (t0003)`: the values in the order of the best point's."""
    if list(row.point) != list(best.point):
        return f"{describe(row.point)} ({trial_name(row.number)})"
    return f"{' / '.join(map(shown_value, row.point.values()))} ({trial_name(row.number)})"


def _count(number: int) -> str:
    words = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    return words[number] if number < len(words) else str(number)


def rank(space: Space, state: SweepState) -> Ranking:
    points: dict[int, list[TrialState]] = {}
    for trial in state.trials.values():
        points.setdefault(trial.number, []).append(trial)
    sign = 1.0 if space.higher_is_better else -1.0
    by_seed = scores_by_seed(space, state.trials.values())
    scores = {number: [score for score in runs if score is not None] for number, runs in by_seed.items()}
    gains = contenders(scores)
    best = next(iter(gains), None)
    noise, _ = pooled(scores.values())
    near = sorted(scores.values(), key=fmean, reverse=True)[: max(len(gains), 2)]
    if pooled(near)[0] is None:  # all of them have a single run
        near = list(scores.values())
    lead, deviation = max(map(fmean, scores.values()), default=0.0), pooled(near)[0] or 0.0
    rows = []
    for number, trials in points.items():
        row = _ranked(space, trials, [sign * score for score in scores.get(number, ())])
        if noise is not None and number in gains and number != best:
            needed = max(runs_to_tell(lead - row.score * sign, deviation, len(scores)), row.num_runs + 1)
            row = replace(row, possible_gain=gains[number], runs_needed=needed)
        rows.append(row)
    rows.sort(
        key=lambda row: (
            row.num_runs == 0,
            row.status in ("diverged", "failed"),
            0.0 if row.num_runs else -row.epoch,
            -sign * row.score if math.isfinite(row.score) else math.inf,
            row.number,
        )
    )
    margin = None if best is None else mean_margin(scores[best], near)
    is_over = all(trial.end is not None for trial in state.trials.values())
    known = state.began.known if state.began else ()
    earlier = max(known, key=lambda pair: sign * pair[1], default=None)
    if best is not None and earlier is not None and sign * earlier[1] <= lead:
        earlier = None
    return Ranking(space.metric, tuple(rows), noise, margin, is_over, earlier)


def _ranked(space: Space, trials: Sequence[TrialState], scores: Sequence[float]) -> Ranked:
    whole = [trial for trial in trials if trial.kind == "point"]
    first = whole[0] if whole else max(trials, key=lambda trial: trial.rung)
    # A score after a cooldown or a shorter schedule says more than one of a run that is not over.
    judged = [trial for trial in trials if trial.kind != "point" and trial.status == "finished"]
    last = max(judged, key=lambda trial: trial.rung, default=first)
    is_dead = first.status in ("diverged", "failed")
    newest = space.score(last.metrics) if last.metrics and not is_dead else math.nan
    return Ranked(
        number=first.number,
        point=first.point,
        trials=tuple(trial.name for trial in trials),
        status="stopped" if first.kind == "short" and first.status == "finished" else first.status,
        epoch=first.epoch if scores or is_dead or last is first else last.rung,
        score=fmean(scores) if scores else newest,
        num_runs=len(scores),
        num_diverged=sum(trial.status == "diverged" for trial in whole),
        spread=pooled([scores])[0],
        judged_by="point" if scores or is_dead else last.kind,
    )
