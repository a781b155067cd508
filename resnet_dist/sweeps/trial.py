"""One small actor between a sweep's driver and its trials: verdicts and the wish to stop go to the trials."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import ray
import torch
from ray import tune
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from data_prep.beton.files import write_text_atomically
from data_prep.runtime.ray_errors import explain
from resnet_dist.config.loading import to_yaml
from resnet_dist.config.profile import Profile
from resnet_dist.config.recipe import Recipe
from resnet_dist.errors import Fault, UserError
from resnet_dist.launch.cluster import alive_nodes
from resnet_dist.launch.control import Status, StopSignal
from resnet_dist.launch.lease import HeldLease, held
from resnet_dist.launch.preflight import Prepared, prepare
from resnet_dist.launch.progress import Screen
from resnet_dist.launch.record import begin_record, run_params
from resnet_dist.launch.train import train_and_record
from resnet_dist.launch.worker import fill, node_cache
from resnet_dist.sweeps.ledger import Verdict
from resnet_dist.tracking.connection import settle_environment
from resnet_dist.tracking.mlflow_run import EndStatus, RunHandle, end_run, open_run
from resnet_dist.tracking.tracker import SpoolTracker
from resnet_dist.training.checkpoint import prune
from resnet_dist.training.context import LocalContext, Observer, Outcome
from resnet_dist.training.watchdog import Watchdog


class SweepControl:
    """The actor's body; runs on the driver's node, so it lives and dies with the driver. Killed, it comes back with
    nothing in mind: the driver asks to stop again and again, a trial without its verdict reports again.
    """

    def __init__(self) -> None:
        self._stop = False
        self._verdicts: dict[tuple[str, int], Verdict] = {}

    def request_stop(self) -> None:
        self._stop = True

    def stop_requested(self) -> bool:
        return self._stop

    def tell(self, trial: str, step: int, verdict: Verdict) -> None:
        """The driver's answer to what `trial` reported after `step`."""
        self._verdicts[trial, step] = verdict

    def verdict(self, trial: str, step: int) -> Verdict | None:
        """None: not told, or forgotten."""
        return self._verdicts.get((trial, step))


def start_sweep_control() -> Any:
    """Starts the actor on this node and returns its handle; what is asked while it is away is asked again by Ray."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    again = {"max_restarts": -1, "max_task_retries": -1}
    return ray.remote(SweepControl).options(num_cpus=0, scheduling_strategy=here, **again).remote()


# What a trial is given, what it and the driver say to each other while it runs, and what it hands back.


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


# A small trial in the actor it is in: no worker group, no placement group of its own, no further process.


class DriverAsObserver(Observer):
    """Sends every evaluation to the driver, which answers with a verdict; the driver may stop the trial at any time."""

    def __init__(self, wishes: Wishes, steps_per_epoch: int) -> None:
        self.verdict: Verdict = "go on"
        self._wishes, self._steps_per_epoch = wishes, steps_per_epoch

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        self.verdict = self._wishes.judge(step / self._steps_per_epoch, step, metrics)

    def stop_requested(self) -> bool:
        return self._wishes.stop.is_set()


def train_light(
    recipe: Recipe, setup: TrialSetup, config: Mapping[str, Any], prepared: Prepared, wishes: Wishes
) -> TrialEnd:
    """Trains the trial from where it stands to its end or to a stop. Raises UserError, Fault."""
    from resnet_dist.training.loop import run_worker  # brings ffcv

    profile, storage = setup.profile, prepared.storage
    storage.pull()
    if not prepared.none_whole:
        prune(storage, profile.checkpoint.keep, prepared.damaged)
    if (cache := node_cache(profile, (prepared.train_source, prepared.val_source))) is not None:
        fill(cache)
    write_text_atomically(storage.folder / "recipe.yaml", to_yaml(recipe))
    storage.publish(storage.folder / "recipe.yaml")
    handle = _open_run(recipe, setup, config, prepared)
    stacks = storage.folder / "stacks" / f"rank0-{time.strftime('%Y%m%d-%H%M%S')}.txt"
    watchdog = Watchdog(profile.failure.progress_timeout_s, stacks)
    observer = DriverAsObserver(wishes, prepared.plan.steps_per_epoch)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keep = profile.checkpoint.keep
    context = LocalContext(storage, device, keep=keep, observer=observer, on_heartbeat=watchdog.heartbeat)
    tracker = SpoolTracker(storage, handle.run_id, profile.tracking_uri)
    try:
        result = run_worker(prepared.job(recipe, profile), context, tracker)
    except BaseException as error:
        tracker.close()
        end_run(handle, "FAILED", f"failed: {error}")
        raise
    finally:
        watchdog.close()
    tracker.close()
    epoch = result.step / prepared.plan.steps_per_epoch
    end_run(handle, *mlflow_end(result.outcome, observer.verdict, epoch))
    return TrialEnd(result.outcome, observer.verdict, epoch, result.step, result.metrics, handle.run_id)


def _open_run(recipe: Recipe, setup: TrialSetup, config: Mapping[str, Any], prepared: Prepared) -> RunHandle:
    """The trial's MLflow run below the sweep's, with what it searches by; the sweep's run has the rest."""
    profile, identity = setup.profile, prepared.identity
    return open_run(
        profile.tracking_uri,
        profile.experiment,
        config["run"],
        prepared.storage,
        {"recipe_hash": identity.recipe_hash, "data_digest": identity.data_digest, "trial": config["trial"]},
        run_params(recipe, profile),
        parent_run_id=setup.parent_run_id,
        answer_limit_s=TRIAL_ANSWER_LIMIT_S,
    )


