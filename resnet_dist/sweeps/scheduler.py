"""Early stopping: a rule's verdict on a trial that has just reported, from the sweep's history. Pure.

The rules decide as Ray Tune's schedulers of the same names do (the tests compare them on random histories). Tune's keep
their state in memory, where a killed driver loses it; here every decision is worked out from the ledger again.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from resnet_dist.config.space import Annealed, Asha, Fifo, Halving, HyperBand, Median, Record, SchedulerConfig
from resnet_dist.sweeps.ledger import Verdict


@dataclass(frozen=True)
class SchedulerEvent:
    """What happened to the first run of a point, as a scheduler sees it.

    judged: its cooldown or its short schedule has ended, with a score.
    """

    kind: Literal["added", "reported", "judged", "ended"]
    trial: str
    """The point's first run, even if there is only a short schedule so far."""
    share: float = 0.0
    """The part of its own schedule that the trial has completed."""
    score: float = 0.0
    """Higher is better: a metric to be minimized is negated. -inf: it diverged or failed, where a rule must know."""
    position: tuple[float, ...] = ()
    """Of an added point in the space: see `points.position`."""


@dataclass(frozen=True)
class Decision:
    verdict: Verdict = "go on"
    """On the trial that reported last."""
    resumable: frozenset[str] = frozenset()
    """Paused trials that may resume."""
    abandoned: Sequence[str] = ()
    """Trials that have lost: their bracket was halved, while they were paused or by their own report."""
    promoted: Sequence[frozenset[str]] = ()
    """For each rung of `halving` but the last, the trials that have come beyond it."""


def decide(scheduler: SchedulerConfig, history: Sequence[SchedulerEvent]) -> Decision:
    """The rule's decision after all of `history`, in the order in which it happened."""
    match scheduler:
        case Fifo():
            return Decision()
        case Asha():
            return Decision(asha(scheduler, history))
        case Median():
            return Decision(median(scheduler, history))
        case HyperBand():
            return hyperband(scheduler, history)
        case Annealed():
            return annealed(scheduler, history)
        case Halving(rungs=rungs, reduction_factor=factor, smooth=smooth):
            kept = [frozenset(rung.kept) for rung in halved(len(rungs) - 1, factor, history, smooth=smooth)]
            return Decision(promoted=kept)
        case Record():
            return record(scheduler, history)


def rung_shares(scheduler: SchedulerConfig) -> list[float]:
    """Where on its schedule a trial is judged, or first judged, as shares of the schedule, ascending."""
    match scheduler:
        case Asha(first_rung=share, rungs=rungs, reduction_factor=factor):
            return [share * factor**rung for rung in range(rungs)]
        case HyperBand(reduction_factor=factor):
            return [1 / factor**2, 1 / factor]
        case Median(grace=share):
            return [share]
        case Annealed(rungs=shares) | Record(cooldowns=shares):
            return list(shares)
        case _:
            return []


def judged_epoch(share: float, epochs_per_trial: float, eval_every_epochs: int) -> float:
    """The epoch of the first evaluation at or after a rung: a trial can be judged there only.

    >>> judged_epoch(0.11, 24, 1), judged_epoch(0.11, 24, 5)
    (3.0, 5.0)
    """
    evaluations = math.ceil(share * epochs_per_trial / eval_every_epochs - 1e-9)
    return float(min(evaluations * eval_every_epochs, epochs_per_trial))


def asha(config: Asha, history: Sequence[SchedulerEvent]) -> Verdict:
    """Asynchronous successive halving (Li et al. 2020, arXiv 1810.05934).

    At its first report at or after a rung, a trial continues if its score is not below the (1 - 1/reduction_factor)
    quantile of those that reached the rung before it. The first to reach a rung always continues.
    """
    shares = rung_shares(config)

    def rung_of(event: SchedulerEvent) -> int:
        # A trial that diverged before the first rung counts there with its worst score, so that it raises the bar.
        share = max(event.share, shares[0]) if event.kind == "ended" else event.share
        return sum(share >= rung for rung in shares)

    now = history[-1]
    rung = rung_of(now)
    at_rung: dict[str, float] = {}
    for event in history[:-1]:
        if event.kind != "added" and rung_of(event) == rung:
            at_rung.setdefault(event.trial, event.score)
    if rung == 0 or not at_rung or now.trial in at_rung:
        return "go on"
    cutoff = np.percentile(list(at_rung.values()), 100 * (1 - 1 / config.reduction_factor))
    return "stop" if now.score < cutoff else "go on"


