"""What the driver does with what trials say: the ledger first, then MLflow, then a line for the user.

One thread, Tune's, calls everything here; the main thread only waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.redaction import redacted
from resnet_dist.config.loading import flatten, to_yaml, tree_to_yaml
from resnet_dist.errors import Fault, UserError
from resnet_dist.launch.cluster import Node, alive_nodes
from resnet_dist.launch.code_version import read_code_version
from resnet_dist.launch.control import StopSignal
from resnet_dist.launch.record import hardware_summary
from resnet_dist.storage.base import RunStorage
from resnet_dist.sweeps.analysis.ranking import Ranking, rank
from resnet_dist.sweeps.ledger import Outcome, TrialState, Verdict, summary
from resnet_dist.sweeps.points import describe
from resnet_dist.sweeps.prepare import PreparedSweep, trials_at_once
from resnet_dist.sweeps.sweep import Sweep, stopped_at
from resnet_dist.sweeps.trial import Evaluation, TrialEnd
from resnet_dist.tracking.mlflow_run import EndStatus, RunHandle, log_folder
from resnet_dist.tracking.sync import end_sweep, end_trial, open_sweep
from resnet_dist.tracking.tracker import SpoolTracker
from resnet_dist.training.checkpoint import prune

_LOOK_EVERY_S = 2.0
_HOPELESS = 3
"""The sweep ends if its first trials all fail: it is not the points' fault."""


