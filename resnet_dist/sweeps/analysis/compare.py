"""`tune compare`: what schedulers would have cost and picked, replayed on recorded curves beside random search.

The decisions are those of a real sweep (`sweep.Sweep`); evaluations, cooldowns and short schedules are read from
ledgers. So a scheduler is chosen by evidence.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from data_prep.shown import markdown_table
from resnet_dist.config.loading import space_from_tree
from resnet_dist.config.recipe import recipe_changes
from resnet_dist.config.space import Annealed, Halving, Record, SchedulerConfig, Space
from resnet_dist.errors import UserError
from resnet_dist.sweeps.analysis.ranking import rank
from resnet_dist.sweeps.ledger import Ledger, SweepState, TrialKind, TrialOutcome, TrialState, spent_epochs, trial_name
from resnet_dist.sweeps.points import Point, describe
from resnet_dist.sweeps.racing import CONFIDENCE
from resnet_dist.sweeps.scheduler import rung_shares
from resnet_dist.sweeps.sweep import Sweep

Array = NDArray[np.float64]
Integers = NDArray[np.int64]
_MOST_RESAMPLES = 100
"""Of studies and points, for the intervals."""


@dataclass(frozen=True)
class Interval:
    """A mean over draws and studies, with a 95 % confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class Row:
    """One rule. Regret: how much better than the point it picks the best point of the draw is."""

    rule: str
    epochs: float
    """Mean, with those of cooldowns and short schedules."""
    share: float
    """Of the epochs of the draw's points to their end."""
    regret: Interval
    median: float
    below_90: float
    """90 % of the draws have at most this regret."""
    hits: float
    """How often it picks the best point, or one with the same score."""
    regret_elsewhere: Interval | None
    """By the picked point's other runs (other data, other seeds), which the rule did not see, against the point that is
    best by the mean over all runs. None: there are no others."""
    by_study: tuple[float, ...]
    """Mean regret."""
    difference: Interval | None = None
    """Its regret minus that of random search with as many epochs."""
    ratio: float | None = None
    """Its mean regret as a share of that one's; None also if that is 0."""
    random_share: float | None = None
    """Share of all epochs that random search needs for the same regret."""


@dataclass(frozen=True)
class EarlyScore:
    """How well scores from before the end rank the points: the rank correlation with their final scores."""

    what: str
    """Where they come from: the run as it is, a cooldown, a short schedule."""
    epoch: float
    """Of the run, at which they were taken or forked; of a short schedule its length."""
    correlation: float
    """Of all points, mean over the studies."""
    among_better: float
    """Of the better half by the final score."""


@dataclass(frozen=True)
class Comparison:
    head: str
    rows: tuple[Row, ...]
    early_scores: tuple[EarlyScore, ...]
    studies: tuple[str, ...]
    notes: tuple[str, ...]
    """Each study's best point, and how the intervals were made."""

    def markdown(self) -> str:
        has_others = self.rows[0].regret_elsewhere is not None
        columns = [
            *("rule", "epochs", "share of all", "regret, mean", "median", "90 % are below", "the best point itself"),
            *(("regret by other runs",) if has_others else ()),
            *("against random search", "random search needs"),
        ]
        lines = [self.head, "", markdown_table(columns, [_cells(row, has_others) for row in self.rows])]
        if len(self.studies) > 1:
            by_study = [[row.rule, *(f"{regret:.2f}" for regret in row.by_study)] for row in self.rows]
            lines += ["", markdown_table(["regret, mean, of each study", *self.studies], by_study)]
        if self.early_scores:
            scores = {(s.what, s.epoch): f"{s.correlation:.2f} / {s.among_better:.2f}" for s in self.early_scores}
            epochs = sorted({epoch for _, epoch in scores})
            columns = [
                "rank correlation with the final score: all points / better half",
                *map("epoch {:g}".format, epochs),
            ]
            sources = dict.fromkeys(what for what, _ in scores)
            by_source = [[what, *(scores.get((what, epoch), "") for epoch in epochs)] for what in sources]
            lines += ["", markdown_table(columns, by_source)]
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes)])


