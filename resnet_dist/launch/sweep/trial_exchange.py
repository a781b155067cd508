"""What a trial is given, what it and the driver say to each other while it runs, and what it hands back."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from ray import tune
from ray.exceptions import RayError

from resnet_dist.config.profile import Profile
from resnet_dist.errors import Fault
from resnet_dist.tracking.mlflow_run import EndStatus
from resnet_dist.training.context import Outcome
from resnet_dist.tune.events import Verdict

_STOP_POLL_S = 1.0
_ANSWER_LIMIT_S = 60.0
_MOST_REPORTS = 5
SAID = "said"
TRIAL_ANSWER_LIMIT_S = 60.0
"""How long MLflow may take to open a trial's run. Many trials may begin at once, and one that gives up has its start-up
again: dearer than waiting."""


@dataclass(frozen=True)
class TrialSetup:
    """What is the same for all trials of a sweep."""

    profile: Profile = field(repr=False)
    parent_run_id: str
    is_light: bool
    control: Any
    """Handle of the `SweepControl` actor."""
    environment: Mapping[str, str] = field(repr=False)
    """What the driver set for Ray Train and MLflow."""


@dataclass(frozen=True)
class TrialEnd:
    """What a trial's actor hands back: the last thing it reports."""

    outcome: Literal["finished", "stopped", "diverged", "mistake", "fault"]
    """stopped: as its last verdict said, or as the driver asked. mistake: the user's; trying again would not help."""
    verdict: Verdict = "go on"
    epoch: float = 0.0
    step: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    run_id: str = ""
    """MLflow's."""
    error: str = ""


class Wishes:
    """What the driver wants of this trial: verdicts, and whether to stop, asked once a second in the background."""

    def __init__(self, control: Any, trial: str) -> None:
        self._control, self._trial = control, trial
        self._done = threading.Event()
        self.stop = threading.Event()
        """Set when the trial shall save a checkpoint and come back."""

    def __enter__(self) -> Wishes:
        threading.Thread(target=self._poll, name="sweep-stop-poll", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def judge(self, epoch: float, step: int, metrics: Mapping[str, float]) -> Verdict:
        verdict: Verdict | None = None
        for _ in range(_MOST_REPORTS):  # the actor between us may have been killed, and come back without it
            say({"epoch": epoch, "step": step, "metrics": judged(metrics)})
            verdict = ray.get(self._control.verdict.remote(self._trial, step), timeout=_ANSWER_LIMIT_S)
            if verdict is not None:
                break
        if verdict is None:
            raise Fault(f"the sweep's driver has not judged step {step}, reported {_MOST_REPORTS} times")
        if verdict != "go on":
            self.stop.set()
        return verdict

    def asked(self) -> bool:
        return bool(ray.get(self._control.stop_requested.remote(), timeout=_ANSWER_LIMIT_S))

    def _poll(self) -> None:
        while not self._done.wait(_STOP_POLL_S):
            try:
                if ray.get(self._control.stop_requested.remote(), timeout=5.0):
                    self.stop.set()
                    return
            except RayError:
                continue  # the driver is busy, or gone; then Ray ends this process


def judged(metrics: Mapping[str, float]) -> dict[str, float]:
    """What the ledger keeps of a run's metrics; MLflow has all."""
    return {key: float(value) for key, value in metrics.items() if key.startswith("val/") or key == "train/loss"}


def say(message: Mapping[str, Any]) -> None:
    """Comes back when Tune's driver has dealt with it. As text: Tune flattens dictionaries, and their keys hold `/`."""
    tune.report({SAID: json.dumps(message)})


def mlflow_end(outcome: Outcome, verdict: Verdict, epoch: float) -> tuple[EndStatus, str]:
    """Status and reason of the trial's MLflow run."""
    match outcome:
        case "finished":
            return "FINISHED", "finished"
        case "diverged":
            return "FAILED", f"diverged at epoch {epoch:g}"
        case "stopped":
            return "KILLED", f"stopped early at epoch {epoch:g}" if verdict == "stop" else f"waits at epoch {epoch:g}"