# A trial on a Ray Train worker group: the way a single run goes, without the hand-over of a model.


def train_with_workers(
    recipe: Recipe, setup: TrialSetup, config: Mapping[str, Any], prepared: Prepared, wishes: Wishes
) -> TrialEnd:
    """Trains the trial from where it stands to its end or to a stop. Raises UserError, Fault.

    Workers go on while the driver judges: an evaluation's answer is there about a second later.
    """
    with held(prepared.storage, setup.profile.failure.driver_timeout_s, print) as lease:
        return _train_group(recipe, setup, config, prepared, wishes, lease)


def _train_group(
    recipe: Recipe,
    setup: TrialSetup,
    config: Mapping[str, Any],
    prepared: Prepared,
    wishes: Wishes,
    lease: HeldLease,
) -> TrialEnd:
    per_epoch = prepared.plan.steps_per_epoch
    screen = Screen(prepared.plan)
    record = begin_record(
        recipe,
        setup.profile,
        config["run"],
        prepared,
        alive_nodes(),
        screen.say,
        parent_run_id=setup.parent_run_id,
        answer_limit_s=TRIAL_ANSWER_LIMIT_S,
    )
    asked = StopSignal()
    verdict: Verdict = "go on"
    judged_step = 0

    def observe(status: Status) -> None:
        nonlocal verdict, judged_step
        if status.evaluated_step > judged_step and verdict == "go on":
            judged_step = status.evaluated_step
            verdict = wishes.judge(judged_step / per_epoch, judged_step, status.metrics)
        if wishes.stop.is_set():
            asked.number = signal.SIGTERM

    end: tuple[EndStatus, str] = ("FAILED", "an unexpected error")
    try:
        result = train_and_record(recipe, setup.profile, record, screen, asked, lease, observe)
        epoch = result.step / per_epoch
        end = mlflow_end(result.outcome, verdict, epoch)
    except BaseException as error:
        end = ("FAILED", f"failed: {error}")
        raise
    finally:
        if lease.is_ours():
            record.close(*end)
    return TrialEnd(result.outcome, verdict, epoch, result.step, result.metrics, record.handle.run_id)


# A trial as Ray Tune runs it: a function in an actor that Tune places, keeps and gives the next trial to.


def run_trial(config: Mapping[str, Any], setup: TrialSetup) -> None:
    """Tune's trainable. `config`: `trial` (its name in the ledger), `run` (its name in storage), `recipe`.

    Whatever goes wrong inside comes back as words; only the death of the process is an exception to Tune.
    """
    settle_environment(os.environ)  # a node may have settings of its own
    os.environ.update(setup.environment)
    with Wishes(setup.control, config["trial"]) as wishes:
        try:
            end = _train(config, setup, wishes)
        except UserError as error:
            end = TrialEnd("mistake", error=str(error))
        except Fault as error:
            end = TrialEnd("fault", error=str(error))
        except Exception as error:  # noqa: BLE001 - a trial that fails must not end the sweep
            end = TrialEnd("fault", error=explain(error).sentence)
    fields = asdict(end)
    fields["metrics"] = judged(end.metrics)
    say({"end": fields})


def _train(config: Mapping[str, Any], setup: TrialSetup, wishes: Wishes) -> TrialEnd:
    if wishes.asked():
        return TrialEnd("stopped")
    recipe = Recipe.model_validate(config["recipe"])
    prepared = prepare(recipe, setup.profile, config["run"])
    work = train_light if setup.is_light else train_with_workers
    return work(recipe, setup, config, prepared, wishes)