def _cells(row: Row, has_others: bool) -> list[str]:
    return [
        row.rule,
        f"{row.epochs:.1f}",
        f"{row.share:.0%}",
        str(row.regret),
        f"{row.median:.2f}",
        f"{row.below_90:.2f}",
        f"{row.hits:.0%}",
        *([str(row.regret_elsewhere)] if has_others else []),
        ("" if row.ratio is None else f"{row.ratio:.0%}, ") + str(row.difference or ""),
        "" if row.random_share is None else f"{row.random_share:.0%}",
    ]


def compare(
    sweeps: Sequence[SweepState],
    schedulers: Sequence[str],
    *,
    num_draws: int,
    at_once: int = 1,
    num_points: int | None = None,
    orders_seed: int = 0,
) -> Comparison:
    """Plays each scheduler on the recorded curves. Raises UserError unless all that it would see were recorded.

    Each draw is some of the points in an order of its own, played on one of the studies; the draws take turns among
    studies and recorded seeds. Random search is not played: the chance with which it picks a point is known, and
    between two whole numbers of points it is a mixture of both.

    Args:
        sweeps: those on the same data are one study.
        schedulers: a space's `scheduler` in YAML, each.
        num_draws: how many draws are played.
        at_once: how many trials run at the same time.
        num_points: of a draw. None: two thirds of all; with all points, a rule whose verdicts do not depend on the
            order would see the same in every draw.
        orders_seed: with another seed the draws are others.
    """
    studies = _studies(sweeps)
    first = studies[0]
    num_recorded = len(first.numbers)
    size = num_points or max(round(2 * num_recorded / 3), min(2, num_recorded))
    if size > num_recorded:
        raise UserError(f"compare: draws of {size} points, but {num_recorded} were recorded; give fewer with --points")
    spaces = {words: space_from_tree("--scheduler", first.replayable, [f"scheduler={words}"]) for words in schedulers}
    for study in studies:
        study.require_recorded({words: space.scheduler for words, space in spaces.items()})
    # Short schedules and cooldowns are recorded for the first seed only.
    only_first = any(_cooldowns(space.scheduler) or _shorts(space.scheduler) for space in spaces.values())
    random = np.random.default_rng(orders_seed)

    def orders(points: Integers) -> Integers:
        return random.permuted(points, axis=-1)[..., :size]

    in_turn = np.arange(num_draws)[:, None] % len(studies)
    every_point = np.tile(np.arange(num_recorded), (num_draws, 1, 1))
    draws = _Draws(studies, orders(every_point), in_turn, only_first_seed=only_first)
    # A resample may have a point or a study twice; its orders take turns among its studies.
    num_resamples = min(num_draws, _MOST_RESAMPLES)
    num_orders = num_draws // num_resamples
    points = random.integers(num_recorded, size=(num_resamples, 1, num_recorded))
    played = random.integers(len(studies), size=(num_resamples, len(studies)))
    played = played[:, np.arange(num_orders) % len(studies)]
    resampled = _Draws(studies, orders(np.repeat(points, num_orders, axis=1)), played, only_first_seed=only_first)

    everything = draws.random_search(draws.all_epochs), resampled.random_search(resampled.all_epochs)
    rows = [draws.row("every point to its end", *everything)]
    for words, space in spaces.items():
        result, again = (each.play(space, at_once) for each in (draws, resampled))
        equal = draws.random_search(result.epochs), resampled.random_search(again.epochs)
        rows.append(draws.row(words, result, again, equal))
        rows.append(draws.row("random search, as many epochs", *equal))
    counted = f"{len(studies)} {'study' if len(studies) == 1 else 'studies'} of {num_recorded} points"
    chosen = f"all {size}" if size == num_recorded else f"{size} of the"
    return Comparison(
        f"{counted}, {first.length:g} epochs each; {num_draws} draws of {chosen} points (--orders-seed {orders_seed})"
        f"{', on each study in turn' if len(studies) > 1 else ''}, {at_once} at once; {first.space.metric}.",
        tuple(rows),
        _early_scores(studies, {share for space in spaces.values() for share in rung_shares(space.scheduler)}),
        tuple(study.name for study in studies),
        (*(f"{study.name}: {study.verdict}" for study in studies), _how_sure(studies, num_resamples)),
    )


# ---- what was recorded -----------------------------------------------------------------------------------------------


