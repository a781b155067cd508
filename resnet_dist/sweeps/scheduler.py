"""Early stopping: a rule's verdict on a trial that has just reported, from the sweep's history. Pure.

The rules are those of Ray Tune's schedulers of the same names, and so are their decisions (the tests compare them on
random traces). Tune keeps its own in memory, as a second state beside the ledger that a killed driver loses; here each
decision is worked out from the ledger again.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from resnet_dist.config.space import Asha, Fifo, HyperBand, Median, SchedulerConfig
from resnet_dist.sweeps.ledger import Verdict


@dataclass(frozen=True)
class Seen:
    """One thing that happened to the first run of a point."""

    kind: Literal["added", "reported", "ended"]
    trial: str
    share: float = 0.0
    """Of the trial's own schedule that is done."""
    score: float = 0.0
    """Higher is better: a metric to be minimized is negated."""


@dataclass(frozen=True)
class Decision:
    verdict: Verdict = "go on"
    """About the trial that reported last."""
    resumable: frozenset[str] = frozenset()
    """Paused trials that may resume."""
    abandoned: Sequence[str] = ()
    """Trials that lost when their bracket was halved, while they were paused or with their own report."""


def decide(scheduler: SchedulerConfig, history: Sequence[Seen]) -> Decision:
    """The rule's decision after all of `history`, which is in the order in which it happened."""
    match scheduler:
        case Fifo():
            return Decision()
        case Asha():
            return Decision(asha(scheduler, history))
        case Median():
            return Decision(median(scheduler, history))
        case HyperBand():
            return hyperband(scheduler, history)


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


def asha(config: Asha, history: Sequence[Seen]) -> Verdict:
    """Asynchronous successive halving (Li et al. 2020, arXiv 1810.05934).

    At its first report at or after a rung, a trial continues if its score is not below the (1 - 1/reduction_factor)
    quantile of those that reached the rung before it. The first to reach a rung always continues.
    """
    shares = rung_shares(config)

    def rung_of(seen: Seen) -> int:
        # A trial that diverged before the first rung counts there with its worst score, so that it raises the bar.
        share = max(seen.share, shares[0]) if seen.kind == "ended" else seen.share
        return sum(share >= rung for rung in shares)

    now = history[-1]
    rung = rung_of(now)
    at_rung: dict[str, float] = {}
    for seen in history[:-1]:
        if seen.kind != "added" and rung_of(seen) == rung:
            at_rung.setdefault(seen.trial, seen.score)
    if rung == 0 or not at_rung or now.trial in at_rung:
        return "go on"
    cutoff = np.percentile(list(at_rung.values()), 100 * (1 - 1 / config.reduction_factor))
    return "stop" if now.score < cutoff else "go on"


def median(config: Median, history: Sequence[Seen]) -> Verdict:
    """The median stopping rule (Golovin et al. 2017, Google Vizier).

    A trial stops if its best score so far is below the median of the others' means, over their reports between the end
    of the grace period and now; only others that have come as far count.
    """
    now = history[-1]
    if now.share < config.grace:
        return "go on"
    reports: dict[str, list[Seen]] = defaultdict(list)
    for seen in history:
        if seen.kind != "added":
            reports[seen.trial].append(seen)
    best = max(seen.score for seen in reports.pop(now.trial))
    scores = [
        [seen.score for seen in other if config.grace <= seen.share <= now.share]
        for other in reports.values()
        if other[-1].share >= now.share
    ]
    means = [np.mean(other) for other in scores if other]
    return "stop" if len(means) >= config.min_trials and np.median(means) > best else "go on"


@dataclass
class _Bracket:
    """Trials that are halved together."""

    size: int
    """Trials that it takes, and after a halving those that it keeps."""
    milestone: int
    """Units of time after which the next halving is due."""
    halvings: int
    """Still to come."""
    newest: dict[str, Seen | None] = field(default_factory=dict)
    """Of the trials that are in it."""
    was_halved: bool = False


def hyperband(config: HyperBand, history: Sequence[Seen]) -> Decision:
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
        if any(seen is None or seen.share * units < bracket.milestone for seen in bracket.newest.values()):
            return "wait"
        bracket.was_halved = True
        bracket.halvings -= 1
        bracket.size = math.ceil(bracket.size / factor)
        bracket.milestone = int(min(bracket.milestone * factor, units))
        ordered = sorted((seen for seen in bracket.newest.values() if seen), key=lambda seen: seen.score)
        kept = {seen.trial for seen in ordered[-bracket.size :]}
        for loser in ordered[: -bracket.size]:
            del bracket.newest[loser.trial]
            abandoned.append(loser.trial)
        # One that has come to the next milestone already waits there.
        early = {seen.trial for seen in ordered if seen.share * units < bracket.milestone}
        resumable.update(kept & early)
        if reporting in kept:
            return "go on" if reporting in early else "wait"
        return "stop"

    verdict: Verdict = "go on"
    for seen in history:
        if seen.kind == "added":
            if not brackets or len(brackets[-1].newest) == brackets[-1].size:
                brackets.append(_Bracket(*starts[len(brackets) % len(starts)]))
            bracket_of[seen.trial] = brackets[-1]
            brackets[-1].newest[seen.trial] = None
            continue
        bracket = bracket_of[seen.trial]
        resumable.discard(seen.trial)
        if seen.kind == "reported":
            bracket.newest[seen.trial] = seen
            is_early = bracket.halvings == 0 or seen.share * units < bracket.milestone
            verdict = "go on" if is_early else halve(bracket, seen.trial)
            resumable.discard(seen.trial)
        else:
            bracket.newest.pop(seen.trial, None)
            if bracket.halvings and not bracket.was_halved:  # as Tune does: later the next report halves
                halve(bracket, None)
    return Decision(verdict, frozenset(resumable), abandoned)
