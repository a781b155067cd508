"""`tune compare`: what another scheduler would have cost and picked, replayed on the curves of a finished sweep.

The decisions are those of a real sweep (`sweep.Sweep`), the evaluations are read from the ledger. So rungs can be
chosen by evidence, and early stopping compared with random search at equal epochs.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, quantiles

from resnet_dist.config.loading import space_from_tree
from resnet_dist.config.space import Space
from resnet_dist.errors import UserError
from resnet_dist.sweeps.analysis.ranking import rank
from resnet_dist.sweeps.ledger import Ledger, SweepState, TrialOutcome, TrialState, spent_epochs
from resnet_dist.sweeps.sweep import Sweep


@dataclass(frozen=True)
class Draw:
    epochs: float
    """Spent by all trials."""
    regret: float
    """How much better than the picked point the best known point is."""
    is_best: bool


def compare(state: SweepState, schedulers: Sequence[str], num_draws: int, at_once: int) -> str:
    """A Markdown table of each scheduler's cost and regret. Raises UserError unless all points have reached their end.

    Each draw shuffles the points and lets the rule see the runs of one seed. The point that it picks is scored by its
    other seeds, if there are any, so that luck is not rewarded. The best known point has the best mean over all seeds.

    Args:
        schedulers: a space's `scheduler` in YAML, each.
        num_draws: how many orders of the points are played.
        at_once: how many trials run at the same time.
    """
    recorded = _Recorded(state)
    spaces = {name: space_from_tree("--scheduler", recorded.tree, [f"scheduler={name}"]) for name in schedulers}
    rows: list[tuple[str, list[Draw]]] = [
        ("every point to its end", [recorded.first_points(draw, len(recorded.points)) for draw in range(num_draws)])
    ]
    for name, space in spaces.items():
        stopped = [recorded.play(space, draw, at_once) for draw in range(num_draws)]
        wholes = [max(round(played.epochs / recorded.length), 1) for played in stopped]
        random_search = [recorded.first_points(draw, whole) for draw, whole in enumerate(wholes)]
        rows += [(name, stopped), ("random search, as many epochs", random_search)]
    lines = [
        f"{len(recorded.points)} points with {recorded.num_seeds} seed(s), {recorded.length:g} epochs each; "
        f"{num_draws} draws, {at_once} at once; {recorded.space.metric}. {rank(recorded.space, state).verdict()}",
        "",
        "| rule | epochs | share of all | regret, mean | median | 90 % are below | the best point itself |",
        "|---|---|---|---|---|---|---|",
        *(_line(rule, draws, recorded) for rule, draws in rows),
    ]
    return "\n".join(lines)


def _line(rule: str, draws: Sequence[Draw], recorded: _Recorded) -> str:
    epochs, regrets = fmean(draw.epochs for draw in draws), [draw.regret for draw in draws]
    share = epochs / (recorded.length * len(recorded.points))
    deciles = quantiles(regrets, n=10)
    hits = fmean(draw.is_best for draw in draws)
    return (
        f"| {rule} | {epochs:.1f} | {share:.0%} | {fmean(regrets):.2f} | {deciles[4]:.2f} | {deciles[8]:.2f} "
        f"| {hits:.0%} |"
    )


class _Recorded:
    """A finished sweep's runs: one list for each point, by seed."""

    def __init__(self, state: SweepState) -> None:
        if state.began is None:
            raise UserError("compare: no sweep was started here")
        # Without a budget: the replay's clock counts calls. Without a search: the points are known.
        self.tree = {**state.began.space, "budget": {}, "race": None, "search": {"kind": "random"}}
        self.space = Space.model_validate(self.tree)
        self.points: dict[int, list[TrialState]] = {}
        for trial in state.trials.values():
            if trial.status in ("finished", "diverged"):
                self.points.setdefault(trial.number, []).append(trial)
        first_runs = [trial for trial in state.trials.values() if trial.seed_number == 0]
        unknown = [trial.name for trial in first_runs if trial.status not in ("finished", "diverged")]
        finished = [trial for trial in first_runs if trial.status == "finished"]
        if unknown or not finished:
            raise UserError(
                "compare: needs a sweep with scheduler fifo whose points have all reached their end; not so: "
                f"{', '.join(unknown[:10]) or 'no trial has finished'}"
            )
        # Seeds that every point has; one that diverged with its first seed is not run with others.
        self.num_seeds = min(len(self.points[trial.number]) for trial in finished)
        self.length = finished[0].epoch
        sign = 1 if self.space.higher_is_better else -1
        self._best = max(self.points, key=lambda number: sign * self._score(number, range(self.num_seeds)))

    def first_points(self, draw: int, number: int) -> Draw:
        """Random search: the first points of the draw's order, each to its end."""
        order, seed = self._order(draw)
        seen = order[:number]
        picked = seen[0]
        for point in seen[1:]:
            if self.space.is_better(self._score(point, [seed]), self._score(picked, [seed])):
                picked = point
        return self._judged(picked, seed, sum(self._run(point, seed).epoch for point in seen))

    def play(self, space: Space, draw: int, at_once: int) -> Draw:
        """A sweep with the space's scheduler over the draw's order; running trials report one after the other."""
        order, seed = self._order(draw)
        clock = itertools.count()
        sweep = Sweep(
            space.model_copy(update={"seeds": 1}),
            Ledger(),
            planned=[self.points[number][0].point for number in order],
            total_epochs=lambda point: self.length,
            now_s=lambda: float(next(clock)),
        )
        sweep.begin()
        running: list[str] = []
        while not sweep.is_over():
            while len(running) < at_once and (trial := sweep.next_trial()) is not None:
                sweep.start(trial)
                running.append(trial.name)
            running = [name for name in running if self._one_report(sweep, name, order, seed)]
        best = rank(sweep.space, sweep.state).best
        if best is None:
            raise UserError("compare: the scheduler let no trial reach its end")
        return self._judged(order[best.number], seed, spent_epochs(sweep.state))

    def _one_report(self, sweep: Sweep, name: str, order: Sequence[int], seed: int) -> bool:
        """The trial's next evaluation, or its end; whether it continues."""
        known = sweep.state.trials[name]
        run = self._run(order[known.number], seed)
        done = len(known.reports)
        if done == len(run.reports):
            outcome: TrialOutcome = "finished" if run.status == "finished" else "diverged"
            sweep.end(name, outcome, epoch=run.epoch, step=0, metrics=run.metrics, reason=outcome)
            return False
        report = run.reports[done]
        verdict = sweep.report(name, report.epoch, report.step, report.metrics)
        if verdict == "stop":
            sweep.end(name, "stopped", epoch=report.epoch, step=report.step, metrics=report.metrics, reason="stopped")
        elif verdict == "wait":
            sweep.leave(name, "waits")
        return verdict == "go on"

    def _order(self, draw: int) -> tuple[list[int], int]:
        """The points in the draw's order, and the seed whose runs it sees."""
        order = sorted(self.points)
        random.Random(draw).shuffle(order)
        return order, draw % self.num_seeds

    def _run(self, point: int, seed: int) -> TrialState:
        runs = self.points[point]
        return runs[seed] if seed < len(runs) else runs[0]

    def _score(self, point: int, seeds: Sequence[int]) -> float:
        runs = [self._run(point, seed) for seed in seeds]
        return fmean(self.space.score(run.metrics if run.status == "finished" else {}) for run in runs)

    def _judged(self, picked: int, seed: int, epochs: float) -> Draw:
        others = [other for other in range(self.num_seeds) if other != seed] or [seed]
        sign = 1 if self.space.higher_is_better else -1
        regret = sign * (self._score(self._best, others) - self._score(picked, others))
        return Draw(epochs, regret, picked == self._best)
