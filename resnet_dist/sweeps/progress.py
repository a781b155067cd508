"""The bar of a running sweep: epochs of those expected in all, the best score, the trials in flight, the time left."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from statistics import median

from resnet_dist.launch.progress_bar import ProgressBar
from resnet_dist.sweeps.analysis.ranking import rank
from resnet_dist.sweeps.forecast import Speed, epochs_to_come, measured_speed, seconds_left
from resnet_dist.sweeps.ledger import TrialState, spent_epochs
from resnet_dist.sweeps.prepare import PreparedSweep
from resnet_dist.sweeps.sweep import Sweep

_SHOW_EVERY_S = 1.0
_NAMED = 4
"""How many of the running trials are named."""


class SweepProgress:
    """
    Args:
        prepared: what each point costs.
        sweep: what has happened so far.
    """

    def __init__(self, prepared: PreparedSweep, sweep: Sweep, bar: ProgressBar) -> None:
        self.epochs: dict[str, float] = {}
        """How far trials are by their own, newer than their last evaluation."""
        self._first: dict[str, tuple[float, float]] = {}
        """When each of them was first seen, and where: what came before was its start."""
        self._sweep, self._bar = sweep, bar
        self._costs = prepared.costs(sweep.state, sweep.num_points)
        self._has_begun = False
        self._shown_s = -math.inf

    def show(self, at_once: int, num_up: int) -> None:
        """Call it as often as you like.

        Args:
            num_up: trials whose process is up.
        """
        now_s = time.monotonic()
        if now_s - self._shown_s < _SHOW_EVERY_S:
            return
        self._shown_s, self._has_begun = now_s, self._has_begun or num_up > 0
        state = self._sweep.state
        for name, epoch in self.epochs.items():
            self._first.setdefault(name, (now_s, epoch))
        costs = {number: cost for number, cost in self._costs.items() if number < self._sweep.num_points}
        coming = epochs_to_come(self._sweep.space, state, costs)
        running = [trial for trial in state.trials.values() if trial.status == "running"]
        since = sum(max(self.epochs.get(trial.name, 0.0) - _counted(trial), 0.0) for trial in running)
        reported = spent_epochs(state)
        total, done = reported + sum(map(sum, coming)), reported + since
        left_s = self._left_s(coming, total, done, since, at_once)
        self._bar.show(done, max(total, done), self._text(running), left_s)

    def _text(self, running: list[TrialState]) -> str:
        if not self._has_begun:
            return "waiting for the first trial's process"
        best = rank(self._sweep.space, self._sweep.state).best
        parts = [] if best is None else [f"best {best.score:.4g}"]
        for trial in running[:_NAMED]:
            epoch = max(self.epochs.get(trial.name, 0.0), trial.epoch)
            end = {"point": self._costs[trial.number].length, "short": trial.rung}.get(trial.kind)
            of = "" if end is None else f"/{end:g}"
            parts.append(f"{trial.name} {epoch:.3g}{of}" if epoch else f"{trial.name} starts")
        more = len(running) - _NAMED
        return ", ".join([*parts, f"{more} more"] if more > 0 else parts)

    def _left_s(
        self, coming: Sequence[Sequence[float]], total: float, done: float, since: float, at_once: int
    ) -> float | None:
        """Seconds to the end of the sweep or of its budget; None while no speed is known."""
        space, state, now_s = self._sweep.space, self._sweep.state, time.time()
        budget, trial_s = space.budget, state.trial_seconds_until(now_s)
        speed = measured_speed(state)
        if speed is None:
            seen = [(time.monotonic() - first_s, self.epochs[name] - at) for name, (first_s, at) in self._first.items()]
            if not any(epochs > 0 for _, epochs in seen):
                return None
            speed = Speed(median(seconds / epochs for seconds, epochs in seen if epochs > 0))
        left_s = seconds_left(space, coming, speed, at_once) - since * speed.epoch_s / max(at_once, 1)
        if budget.epochs is not None and total > budget.epochs:
            left_s *= max(budget.epochs - done, 0.0) / (total - done)
        if budget.wall_hours is not None:
            left_s = min(left_s, 3600 * budget.wall_hours - state.wall_until(now_s))
        if budget.trial_hours is not None:
            left_s = min(left_s, (3600 * budget.trial_hours - trial_s) / max(at_once, 1))
        return max(left_s, 0.0)


def _counted(trial: TrialState) -> float:
    """The epoch up to which the ledger has counted the trial."""
    return trial.epoch or (trial.rung if trial.kind == "cooldown" else 0.0)