def _studies(sweeps: Sequence[SweepState]) -> list[_Study]:
    """By data and seed of the base recipe. Raises UserError if the sweeps cannot be compared."""
    grouped: dict[tuple[str, str], list[SweepState]] = {}
    names = []
    for state in sweeps:
        if state.began is None:
            raise UserError("compare: no sweep was started here")
        names.append(state.began.name)
        if changed := recipe_changes(_what_is_equal(sweeps[0]), _what_is_equal(state)):
            raise UserError(
                f"compare: {names[-1]} is not {names[0]} on other data or with another scheduler: "
                f"{', '.join(changed[:8])}; compare them one by one"
            )
        grouped.setdefault((state.began.data_digest, str(state.began.base.get("seed"))), []).append(state)
    return [_Study(states) for states in grouped.values()]


def _what_is_equal(state: SweepState) -> dict[str, Any]:
    """What sweeps that are compared have in common: all but data, seed and scheduler."""
    assert state.began is not None
    space, base = state.began.space, state.began.base
    of_data = ("dataset", "mean", "std")
    data = {key: value for key, value in base.get("data", {}).items() if key not in of_data}
    return {
        "proxy": {key: value for key, value in space["proxy"].items() if key.removeprefix("data.") not in of_data},
        "base": {**base, "data": data, "seed": None},
        "metric": space["metric"],
        "points": {trial_name(trial.number): describe(trial.point) for trial in state.trials.values()},
    }


