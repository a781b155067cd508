"""Starts trials, and writes what they report: to the ledger first, then to MLflow, then as a line for the user.

One thread, Tune's, calls everything here; the main thread only waits.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from contextlib import suppress
from typing import Any

from data_prep.runtime.stop import StopFlag
from resnet_dist.errors import Fault
from resnet_dist.launch.cluster import alive_nodes
from resnet_dist.storage.base import RunStorage
from resnet_dist.sweeps.analysis.ranking import rank
from resnet_dist.sweeps.ledger import TrialOutcome, TrialState, Verdict, summary
from resnet_dist.sweeps.points import describe
from resnet_dist.sweeps.prepare import PreparedSweep, trials_at_once
from resnet_dist.sweeps.progress import SweepProgress
from resnet_dist.sweeps.record import SweepRecord, end_reason, end_trial
from resnet_dist.sweeps.sweep import Sweep, stopped_at
from resnet_dist.sweeps.trial import TrialEvaluation, TrialResult
from resnet_dist.training.checkpoint_manager import BEST, START, prune

_COUNT_EVERY_S = 2.0
_END_LIMIT_S = 5.0
"""The sweep waits so long for MLflow to take a trial's end; later the trial's own files have it."""
_HOPELESS = 3
"""The sweep ends if its first trials all fail: it is not the points' fault."""


class TrialRunner:
    """What Ray Tune asks: which trial to start, what to answer it, and what follows from its end."""

    def __init__(
        self, prepared: PreparedSweep, sweep: Sweep, record: SweepRecord, stop: StopFlag, progress: SweepProgress
    ) -> None:
        self.progress = progress
        self.fatal: Fault | None = None
        """Why the sweep cannot be continued."""
        self._prepared, self._sweep, self._record, self._stop = prepared, sweep, record, stop
        self._at_once = 0
        self._counted_s = -_COUNT_EVERY_S
        self._alive_s = time.monotonic()
        self._stopping_s: float | None = None
        self._thinned: set[tuple[str, bool]] = set()
        """Trials by name, and whether they keep their weights."""

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        """Tune pickles the searcher and the scheduler into a file that nobody reads: the ledger is the memory."""
        return object, ()

    def running(self) -> list[str]:
        """Trials that were started and have neither ended nor left, whether their process is up or not."""
        return [trial.name for trial in self._sweep.state.trials.values() if trial.status == "running"]

    def next_config(self) -> dict[str, Any] | None:
        """Tune's config of the trial to start now; None: nothing now."""
        if self.why_no_more() or len(self.running()) >= self._capacity():
            return None
        trial = self._sweep.next_trial()
        if trial is None:
            return None
        self._sweep.start(trial)
        recipe = self._prepared.recipe(trial, self._sweep.state.trials)
        run = self._prepared.trial_run(trial.name)
        return {"trial": trial.name, "run": run, "recipe": recipe.model_dump(mode="json")}

    def is_over(self) -> bool:
        """Nothing will be started any more."""
        return self.fatal is not None or self.why_no_more() is not None or self._sweep.is_over()

    def why_no_more(self) -> str | None:
        """Why no trial may start or continue, although there are some; None if they may."""
        if self._stop.number is not None:
            return "stopped: the same command resumes it"
        return self._sweep.budget_spent()

    def answer(self, trial: str, evaluation: TrialEvaluation | None) -> Verdict:
        """The verdict on a trial after an evaluation, or between two; "wait" too when the whole sweep stops."""
        verdict: Verdict = "go on"
        if evaluation is not None:
            verdict = self._sweep.report(trial, evaluation.epoch, evaluation.step, evaluation.metrics)
        return "wait" if verdict == "go on" and self.why_no_more() else verdict

    def ended(self, trial: str, result: TrialResult) -> None:
        """The trial has stopped computing, by a verdict or because it is over."""
        known = self._sweep.state.trials[trial]
        match result.outcome:
            case "fault":
                self.died(trial, result.error)
            case "mistake":
                self._end(trial, "failed", result, result.error)
            case "stopped" if known.verdict == "stop":
                self._end(trial, "stopped", result, stopped_at(known))
            case "stopped":
                why = "waits" if known.verdict == "wait" else "stopped with the sweep"
                self._sweep.leave(trial, why, is_saved=self._is_saved(known))
            case outcome:
                self._end(trial, outcome, result, outcome)

    def died(self, trial: str, why: str) -> None:
        """The trial's process is gone; it resumes from its checkpoint, unless it failed too often."""
        known = self._sweep.state.trials[trial]
        if known.status != "running":
            return
        if known.verdict == "stop":  # it died between the verdict and its own end
            last = known.reports[-1]
            result = TrialResult("stopped", epoch=last.epoch, step=last.step, metrics=last.metrics)
            self._end(trial, "stopped", result, stopped_at(known))
            return
        self._sweep.leave(trial, why, is_fault=True, is_saved=self._is_saved(known))
        if known.num_faults > self._prepared.profile.failure.max_failures:
            self._end(trial, "failed", TrialResult("fault", epoch=known.epoch, metrics=known.metrics), why)
        else:
            self._record.log(f"{trial} failed ({why}); it resumes from its last checkpoint")

    def _is_saved(self, trial: TrialState) -> bool:
        """A trial that is to wait may have died before its checkpoint."""
        return trial.verdict != "wait" or self._prepared.is_saved(trial)

    def check_time(self, num_up: int) -> None:
        """Ends the sweep if no process comes up, or if trials do not stop. Called several times a second.

        Args:
            num_up: trials whose process is up.
        """
        now_s, running, failure = time.monotonic(), self.running(), self._prepared.profile.failure
        self.progress.show(self._at_once, num_up)
        # A process that is asked for needs its resources and then its start-up, which Ray does not tell apart.
        limit_s = failure.wait_for_resources_s + (failure.progress_timeout_s if running else 0.0)
        if num_up or (not running and self._at_once):
            self._alive_s = now_s
        elif now_s - self._alive_s > limit_s:
            self.fatal = Fault(
                f"no trial's process came up within {limit_s:g} s (failure.wait_for_resources_s, and "
                "failure.progress_timeout_s for its start); the same command resumes the sweep when the cluster has "
                "capacity"
            )
        why = self.why_no_more()
        if why is None or not running:
            return
        if self._stopping_s is None:
            self._stopping_s = now_s
            self._record.log(f"{why}; {len(running)} trials in flight save a checkpoint first")
        elif now_s - self._stopping_s > failure.stop_grace_s:
            self.fatal = Fault(
                f"trials did not stop within {failure.stop_grace_s:g} s (failure.stop_grace_s): "
                f"{', '.join(sorted(running))}; the same command resumes them from their last checkpoints"
            )

    def num_open(self) -> int:
        """Trials that are not over, as far as is known."""
        trials = self._sweep.state.trials.values()
        points = {trial.number for trial in trials}
        to_come = max(self._sweep.num_points - len(points), 0)
        return sum(trial.end is None for trial in trials) + to_come

    def _capacity(self) -> int:
        """Trials that fit into the cluster, counted again every two seconds: nodes come and go."""
        now_s = time.monotonic()
        if now_s - self._counted_s >= _COUNT_EVERY_S:
            self._counted_s = now_s
            self._at_once = trials_at_once(self._prepared.space, self._prepared.trial_profile, alive_nodes())
        return self._at_once

    def _end(self, trial: str, outcome: TrialOutcome, result: TrialResult, reason: str) -> None:
        """Writes a trial's end everywhere, and removes what it no longer needs."""
        storage = self._prepared.trial_storage(trial)
        self._sweep.end(
            trial,
            outcome,
            epoch=result.epoch,
            step=result.step,
            metrics=result.metrics,
            reason=reason,
            run_id=result.run_id,
        )
        if outcome == "failed":
            end_trial(storage, self._prepared.profile.tracking_uri, "FAILED", f"failed: {reason}")
        state = self._sweep.state
        thin_ended(self._prepared, state.trials.values(), self._thinned)
        ended = [known for known in state.trials.values() if known.end is not None]
        ranking = rank(self._prepared.space, state)
        best = ranking.best.score if ranking.best else None
        numbers = summary(state, self._prepared.total_epochs(state.trials[trial].point))
        self._record.trial_ended(ranking, len(ended), numbers)
        self._record.log(self._line(state.trials[trial], len(ended), best))
        if len(ended) >= _HOPELESS and all(known.status == "failed" for known in ended):
            self.fatal = Fault(
                f"the first {len(ended)} trials failed, so the sweep ends: {reason}; the last is {storage.location}"
            )

    def _line(self, trial: TrialState, num_ended: int, best: float | None) -> str:
        metric = self._prepared.space.metric
        score = f" {metric} {trial.metrics[metric]:.4g}" if metric in trial.metrics else ""
        so_far = f"; best so far {best:.4g}" if best is not None else ""
        reason = trial.end.reason if trial.end else ""
        count = f"[{num_ended} of {num_ended + self.num_open()}]"
        return f"{count} {trial.name} {reason}{score} ({describe(trial.point)}){so_far}"