def median(config: Median, history: Sequence[SchedulerEvent]) -> Verdict:
    """The median stopping rule (Golovin et al. 2017, Google Vizier).

    A trial stops if its best score so far is below the median of the others' means, over their reports between the end
    of the grace period and now; only others that have come as far count.
    """
    now = history[-1]
    if now.share < config.grace:
        return "go on"
    reports: dict[str, list[SchedulerEvent]] = defaultdict(list)
    for event in history:
        if event.kind != "added":
            reports[event.trial].append(event)
    best = max(event.score for event in reports.pop(now.trial))
    scores = [
        [event.score for event in other if config.grace <= event.share <= now.share]
        for other in reports.values()
        if other[-1].share >= now.share
    ]
    means = [sum(other) / len(other) for other in scores if other]
    return "stop" if len(means) >= config.min_trials and statistics.median(means) > best else "go on"


@dataclass
class Rung:
    """Points that are halved together, once each has a score there."""

    contenders: list[str] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)
    """Those that have come beyond it."""

    @property
    def is_decided(self) -> bool:
        return len(self.scores) == len(self.contenders)


def halved(num_rungs: int, factor: float, history: Sequence[SchedulerEvent], *, smooth: bool = False) -> list[Rung]:
    """Synchronous successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943) by the scores of "judged" events.

    A rung keeps the best ceil(n / factor) of its n contenders, of equal ones those that were added first, and none that
    diverged. Points that are added later are judged together with those before them; who was kept stays.

    Args:
        smooth: judge by `smoothed` scores.
    """
    rungs = [Rung() for _ in range(num_rungs)]
    at: dict[str, int] = {}
    """The rung that each trial's next score is for."""
    number: dict[str, int] = {}
    positions: dict[str, tuple[float, ...]] = {}
    for event in history:
        if event.kind == "added":
            number[event.trial], at[event.trial], positions[event.trial] = len(number), 0, event.position
            rungs[0].contenders.append(event.trial)
            continue
        index = at[event.trial]
        if event.kind == "reported" or index == num_rungs or event.trial not in rungs[index].contenders:
            continue
        # One that ends before it has its score there has diverged or failed.
        rungs[index].scores[event.trial] = event.score if event.kind == "judged" else -math.inf
        at[event.trial] += 1
        if rungs[index].is_decided:
            scores, contenders = rungs[index].scores, rungs[index].contenders
            if smooth:
                near = smoothed([positions[trial] for trial in contenders], [scores[trial] for trial in contenders])
                scores = dict(zip(contenders, near, strict=True))
            best = sorted(contenders, key=lambda trial: (-scores[trial], number[trial]))
            kept = {trial for trial in best[: math.ceil(len(best) / factor)] if scores[trial] > -math.inf}
            if index + 1 < num_rungs:
                rungs[index + 1].contenders += sorted(kept - rungs[index].kept, key=number.__getitem__)
            rungs[index].kept |= kept
    return rungs


_LENGTH = 0.5
"""Over which share of a parameter's range scores are alike."""
_NOISE = 0.3
"""Variance of one run's noise, as a share of the variance between points. A third or thrice as much is hardly worse."""


def smoothed(positions: Sequence[Sequence[float]], scores: Sequence[float]) -> list[float]:
    """What each score would be without its run's noise, by the scores of the points near it.

    Recipes alike end alike, but one run's noise is as large as the differences between good points. The mean of a
    Gaussian process with the Matern 5/2 covariance (Rasmussen and Williams 2006, equations 2.25 and 4.17).

    Args:
        positions: of each point, in the unit cube.
        scores: -inf stays as it is, and is not seen by the others.
    """
    raw = np.array(scores)
    alive = np.isfinite(raw)
    if not alive.any():
        return list(scores)
    x, y = np.array(positions)[alive], raw[alive]
    low, middle, high = np.percentile(y, [25, 50, 75])
    y = np.maximum(y, middle - 2 * (high - low))  # one point that broke down must not bend the surface
    distance = math.sqrt(5) / _LENGTH * np.linalg.norm(x[:, None] - x[None, :], axis=2)
    covariance = (1 + distance + distance**2 / 3) * np.exp(-distance)
    weights = np.linalg.solve(covariance + _NOISE * np.eye(len(y)), y - y.mean())
    raw[alive] = np.round(y.mean() + covariance @ weights, 9)  # equal scores stay equal on any machine
    return [float(score) for score in raw]


def annealed(config: Annealed, history: Sequence[SchedulerEvent]) -> Decision:
    """Successive halving by the scores after a cooldown: a trial waits at each rung until all have theirs."""
    rungs = halved(len(config.rungs), config.reduction_factor, history, smooth=config.smooth)
    passed = Counter(trial for rung in rungs for trial in rung.kept)
    lost = [trial for rung in rungs if rung.is_decided for trial in rung.contenders if trial not in rung.kept]
    return _waiting(config.rungs, history, passed, lost)