class _Study:
    """Runs of the same points on the same data, from one or more sweeps; a run is exact, so they agree."""

    def __init__(self, sweeps: Sequence[SweepState]) -> None:
        self._runs: dict[tuple[str, float | str], TrialState] = {}
        """By name, and by what else decides a cooldown or a short schedule."""
        names: list[str] = []
        points: dict[int, Point] = {}
        for state in sweeps:
            assert state.began is not None
            names.append(state.began.name)
            scheduler = Space.model_validate(state.began.space).scheduler
            for trial in state.trials.values():
                points[trial.number] = trial.point
                if trial.status in ("finished", "diverged"):
                    self._runs.setdefault((trial.name, _variant(scheduler, trial.kind)), trial)
        began = sweeps[0].began
        assert began is not None
        self.name, self.points, self.numbers = "+".join(names), points, sorted(points)
        # Without a budget: the replay's clock counts calls. Without a model that proposes points: they are known.
        without = {"budget", "seeds", "race", *({"search"} if began.space["search"]["kind"] in ("tpe", "cma") else ())}
        self.replayable = {key: value for key, value in began.space.items() if key not in without}
        self.space = Space.model_validate(self.replayable)
        self.verdict = rank(self.space, sweeps[0]).verdict()
        self._sign = 1 if self.space.higher_is_better else -1
        unknown = [name for number in self.numbers if ((name := trial_name(number)), "") not in self._runs]
        finished = [trial for trial in self._runs.values() if trial.is_first_run and trial.status == "finished"]
        if unknown or not finished:
            raise UserError(
                f"compare: {self.name}: needs a sweep with scheduler fifo or record whose points have all reached "
                f"their end; not so: {', '.join(unknown[:10]) or 'no trial has finished'}"
            )
        self.length = finished[0].epoch
        # Seeds that every point has; one that diverged with its first seed is not run with others.
        counts = [
            next(seed for seed in itertools.count(1) if (trial_name(run.number, seed), "") not in self._runs)
            for run in finished
        ]
        self.num_seeds = min(counts)
        self.scores = self._of_each(lambda run: self._sign * self._score(run))
        self.epochs = self._of_each(lambda run: run.epoch)

    def require_recorded(self, schedulers: Mapping[str, SchedulerConfig]) -> None:
        """Raises UserError, with how to record them, unless all short schedules and cooldowns are here.

        Args:
            schedulers: by the words with which they were given.
        """
        for words, scheduler in schedulers.items():
            if isinstance(scheduler, Halving) and scheduler.rungs[-1] != self.length:
                raise UserError(
                    f"compare: {words}: the last of its rungs must be the {self.length:g} epochs of {self.name}"
                )
            wanted = [
                (trial_name(number, 0, "short", rung), _variant(scheduler, "short"))
                for rung, number in itertools.product(_shorts(scheduler), self.numbers)
            ]
            for number, share in itertools.product(self.numbers, _cooldowns(scheduler)):
                epochs = [report.epoch for report in self._whole(number, 0).reports]
                rung = next((epoch for epoch in epochs if epoch / self.length >= share), self.length)
                if rung < self.length:
                    wanted.append((trial_name(number, 0, "cooldown", rung), _variant(scheduler, "cooldown")))
            if missing := [name for name, variant in dict.fromkeys(wanted) if (name, variant) not in self._runs]:
                raise UserError(
                    f"compare: {words}: {self.name} did not record what it sees ({', '.join(missing[:5])}, "
                    f"{len(missing)} in all); record it with a sweep of the same space and "
                    f"`scheduler: {_recorder(scheduler, list(schedulers.values()))}`"
                )

    def play(self, space: Space, order: Sequence[int], seed: int, at_once: int) -> tuple[int, float]:
        """A sweep with the space's scheduler: the place in `order` of the point that it picks, and its epochs.

        Args:
            order: indices of the points, in the order of trials; running ones report one after the other.
            seed: that of the runs it sees.
        """
        clock = itertools.count()
        sweep = Sweep(
            space,
            Ledger(),
            planned=[self.points[self.numbers[place]] for place in order],
            total_epochs=lambda point: self.length,
            now_s=lambda: float(next(clock)),
        )
        sweep.begin()
        running: list[TrialState] = []
        while running or not sweep.is_over():
            while len(running) < at_once and (trial := sweep.next_trial()) is not None:
                sweep.start(trial)
                running.append(trial)
            running = [
                trial for trial in running if self._one_report(sweep, trial, self.numbers[order[trial.number]], seed)
            ]
        # Without a run that reached its end: what the report has at the top.
        picked = rank(space, sweep.state).rows[0].number
        return picked, spent_epochs(sweep.state)

    def _one_report(self, sweep: Sweep, trial: TrialState, number: int, seed: int) -> bool:
        """The trial's next evaluation, or its end; whether it continues."""
        if trial.kind == "point":
            run = self._whole(number, seed)
        else:
            name = trial_name(number, 0, trial.kind, trial.rung)
            run = self._runs[name, _variant(sweep.space.scheduler, trial.kind)]
        done = len(trial.reports)
        if done == len(run.reports):
            outcome: TrialOutcome = "finished" if run.status == "finished" else "diverged"
            sweep.end(trial.name, outcome, epoch=run.epoch, step=0, metrics=run.metrics, reason=outcome)
            return False
        report = run.reports[done]
        verdict = sweep.report(trial.name, report.epoch, report.step, report.metrics)
        if verdict == "stop":
            sweep.end(
                trial.name, "stopped", epoch=report.epoch, step=report.step, metrics=report.metrics, reason="stopped"
            )
        elif verdict == "wait":
            sweep.leave(trial.name, "waits")
        return verdict == "go on"

    def early_scores(self, shares: Iterable[float]) -> dict[tuple[str, float], Array]:
        """Scores of all points from before the end, by where they come from and their epoch.

        Args:
            shares: of the schedule; the epochs of recorded cooldowns and short schedules are added.
        """
        worst = self._sign * self.space.worst_score
        found: dict[tuple[str, float], Array] = defaultdict(lambda: np.full(len(self.numbers), worst))
        reports = [
            [(report.epoch, self._sign * self.space.score(report.metrics)) for report in self._whole(number, 0).reports]
            for number in self.numbers
        ]
        known = sorted({epoch for of_point in reports for epoch, _ in of_point if epoch < self.length})
        taken = {next((epoch for epoch in known if epoch / self.length >= share), self.length) for share in shares}
        taken |= {run.rung for run in self._runs.values() if run.kind != "point"}
        for epoch in taken.intersection(known):
            found["the run as it is", epoch] = np.array([dict(of_point).get(epoch, worst) for of_point in reports])
        for (_, variant), run in self._runs.items():
            if run.kind != "point":
                what = f"cooldown of {variant:.0%}" if run.kind == "cooldown" else f"short schedule, {variant} kept"
                found[what, run.rung][self.numbers.index(run.number)] = self._sign * self._score(run)
        return found

    def _whole(self, number: int, seed: int) -> TrialState:
        """The point's run with its whole schedule."""
        return self._runs.get((trial_name(number, seed), "")) or self._runs[trial_name(number), ""]

    def _score(self, run: TrialState) -> float:
        return self.space.score(run.metrics if run.status == "finished" else {})

    def _of_each(self, value: Callable[[TrialState], float]) -> Array:
        """(seed, point)."""
        return np.array([[value(self._whole(n, seed)) for n in self.numbers] for seed in range(self.num_seeds)])