def thin_ended(prepared: PreparedSweep, trials: Collection[TrialState], done: set[tuple[str, bool]]) -> None:
    """Removes checkpoints of trials that are over, also of those that lost while they waited.

    Args:
        trials: all of the sweep.
        done: trials by name, and whether they keep their weights; grows.
    """
    farthest: dict[int, TrialState] = {}
    for trial in trials:
        if trial.status == "finished" and trial.seed_number == 0:
            known = farthest.setdefault(trial.number, trial)
            if trial.stage > known.stage:
                farthest[trial.number] = trial
    for trial in trials:
        if trial.end is None:
            continue
        keep = trial.status == "finished" and (trial.kind == "point" or farthest[trial.number] is trial)
        if (trial.name, keep) in done:
            continue
        done.add((trial.name, keep))
        storage = prepared.trial_storage(trial.name)
        lost_while_it_waited = trial.status == "stopped" and trial.verdict == "wait"
        if lost_while_it_waited and end_reason(storage) != stopped_at(trial):
            end_trial(storage, prepared.profile.tracking_uri, "KILLED", stopped_at(trial), limit_s=_END_LIMIT_S)
        with suppress(OSError):  # files that are left over take disk space, no more
            thin(storage, keep=keep)


def thin(storage: RunStorage, *, keep: bool) -> None:
    """A trial that is over needs no checkpoint to resume from.

    Args:
        keep: whether its last weights stay.
    """
    prune(storage, keep=1 if keep else 0)
    if not keep:
        storage.remove(BEST)
        storage.remove(START)