class TrialRunner:
    """Starts trials, answers them, ends them, for as long as the sweep, its budget and the user want."""

    def __init__(self, prepared: PreparedSweep, sweep: Sweep, record: SweepRecord, stop: StopSignal) -> None:
        self.fatal: Fault | None = None
        """Why the sweep cannot be continued."""
        self._prepared, self._sweep, self._record, self._stop = prepared, sweep, record, stop
        self._at_once = 0
        self._looked_s = -_LOOK_EVERY_S
        self._alive_s = time.monotonic()
        self._stopping_s: float | None = None

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        """Tune pickles the searcher and the scheduler into a file that nobody reads: the ledger is the memory."""
        return object, ()

    def running(self) -> list[str]:
        """Trials that were started and have neither ended nor left, whether their process is up or not."""
        return [trial.name for trial in self._sweep.state.trials.values() if trial.status == "running"]

    def next_config(self) -> dict[str, Any] | None:
        """Tune's config of the trial to start now; None: nothing now."""
        if self.why_no_more() or len(self.running()) >= self._room():
            return None
        trial = self._sweep.next_trial()
        if trial is None:
            return None
        self._sweep.start(trial)
        recipe = self._prepared.builder.proxy(trial.point, trial.seed_number)
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

    def answer(self, trial: str, evaluation: Evaluation | None) -> Verdict:
        """What a trial is told after an evaluation, or between two; "wait" too when the whole sweep stops."""
        verdict: Verdict = "go on"
        if evaluation is not None:
            verdict = self._sweep.report(trial, evaluation.epoch, evaluation.step, evaluation.metrics)
        return "wait" if verdict == "go on" and self.why_no_more() else verdict

    def ended(self, trial: str, end: TrialEnd) -> None:
        """The trial has ended itself, as it was told or because it is over."""
        known = self._sweep.state.trials[trial]
        if end.outcome == "fault":
            self.died(trial, end.error)
        elif end.outcome == "mistake":
            self._over(trial, "failed", end, end.error)
        elif end.outcome == "stopped" and known.verdict != "stop":
            self._sweep.leave(trial, "waits" if known.verdict == "wait" else "stopped with the sweep")
        else:
            self._over(trial, end.outcome, end, stopped_at(known) if end.outcome == "stopped" else end.outcome)

    def died(self, trial: str, why: str) -> None:
        """The trial's process is gone; it resumes from its checkpoint, unless it failed too often."""
        known = self._sweep.state.trials[trial]
        if known.status != "running":
            return
        if known.verdict == "stop":  # it died on its way out
            last = known.reports[-1]
            end = TrialEnd("stopped", epoch=last.epoch, step=last.step, metrics=last.metrics)
            self._over(trial, "stopped", end, stopped_at(known))
            return
        self._sweep.leave(trial, why, is_fault=True)
        if known.num_faults > self._prepared.profile.failure.max_failures:
            self._over(trial, "failed", TrialEnd("fault", epoch=known.epoch, metrics=known.metrics), why)
        else:
            self._record.log(f"{trial} failed ({why}); it resumes from its last checkpoint")

    def tick(self, num_up: int) -> None:
        """Looks at the time; called several times a second. `num_up`: trials whose process is up."""
        now_s, running, failure = time.monotonic(), self.running(), self._prepared.profile.failure
        # A process that is asked for needs its resources and then its start-up, which Ray does not tell apart.
        limit_s = failure.wait_for_resources_s + (failure.progress_timeout_s if running else 0.0)
        if num_up or (not running and self._at_once):
            self._alive_s = now_s
        elif now_s - self._alive_s > limit_s:
            self.fatal = Fault(
                f"no trial's process came up within {limit_s:g} s (failure.wait_for_resources_s, and "
                "failure.progress_timeout_s for its start); the same command resumes the sweep when the cluster has "
                "room"
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

    def _room(self) -> int:
        """Trials that fit into the cluster, looked at again every two seconds: nodes come and go."""
        now_s = time.monotonic()
        if now_s - self._looked_s >= _LOOK_EVERY_S:
            self._looked_s = now_s
            self._at_once = trials_at_once(self._prepared.space, self._prepared.trial_profile, alive_nodes())
        return self._at_once

    def _over(self, trial: str, outcome: Outcome, end: TrialEnd, reason: str) -> None:
        """Writes a trial's end everywhere, and removes what it no longer needs."""
        storage = self._prepared.trial_storage(trial)
        self._sweep.end(
            trial, outcome, epoch=end.epoch, step=end.step, metrics=end.metrics, reason=reason, run_id=end.run_id
        )
        if outcome == "failed":
            end_trial(storage, self._prepared.profile.tracking_uri, "FAILED", f"failed: {reason}")
        with suppress(OSError):  # what is left over takes disk space, and costs no trial
            thin(storage, outcome)
        state = self._sweep.state
        ended = [known for known in state.trials.values() if known.end is not None]
        ranking = rank(self._prepared.space, state)
        best = ranking.best.score if ranking.best else None
        numbers = summary(state, self._prepared.total_epochs(state.trials[trial].point))
        self._record.ended(ranking, len(ended), numbers)
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


def thin(storage: RunStorage, outcome: Outcome) -> None:
    """A trial that is over needs no checkpoint to resume from; one that reached its end keeps its weights."""
    prune(storage, keep=1 if outcome == "finished" else 0)
    if outcome != "finished":
        storage.remove("best")


Log = Callable[[str], None]


@dataclass(frozen=True)
class SweepRecord:
    handle: RunHandle
    tracker: SpoolTracker
    log: Log

    def ended(self, ranking: Ranking, num_ended: int, numbers: dict[str, float]) -> None:
        """Points of the sweep's curves; the x-axis counts trials that have ended."""
        best = {} if ranking.best is None else {f"best/{ranking.metric}": ranking.best.score}
        self.tracker.metrics({**best, **{f"sweep/{key}": value for key, value in numbers.items()}}, num_ended)

    def log_report(self, folder: Path) -> None:
        try:
            log_folder(self.handle, folder, "report")
        except (Fault, UserError, OSError) as error:
            self.log(f"warning: the report is not in MLflow: {redacted(str(error))}")

    def end(self, trials: Iterable[RunStorage], status: EndStatus, reason: str) -> None:
        self.tracker.close()
        end_sweep(self.handle, trials, status, reason)


def begin_sweep_record(prepared: PreparedSweep, nodes: list[Node], log: Log) -> SweepRecord:
    """Opens the sweep's MLflow run, or continues it. Raises Fault if MLflow does not answer."""
    space, profile = prepared.space, prepared.profile
    texts = {
        "config/space.yaml": to_yaml(space),
        "config/base_recipe.yaml": tree_to_yaml(prepared.began.base),
        "config/profile.yaml": redacted(to_yaml(profile)),
    }
    code = read_code_version(Path(__file__).parents[2])
    handle = open_sweep(
        profile.tracking_uri,
        profile.experiment,
        prepared.name,
        prepared.sweep_dir,
        description=_description(prepared),
        tags={
            "sweep_hash": prepared.began.sweep_hash,
            "data_digest": prepared.began.data_digest,
            "hardware": hardware_summary(nodes),
            "mlflow.source.name": "resnet-dist tune",
            "mlflow.source.type": "JOB",
            **({"mlflow.source.git.commit": code.commit} if code else {}),
        },
        params={
            key: value[:500]
            for key, value in flatten(space).items()
            if key.partition(".")[0] not in ("trials", "seeds", "budget", "resources", "first_points", "warm_start")
        },
        texts=texts,
    )
    return SweepRecord(handle, SpoolTracker(prepared.sweep_dir, handle.run_id, profile.tracking_uri), log)


def _description(prepared: PreparedSweep) -> str:
    space, folder = prepared.space, prepared.sweep_dir
    searched = "".join(f"| {key} | `{_in_words(parameter.model_dump())}` |\n" for key, parameter in space.space.items())
    return (
        f"A sweep over {Path(space.base).name} for {space.metric}.\n\n| key | values |\n|---|---|\n{searched}\n"
        f"Search: {space.search.kind}, scheduler: {space.scheduler.kind}.\n\n"
        f"    resnet-dist tune report {folder}\n"
        f"    resnet-dist train {folder}/best_recipe.yaml --on PROFILE\n"
    )


def _in_words(parameter: dict[str, object]) -> str:
    kept = {key: value for key, value in parameter.items() if key != "kind" and value not in (None, {}, False)}
    return f"{parameter['kind']} " + ", ".join(f"{key} {value}" for key, value in kept.items())