def _early_scores(studies: Sequence[_Study], shares: Iterable[float]) -> tuple[EarlyScore, ...]:
    """Those that all studies have."""
    by_study = [study.early_scores(shares) for study in studies]
    found = []
    for key in sorted(set.intersection(*map(set, by_study)), key=lambda key: (key[0] != "the run as it is", key)):
        pairs = [(early[key], study.scores[0]) for early, study in zip(by_study, studies, strict=True)]
        better = [final >= np.median(final) for _, final in pairs]
        found.append(
            EarlyScore(
                *key,
                fmean(_rank_correlation(early, final) for early, final in pairs),
                fmean(
                    _rank_correlation(early[half], final[half])
                    for (early, final), half in zip(pairs, better, strict=True)
                ),
            )
        )
    return tuple(found)


def _rank_correlation(first: Array, second: Array) -> float:
    """Spearman's; 0 where all are equal."""
    if not np.ptp(first) or not np.ptp(second):
        return 0.0
    return float(np.corrcoef(rankdata(first), rankdata(second))[0, 1])


def _cooldowns(scheduler: SchedulerConfig) -> list[float]:
    """Shares of the schedule after which it forks cooldowns."""
    return rung_shares(scheduler) if isinstance(scheduler, Annealed | Record) else []


def _shorts(scheduler: SchedulerConfig) -> tuple[int, ...]:
    """Epochs of the shorter schedules that it trains."""
    match scheduler:
        case Halving(rungs=epochs):
            return epochs[:-1]
        case Record(shorts=epochs):
            return epochs
        case _:
            return ()


def _variant(scheduler: SchedulerConfig, kind: TrialKind) -> float | str:
    """What decides a cooldown or a short schedule besides its name."""
    match kind, scheduler:
        case "cooldown", Annealed(cooldown=cooldown) | Record(cooldown=cooldown):
            return cooldown
        case "short", Halving(carry=carry) | Record(carry=carry):
            return carry
        case _:
            return ""


def _recorder(needs: SchedulerConfig, others: Sequence[SchedulerConfig]) -> str:
    """The scheduler, in YAML, that records what `needs` sees, and what the others see as far as one sweep can."""
    every = (needs, *others)

    def variant(kind: TrialKind) -> float | str:
        return next(found for scheduler in every if (found := _variant(scheduler, kind)))

    parts = ["kind: record"]
    if cooldowns := sorted({share for scheduler in every for share in _cooldowns(scheduler)}):
        parts += [f"cooldowns: {cooldowns}", f"cooldown: {variant('cooldown')}"]
    if shorts := sorted({epochs for scheduler in every for epochs in _shorts(scheduler)}):
        parts += [f"shorts: {shorts}", f"carry: {variant('short')}"]
    return f"{{{', '.join(parts)}}}"


# ---- draws -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Result:
    """What a rule came to, by draw and order."""

    epochs: Array
    chances: Array
    """By draw, order and place in it: with which it picks the point."""
    regret: Array
    elsewhere: Array | None
    """The regret by the runs that the rule did not see."""


