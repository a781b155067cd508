"""What a sweep still has to train, and how long that will take. Pure."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median

from resnet_dist.config.recipe import cooldown_steps
from resnet_dist.config.space import Annealed, Asha, Halving, HyperBand, Record, Space
from resnet_dist.sweeps.ledger import SweepState, TrialState
from resnet_dist.sweeps.scheduler import judged_epoch, rung_shares


@dataclass(frozen=True)
class PointCost:
    """What one point costs, in epochs."""

    length: float
    """Of its whole schedule."""
    rungs: tuple[float, ...]
    """The epochs after which some points are dropped. With `halving`: the lengths of the short schedules."""
    stages: tuple[float, ...]
    """What is trained from each rung to the next, and from the last one to the end: cooldowns and short schedules
    included."""


def point_cost(space: Space, length: float, steps_per_epoch: int, eval_every_epochs: int) -> PointCost:
    """
    Args:
        length: epochs of the point's whole schedule.
    """
    scheduler = space.scheduler
    judged = [judged_epoch(share, length, eval_every_epochs) for share in rung_shares(scheduler)]
    cooldowns = [0.0] * len(judged)
    if isinstance(scheduler, Annealed | Record):
        cooldowns = [cooldown_steps(scheduler.cooldown, epoch * steps_per_epoch) / steps_per_epoch for epoch in judged]
    match scheduler:
        case Halving(rungs=rungs):
            return PointCost(length, tuple(map(float, rungs[:-1])), (*map(float, rungs[:-1]), length))
        case Record(shorts=shorts):
            return PointCost(length, (), (length + sum(cooldowns) + sum(shorts),))
        case Asha() | HyperBand() | Annealed():
            between = [end - start for start, end in pairwise([0.0, *judged, length])]
            stages = [epochs + more for epochs, more in zip(between, [*cooldowns, 0.0], strict=True)]
            return PointCost(length, tuple(judged), tuple(stages))
        case _:
            return PointCost(length, (), (length,))


def contenders(space: Space, num_points: int, num_rungs: int) -> list[float]:
    """How many points train in each stage of a new sweep if none diverges.

    Exact for `annealed` and `halving`; for `asha` and `hyperband` what it comes to in the long run, though the first
    points at a rung always continue, so that a short sweep trains more.
    """
    numbers = [float(num_points)]
    for _ in range(num_rungs):
        numbers.append(_num_kept(space, numbers[-1]))
    return numbers


def _num_kept(space: Space, num_contenders: float) -> float:
    match space.scheduler:
        case Annealed(reduction_factor=factor) | Halving(reduction_factor=factor):
            return float(math.ceil(num_contenders / factor))
        case Asha(reduction_factor=factor) | HyperBand(reduction_factor=factor):
            return max(num_contenders / factor, 1.0)
        case _:
            return num_contenders


def epochs_to_come(space: Space, state: SweepState, costs: Mapping[int, PointCost]) -> list[list[float]]:
    """The epochs of each piece of training that is still to come: one list for each stage, and one for further seeds.

    Rounds of a race are not known before they begin.

    Args:
        costs: by number, of all points that the sweep will try.
    """
    runs = _runs_by_point(state)
    positions = _positions(space, runs, costs)
    num_rungs = len(next(iter(costs.values())).rungs) if costs else 0
    coming: list[list[float]] = []
    arriving = 0.0
    """How many more points will come to this stage."""
    for stage in range(num_rungs + 1):
        here = [number for number, (passed, is_open) in positions.items() if is_open and passed == stage]
        cost = fmean(costs[number].stages[stage] for number in positions)
        coming.append([_left(costs[number], stage, runs.get(number, ())) for number in here] + _split(arriving, cost))
        if stage < num_rungs:
            come, beyond = (sum(passed >= rung for passed, _ in positions.values()) for rung in (stage, stage + 1))
            kept = _num_kept(space, come + arriving)
            arriving = min(max(kept - beyond, 0.0), len(here) + arriving)
    further = [run for run in state.trials.values() if run.seed_number and run.end is None]
    seeds = [costs[run.number].length - run.epoch for run in further]
    for number in here if space.seeds > 1 else ():
        seeds += [costs[number].length] * (space.seeds - 1)
    if arriving and space.seeds > 1:
        seeds += _split(arriving * (space.seeds - 1), fmean(cost.length for cost in costs.values()))
    return [*coming, seeds]


def _runs_by_point(state: SweepState) -> dict[int, list[TrialState]]:
    """The runs of each point without those of further seeds."""
    runs: dict[int, list[TrialState]] = defaultdict(list)
    for trial in state.trials.values():
        if not trial.seed_number:
            runs[trial.number].append(trial)
    return runs


def _positions(
    space: Space, runs: Mapping[int, Sequence[TrialState]], costs: Mapping[int, PointCost]
) -> dict[int, tuple[int, bool]]:
    """How many rungs each point has passed, and whether it may still train."""
    if not isinstance(space.scheduler, Halving):
        return {number: _position(cost, runs.get(number, ())) for number, cost in costs.items()}
    places = {epochs: place for place, epochs in enumerate(space.scheduler.rungs)}
    farthest = {number: max(known, key=lambda run: run.stage) for number, known in runs.items()}
    top = len(places) - 1
    passed = {n: top if run.kind == "point" else places[int(run.rung)] for n, run in farthest.items()}
    most = max(passed.values(), default=0)
    # A short schedule that is over has its point wait for the rung's decision, after which the next one is added.
    is_open = {
        number: run.end is None or (run.status == "finished" and passed[number] == most < top)
        for number, run in farthest.items()
    }
    return {number: (passed.get(number, 0), is_open.get(number, True)) for number in costs}


def _position(cost: PointCost, runs: Sequence[TrialState]) -> tuple[int, bool]:
    passed = 0
    for run in runs:
        if run.is_first_run:
            passed = sum(run.epoch >= rung for rung in cost.rungs)
            passed -= run.verdict != "go on" and passed > 0  # it waits at the rung, or has lost there
    return passed, not runs or any(run.end is None for run in runs)


def _left(cost: PointCost, stage: int, runs: Sequence[TrialState]) -> float:
    """Epochs of a point up to the end of `stage`."""
    return max(sum(cost.stages[: stage + 1]) - sum(run.spent_epochs for run in runs), 0.0)


def _split(number: float, epochs: float) -> list[float]:
    """`number` times `epochs`; the last one is a part if `number` is not whole."""
    rest = (number - int(number)) * epochs
    return [epochs] * int(number) + ([rest] if rest else [])


@dataclass(frozen=True)
class Speed:
    """Of one trial, evaluations included."""

    epoch_s: float
    start_s: float = 0.0
    """What a start takes besides its epochs."""


def measured_speed(state: SweepState) -> Speed | None:
    """The median over all trials so far; None before the second evaluation of a trial, or its end."""
    trials = [trial for trial in state.trials.values() if trial.reports]
    between = [
        (after.time_s - before.time_s) / (after.epoch - before.epoch)
        for trial in trials
        for before, after in pairwise(trial.reports)
        if before.verdict == "go on"  # else it waited
    ]
    over = [trial for trial in trials if trial.end is not None and trial.spent_epochs > 0]
    if not between:
        return Speed(median(trial.seconds / trial.spent_epochs for trial in over)) if over else None
    epoch_s = median(between)
    starts = [trial.seconds - epoch_s * trial.spent_epochs for trial in over]
    return Speed(epoch_s, max(median(starts), 0.0) if starts else 0.0)


def seconds_left(space: Space, coming: Sequence[Sequence[float]], speed: Speed, at_once: int) -> float:
    """The time until all is trained, with the longest first on whichever of `at_once` places is free.

    Stages follow one another where a rung waits for all its points; elsewhere they overlap.
    """
    rungs_wait = isinstance(space.scheduler, Annealed | Halving)
    stages = coming if rungs_wait else [[epochs for stage in coming for epochs in stage]]
    total_s = 0.0
    for stage in stages:
        busy_s = [0.0] * max(at_once, 1)
        for epochs in sorted(stage, reverse=True):
            if epochs > 0:
                heapq.heapreplace(busy_s, busy_s[0] + speed.start_s + epochs * speed.epoch_s)
        total_s += max(busy_s)
    return total_s