def record(config: Record, history: Sequence[SchedulerEvent]) -> Decision:
    """Nothing stops: a trial waits at each rung until its own cooldown is over."""
    return _waiting(config.cooldowns, history, Counter(event.trial for event in history if event.kind == "judged"))


def _waiting(
    shares: Sequence[float],
    history: Sequence[SchedulerEvent],
    passed: Counter[str],
    lost: Sequence[str] = (),
) -> Decision:
    """A trial that comes to a rung waits, until it has passed as many rungs as it has come to.

    Args:
        shares: where the rungs are on the schedule.
        passed: how many rungs are behind each trial.
        lost: trials that never continue.
    """
    farthest: dict[str, float] = {}
    before = 0.0
    """How far the trial that reported last had come before."""
    for event in history:
        if event.kind == "reported":
            before = farthest.get(event.trial, 0.0)
            farthest[event.trial] = max(before, event.share)
    reached = {trial: bisect_right(shares, share) for trial, share in farthest.items()}
    now = history[-1]
    waits = now.kind == "reported" and reached[now.trial] > bisect_right(shares, before)
    resumable = frozenset(trial for trial, rungs in reached.items() if passed[trial] >= rungs)
    return Decision("wait" if waits else "go on", resumable, lost)


@dataclass
class _Bracket:
    """Trials that are halved together."""

    size: int
    """How many trials it takes, and after a halving how many it keeps."""
    milestone: int
    """Units of time after which the next halving is due."""
    halvings: int
    """How many are still to come."""
    newest: dict[str, SchedulerEvent | None] = field(default_factory=dict)
    """Each trial's newest report."""
    was_halved: bool = False


def hyperband(config: HyperBand, history: Sequence[SchedulerEvent]) -> Decision:
    """HyperBand (Li et al. 2018, arXiv 1603.06560), in the variant of Ray Tune.

    Brackets are filled one after the other, in the order in which trials are added. A trial that reaches its bracket's
    milestone waits for the others; the last one's report keeps the best 1/reduction_factor. Time counts in whole units,
    reduction_factor**2 to a schedule, so the rungs are at 1/reduction_factor**2 and 1/reduction_factor. What is left
    after a bracket's last halving runs to its end; Tune would stop it before where reduction_factor is not whole.
    """
    factor = config.reduction_factor
    units = round(factor**2)
    kinds = round(math.log(units) / math.log(factor)) + 1
    starts = [
        (math.ceil(kinds / (halvings + 1) * factor**halvings), int(units * factor**-halvings), halvings)
        for halvings in range(kinds)
        if int(units * factor**-halvings)
    ]
    brackets: list[_Bracket] = []
    bracket_of: dict[str, _Bracket] = {}
    resumable: set[str] = set()
    abandoned: list[str] = []

    def halve(bracket: _Bracket, reporting: str | None) -> Verdict:
        """Halves the bracket if all its trials have come to its milestone. The verdict is that for `reporting`."""
        if any(event is None or event.share * units < bracket.milestone for event in bracket.newest.values()):
            return "wait"
        bracket.was_halved = True
        bracket.halvings -= 1
        bracket.size = math.ceil(bracket.size / factor)
        bracket.milestone = int(min(bracket.milestone * factor, units))
        ordered = sorted((event for event in bracket.newest.values() if event), key=lambda event: event.score)
        kept = {event.trial for event in ordered[-bracket.size :]}
        for loser in ordered[: -bracket.size]:
            del bracket.newest[loser.trial]
            abandoned.append(loser.trial)
        # One that has come to the next milestone already waits there.
        early = {event.trial for event in ordered if event.share * units < bracket.milestone}
        resumable.update(kept & early)
        if reporting in kept:
            return "go on" if reporting in early else "wait"
        return "stop"

    verdict: Verdict = "go on"
    for event in history:
        if event.kind == "added":
            if not brackets or len(brackets[-1].newest) == brackets[-1].size:
                brackets.append(_Bracket(*starts[len(brackets) % len(starts)]))
            bracket_of[event.trial] = brackets[-1]
            brackets[-1].newest[event.trial] = None
            continue
        bracket = bracket_of[event.trial]
        resumable.discard(event.trial)
        if event.kind == "reported":
            bracket.newest[event.trial] = event
            is_early = bracket.halvings == 0 or event.share * units < bracket.milestone
            verdict = "go on" if is_early else halve(bracket, event.trial)
            resumable.discard(event.trial)
        else:
            bracket.newest.pop(event.trial, None)
            if bracket.halvings and not bracket.was_halved:  # as Tune does: later the next report halves
                halve(bracket, None)
    return Decision(verdict, frozenset(resumable), abandoned)
