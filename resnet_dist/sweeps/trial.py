"""A trial as Ray Tune runs it: a function in an actor that Tune places, keeps and gives the next trial to.

Tune's controller never ends a trial from outside: it would kill the actor, and a Ray Train worker group in it outlives
that unless a dashboard runs (ray 2.60), its MLflow run has no end, its last steps are lost. The scheduler's verdict is
fetched after each report, which comes back when Tune has dealt with it, and the trial ends itself in order.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import ray
from ray import tune
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from data_prep.runtime.ray_errors import explain
from resnet_dist.config.profile import Profile
from resnet_dist.config.recipe import Recipe
from resnet_dist.errors import Fault, UserError
from resnet_dist.launch.cluster import alive_nodes, this_machine
from resnet_dist.launch.execute import execute, in_process
from resnet_dist.launch.preflight import Prepared, prepare
from resnet_dist.launch.ray_group import ray_group
from resnet_dist.launch.run import Run
from resnet_dist.sweeps.ledger import Verdict
from resnet_dist.tracking.connection import settle_environment
from resnet_dist.training.context import Observer


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


class TrialObserver(Observer):
    """What the driver wants of this trial: verdicts, and whether to stop, asked once a second in the background."""

    def __init__(self, control: Any, trial: str, steps_per_epoch: int) -> None:
        self.verdict: Verdict = "go on"
        self._control, self._trial, self._steps_per_epoch = control, trial, steps_per_epoch
        self._stop = False
        self._done = threading.Event()

    def __enter__(self) -> TrialObserver:
        threading.Thread(target=self._ask_for_stop, name="ask-for-stop", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Has the driver judge the trial. Raises Fault if it does not."""
        if self.verdict != "go on":
            return
        verdict: Verdict | None = None
        for _ in range(_MOST_REPORTS):  # the actor between us may have been killed, and come back without it
            say({"epoch": step / self._steps_per_epoch, "step": step, "metrics": judged(metrics)})
            verdict = ray.get(self._control.verdict.remote(self._trial, step), timeout=_ANSWER_LIMIT_S)
            if verdict is not None:
                break
        if verdict is None:
            raise Fault(f"the sweep's driver has not judged step {step}, reported {_MOST_REPORTS} times")
        self.verdict = verdict

    def stop_requested(self) -> bool:
        return self._stop or self.verdict != "go on"

    def _ask_for_stop(self) -> None:
        while not self._done.wait(_STOP_POLL_S):
            try:
                if ray.get(self._control.stop_requested.remote(), timeout=5.0):
                    self._stop = True
                    return
            except RayError:
                continue  # the driver is busy, or gone; then Ray ends this process


def sweep_stops(control: Any) -> bool:
    """Whether the whole sweep is to stop, asked now."""
    return bool(ray.get(control.stop_requested.remote(), timeout=_ANSWER_LIMIT_S))


def judged(metrics: Mapping[str, float]) -> dict[str, float]:
    """What the ledger keeps of a run's metrics; MLflow has all."""
    return {key: float(value) for key, value in metrics.items() if key.startswith("val/") or key == "train/loss"}


def say(message: Mapping[str, Any]) -> None:
    """Comes back when Tune's driver has dealt with it. As text: Tune flattens dictionaries, and their keys hold `/`."""
    tune.report({SAID: json.dumps(message)})


def run_trial(config: Mapping[str, Any], setup: TrialSetup) -> None:
    """Tune's trainable. `config`: `trial` (its name in the ledger), `run` (its name in storage), `recipe`.

    Whatever goes wrong inside comes back as words; only the death of the process is an exception to Tune.
    """
    settle_environment(os.environ)  # a node may have settings of its own
    os.environ.update(setup.environment)
    try:
        end = _train(config, setup)
    except UserError as error:
        end = TrialEnd("mistake", error=str(error))
    except Fault as error:
        end = TrialEnd("fault", error=str(error))
    except Exception as error:  # noqa: BLE001 - a trial that fails must not end the sweep
        end = TrialEnd("fault", error=explain(error).sentence)
    fields = asdict(end)
    fields["metrics"] = judged(end.metrics)
    say({"end": fields})


def _train(config: Mapping[str, Any], setup: TrialSetup) -> TrialEnd:
    if sweep_stops(setup.control):
        return TrialEnd("stopped")
    prepared = prepare(Recipe.model_validate(config["recipe"]), setup.profile, config["run"])
    with TrialObserver(setup.control, config["trial"], prepared.plan.steps_per_epoch) as observer:
        return train_trial(prepared, setup, config["trial"], observer)


def train_trial(prepared: Prepared, setup: TrialSetup, trial: str, observer: TrialObserver) -> TrialEnd:
    """Trains the trial from where it is to its end or to a stop, in this process or on workers of its own.

    In this process nothing more is trained before the driver has judged an evaluation; workers go on meanwhile, and
    the answer is there about a second later. Raises UserError, Fault.
    """
    light = setup.is_light
    with Run.open(prepared, parent_run_id=setup.parent_run_id, brief=light, tags={"trial": trial}) as run:
        run.begin([this_machine(setup.profile, num_gpus=0)] if light else alive_nodes())
        result = execute(run, on=in_process if light else ray_group, observer=observer)
        epoch = result.step / prepared.plan.steps_per_epoch
        match result.outcome:
            case "diverged":
                run.ends(result, f"diverged at epoch {epoch:g}")
            case "stopped":
                run.ends(result, f"{'stopped early' if observer.verdict == 'stop' else 'waits'} at epoch {epoch:g}")
    return TrialEnd(result.outcome, observer.verdict, epoch, result.step, result.metrics, run.record.handle.run_id)