class _Draws:
    """Orders of points, each played on a study. Axes of arrays: draw or resample, order, place in the order.

    Args:
        orders: (draw, order, place): indices of points.
        played: (draw, order): indices of studies.
        only_first_seed: the rules see the runs of the first seed. False: those of each seed in turn.
    """

    def __init__(self, studies: Sequence[_Study], orders: Integers, played: Integers, *, only_first_seed: bool) -> None:
        self._studies, self._orders, self._played = studies, orders, played
        self.size = orders.shape[-1]
        turns = np.arange(played.size).reshape(played.shape) // len(studies)
        self._seeds = turns % np.array([1 if only_first_seed else study.num_seeds for study in studies])[played]

        def seen(values: Sequence[Array]) -> Array:
            """From (seed, point) of each study."""
            cells = [values[int(played[cell])][self._seeds[cell]][orders[cell]] for cell in np.ndindex(played.shape)]
            return np.array(cells).reshape(orders.shape)

        scores = seen([study.scores for study in studies])
        self.all_epochs: Array = seen([study.epochs for study in studies]).sum(-1)
        """Of all points to their end."""
        self._ranked = np.argsort(-scores, axis=-1, kind="stable")
        self._regrets = scores.max(-1, keepdims=True) - scores
        self._elsewhere: Array | None = None
        every = np.concatenate([study.scores for study in studies])
        if len(every) > 1:
            others = (every.sum(0)[orders] - scores) / (len(every) - 1)
            best = every.mean(0)[orders].argmax(-1)
            self._elsewhere = np.take_along_axis(others, best[..., None], -1) - others
        num, place = np.arange(1, self.size + 1)[:, None], np.arange(self.size - 1)
        lower = np.cumprod(np.maximum(self.size - place - num, 0) / (self.size - 1 - place), axis=1)
        self._by_place = num / self.size * np.hstack([np.ones_like(num), lower])
        """(number, place): the chance that the best of 1, 2, ... random points is the one ranked there."""

    def play(self, space: Space, at_once: int) -> _Result:
        epochs, chances = np.zeros_like(self.all_epochs), np.zeros_like(self._regrets)
        for cell in np.ndindex(self._played.shape):
            study, order = self._studies[int(self._played[cell])], self._orders[cell].tolist()
            picked, epochs[cell] = study.play(space, order, int(self._seeds[cell]), at_once)
            chances[cell][picked] = 1.0
        return self._result(epochs, chances)

    def random_search(self, epochs: Array) -> _Result:
        """With as many epochs, or those of one point or of all if that is nearer."""
        num = np.clip(epochs / self.all_epochs * self.size, 1, self.size)
        floor = np.floor(num).astype(int)
        share = (num - floor)[..., None]
        by_place = (1 - share) * self._by_place[floor - 1] + share * self._by_place[np.minimum(floor, self.size - 1)]
        chances = np.zeros_like(self._regrets)
        np.put_along_axis(chances, self._ranked, by_place, axis=-1)
        return self._result(num / self.size * self.all_epochs, chances)

    def share_needed(self, regret: float) -> float:
        """The share of all epochs with which random search has this mean regret."""
        falling = self._by_place @ np.take_along_axis(self._regrets, self._ranked, -1).mean((0, 1))
        return float(np.interp(regret, falling[::-1], np.arange(self.size, 0, -1))) / self.size

    def _result(self, epochs: Array, chances: Array) -> _Result:
        elsewhere = None if self._elsewhere is None else (chances * self._elsewhere).sum(-1)
        return _Result(epochs, chances, (chances * self._regrets).sum(-1), elsewhere)

    def row(self, rule: str, result: _Result, resampled: _Result, equal: tuple[_Result, _Result] | None = None) -> Row:
        """
        Args:
            result: of these draws.
            resampled: of the resampled ones.
            equal: both of random search with as many epochs.
        """
        is_picked = result.chances > 0
        median, below_90 = np.quantile(
            self._regrets[is_picked], [0.5, 0.9], weights=result.chances[is_picked], method="inverted_cdf"
        )
        elsewhere = None
        if result.elsewhere is not None and resampled.elsewhere is not None:
            elsewhere = _interval(result.elsewhere, resampled.elsewhere)
        row = Row(
            rule=rule,
            epochs=float(result.epochs.mean()),
            share=float((result.epochs / self.all_epochs).mean()),
            regret=_interval(result.regret, resampled.regret, least=0.0),
            median=float(median),
            below_90=float(below_90),
            hits=float((result.chances * (self._regrets == 0)).sum(-1).mean()),
            regret_elsewhere=elsewhere,
            by_study=tuple(float(result.regret[self._played == study].mean()) for study in range(len(self._studies))),
        )
        if equal is None:
            return row
        return replace(
            row,
            difference=_interval(result.regret - equal[0].regret, resampled.regret - equal[1].regret),
            ratio=row.regret.mean / float(equal[0].regret.mean()) if equal[0].regret.any() else None,
            random_share=self.share_needed(row.regret.mean),
        )


def _interval(values: Array, resampled: Array, least: float = -np.inf) -> Interval:
    """The bootstrap's percentiles, moved to the mean: points that a resample has twice favour some rules."""
    mean, means = float(values.mean()), resampled.mean(1)
    low, high = mean - means.mean() + np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(mean, max(float(low), least), float(high))


def _how_sure(studies: Sequence[_Study], num_resamples: int) -> str:
    how = f"In brackets: 95 % intervals by {num_resamples} bootstrap resamples, each played again"
    if len(studies) > 1:
        return f"{how}, of studies and points."
    return f"{how}, of points only: there is one study, and how much another would differ is not in them."
