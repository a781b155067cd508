"""From a finished training to a complete run: its models in MLflow, registered, and `result.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.redaction import redacted
from data_prep.shown import shown
from resnet_dist.config.loading import recipe_from_yaml, to_yaml
from resnet_dist.config.profile import FailureConfig
from resnet_dist.config.recipe import Recipe
from resnet_dist.config.records import read_record
from resnet_dist.data.checks import known_pictures, picture_settings
from resnet_dist.errors import Fault, UserError
from resnet_dist.launch.lease import driver_of, held
from resnet_dist.launch.mlflow_description import Log, data_inputs
from resnet_dist.launch.preflight import Prepared
from resnet_dist.launch.progress import ProgressReporter
from resnet_dist.launch.record import UNPUBLISHED, MlflowRecord
from resnet_dist.launch.run import Run, finished
from resnet_dist.storage.base import RUN_RESULT, RunStorage, write_json
from resnet_dist.tracking.connection import ServerUnavailable
from resnet_dist.tracking.datasets import DataInput
from resnet_dist.tracking.mlflow_run import RunEnd, RunHandle, recorded_end, recorded_run, require_run
from resnet_dist.tracking.models import log_classifier, log_model_metrics
from resnet_dist.tracking.registry import Registration, Score, register
from resnet_dist.tracking.spool import read_history
from resnet_dist.tracking.sync import SyncReport, sync
from resnet_dist.training.checkpoint import Identity, load_state
from resnet_dist.training.checkpoint_manager import newest_complete, newest_first, newest_step, open_best, score
from resnet_dist.training.context import TrainingOutcome, WorkerResult
from resnet_dist.training.model import build_classifier
from resnet_dist.training.state import evaluated_weights

_TRAINED = "trained.json"
"""Written when the training is over. With the checkpoint this is all that publishing needs, so any command on any
machine that sees the storage can publish, without Ray and the data."""


@dataclass(frozen=True)
class RunResult:
    """How a run came out. It has a model only if it finished; stopped, the same call resumes it from its checkpoint."""

    name: str
    run_dir: str
    """Path or URL."""
    run_id: str
    """MLflow's."""
    tracking_uri: str
    model_uri: str
    checkpoint: str
    """Path or URL of the newest one; "" if there is none."""
    step: int
    metrics: Mapping[str, float]
    outcome: TrainingOutcome = "finished"
    reason: str = ""
    """How the divergence was noticed, or why the run finished early."""
    stop_signal: int | None = None
    """Number of the signal that stopped the run."""


def unfinished(run: Run, result: WorkerResult, stop_signal: int | None) -> RunResult:
    """The result of a run that stopped or diverged."""
    newest = next(iter(newest_first(run.storage.names())), None)
    return RunResult(
        name=run.prepared.name,
        run_dir=run.storage.location,
        run_id=run.record.handle.run_id,
        tracking_uri=redacted(run.record.handle.tracking_uri),
        model_uri="",
        checkpoint=f"{run.storage.location}/{newest}" if newest else "",
        step=result.step,
        metrics=dict(result.metrics),
        outcome=result.outcome,
        reason=result.reason,
        stop_signal=stop_signal,
    )


def resume_publishing(prepared: Prepared) -> RunResult | None:
    """Does what is left to do if an earlier command has trained the run to its end: nothing, or what MLflow did not
    accept. None if there is something to train. Raises as `publish_model`.
    """
    if (done := read_result(prepared.storage)) is not None:
        return done
    training = read_trained(prepared.storage)
    if training is None or prepared.damaged:
        return None
    if training.step != prepared.plan.last_step and not training.early:
        return None
    if not training.identity.matches(prepared.identity):
        return None
    profile, log = prepared.profile, ProgressReporter(prepared.plan).log
    return _complete(training, prepared.storage, profile.tracking_uri, log, profile.failure.driver_timeout_s)


def read_result(storage: RunStorage) -> RunResult | None:
    """The result that the run's end wrote, with the current paths of the run's files: its folder may have been
    moved."""
    content = storage.read(RUN_RESULT)
    if content is None:
        return None
    try:
        result = read_record(RunResult, content)
    except ValueError as error:
        raise Fault(f"{storage.location}/{RUN_RESULT}: is damaged ({error}); delete it and run again") from None
    checkpoint = f"{storage.location}/{result.checkpoint.rpartition('/')[2]}"
    return replace(result, run_dir=storage.location, checkpoint=checkpoint)


def write_result(storage: RunStorage, result: RunResult) -> None:
    write_json(storage.folder / RUN_RESULT, asdict(result))
    storage.upload(storage.folder / RUN_RESULT)


@dataclass(frozen=True)
class FinishedTraining:
    """A finished training."""

    name: str
    """The run's name."""
    step: int
    """The last step; there is a checkpoint of it."""
    metrics: Mapping[str, float]
    recipe: Recipe
    identity: Identity
    validation: DataInput
    validation_digest: str
    """Including the name of the algorithm."""
    register_models: bool
    pictures: Mapping[str, Any]
    """How the training data's pictures became pixels: `checks.picture_settings`."""
    early: str = ""
    """Why it ended before the last step of its plan."""

    @property
    def description(self) -> str:
        """Describes what was reached."""
        top1 = self.metrics.get("val/top1")
        early = f" ({self.early})" if self.early else ""
        return f"training finished after step {self.step}{early}" + ("" if top1 is None else f" at {top1:.2f} % top-1")


def write_trained(storage: RunStorage, training: FinishedTraining) -> None:
    tree = {key: value for key, value in vars(training).items() if key not in ("recipe", "identity", "validation")}
    tree |= {"recipe": to_yaml(training.recipe)}
    tree |= {key: asdict(getattr(training, key)) for key in ("identity", "validation")}
    write_json(storage.folder / _TRAINED, tree)
    storage.upload(storage.folder / _TRAINED)


def read_trained(storage: RunStorage) -> FinishedTraining | None:
    """None if there is none that can be read, or its checkpoint is missing: then the training has to continue."""
    content = storage.read(_TRAINED)
    if content is None:
        return None
    try:
        training = _parsed(json.loads(content))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, UserError):
        return None
    return training if training.step == newest_step(storage) else None


def _parsed(tree: dict[str, Any]) -> FinishedTraining:
    identity = tree["identity"]
    return FinishedTraining(
        **{key: tree[key] for key in ("name", "validation_digest")},
        step=int(tree["step"]),
        metrics={str(key): float(value) for key, value in tree["metrics"].items()},
        recipe=recipe_from_yaml(tree["recipe"], _TRAINED),
        identity=replace(Identity(**identity), class_names=tuple(identity["class_names"])),
        validation=DataInput(**tree["validation"]),
        register_models=tree["register_models"] is True,
        pictures=known_pictures(tree.get("pictures")) or {},
        early=str(tree.get("early", "")),
    )


def publish_model(run: Run, result: WorkerResult) -> RunResult:
    """Publishes a finished run's models to MLflow; leaving the run's block then sends its end.

    Raises Fault, or UserError if the server refuses this user, saying what was reached and how to send the rest; the
    training counts as finished either way.
    """
    prepared = run.prepared
    training = FinishedTraining(
        name=prepared.name,
        step=result.step,
        metrics=dict(result.metrics),
        recipe=prepared.recipe,
        identity=prepared.identity,
        validation=data_inputs(prepared)[1],
        validation_digest=prepared.val.digest,
        register_models=prepared.profile.register_models and not prepared.recipe.data.overfit_batch,
        pictures=picture_settings(prepared.train),
        early=result.reason,
    )
    write_trained(run.storage, training)
    return _publish(training, run.record)


def _publish(training: FinishedTraining, record: MlflowRecord) -> RunResult:
    """Sends unsent metrics, plots, models and their registration. A second call, from any machine, sends what is
    missing."""
    record.reached, record.ending.end = training.description, RunEnd("FINISHED", UNPUBLISHED)
    try:
        require_run(record.handle)
        record.log(f"{training.description}; metrics, plots and model go to MLflow now")
        unsent = record.send_measured()
        if isinstance(unsent, ServerUnavailable):
            raise unsent
        result = _publish_models(training, record)
    except (Fault, UserError, OSError) as error:
        raise record.unpublished(error) from error
    record.ending.end, record.is_published = RunEnd("FINISHED", finished(training.early)), True
    return result


def _publish_models(training: FinishedTraining, record: MlflowRecord) -> RunResult:
    """Logs the last weights as `model`, better ones of an earlier step as `model-best`, registers the better of them if
    the profile says so, and returns where everything is."""
    storage, handle = record.storage, record.handle
    with newest_complete(storage) as found:
        if found is None or found.metadata.step != training.step:
            raise Fault(f"{storage.location}: the checkpoint of step {training.step} is missing or damaged")
        checkpoint = f"{storage.location}/{found.name}"
        last_uri = _log(training, handle, "model", found.directory, training.step, training.metrics)
    best_uri, metrics, best_by = last_uri, training.metrics, training.recipe.eval.best_by
    with open_best(storage, training.identity) as best:
        if best is not None and score(best.metadata.metrics, best_by) > score(metrics, best_by):
            metrics = best.metadata.metrics
            best_uri = _log(training, handle, "model-best", best.directory, best.metadata.step, metrics)
    if training.register_models:
        registered = _register(training, handle, best_uri, metrics)
        record.log(
            f"registered {registered.name} version {registered.version} as candidate"
            + (" and champion" if registered.is_champion else "; the champion stays" + _why(registered))
        )
    return RunResult(
        name=training.name,
        run_dir=storage.location,
        run_id=handle.run_id,
        tracking_uri=redacted(handle.tracking_uri),
        model_uri=last_uri,
        checkpoint=checkpoint,
        step=training.step,
        metrics=dict(training.metrics),
        reason=training.early,
    )


def model_card(training: FinishedTraining, metrics: Mapping[str, float]) -> dict[str, str]:
    """The metadata of a logged model: how it was made, and its input."""
    return {
        "recipe": to_yaml(training.recipe),
        "recipe_hash": training.identity.recipe_hash,
        "data_digest": training.identity.data_digest,
        **{key: f"{value:.6g}" for key, value in metrics.items() if key.startswith("val/")},
    }


def _log(
    training: FinishedTraining,
    handle: RunHandle,
    model_name: str,
    weights: Path,
    step: int,
    metrics: Mapping[str, float],
) -> str:
    model = build_classifier(training.recipe)
    model.net.load_state_dict(evaluated_weights(load_state(weights, torch.device("cpu"))))
    crop = training.recipe.data.eval
    uri = log_classifier(
        handle,
        model.eval(),
        name=model_name,
        input_example=np.zeros((2, crop.size, crop.size, 3), dtype=np.uint8),
        resize=crop.resize,
        interpolation=crop.interpolation,
        class_names=training.identity.class_names,
        pictures=training.pictures,
        metadata=model_card(training, metrics),
        step=step,
    )
    history = read_history(handle.run_dir, handle.run_id)
    values = {key: value for key, value in metrics.items() if key.startswith("val/")}
    log_model_metrics(handle, uri, values, step, history, training.validation)
    return uri


def _register(
    training: FinishedTraining, handle: RunHandle, model_uri: str, metrics: Mapping[str, float]
) -> Registration:
    recipe, identity, best_by = training.recipe, training.identity, training.recipe.eval.best_by
    return register(
        handle,
        f"{recipe.data.dataset}-{recipe.model.name}",
        model_uri,
        Score(training.validation_digest, metrics[f"val/{best_by}"], by=best_by),
        {"recipe_hash": identity.recipe_hash, "data_digest": identity.data_digest},
        identity.class_names,
    )


def _why(registered: Registration) -> str:
    if registered.other_classes is None:
        return ""
    return (
        f", because it has other classes: {registered.other_classes}; move the alias yourself to replace it, or train "
        "under another data.dataset to keep both"
    )


def _complete(
    training: FinishedTraining, storage: RunStorage, tracking_uri: str, log: Log, driver_timeout_s: float
) -> RunResult:
    """Publishes what an earlier command trained, from any machine: needs neither Ray nor the data."""
    with held(storage, driver_timeout_s, log) as lease:
        handle = recorded_run(storage, tracking_uri)
        if handle is None:
            raise Fault(f"{storage.location}: {training.description}, but the record of its MLflow run is gone")
        with MlflowRecord.open(handle, lease, training.identity.class_names, log) as record:
            result = _publish(training, record)
        write_result(storage, result)
    return result


def sync_run(storage: RunStorage, tracking_uri: str, log: Log) -> str:
    """Sends MLflow everything that it lacks of a run, as `train` would have; returns a description.

    Harmless at any time: for a run that a driver is working on, only points are sent. Raises as `sync` and
    `publish_model` do.
    """
    training = read_trained(storage) if read_result(storage) is None else None
    if training is None:
        report = sync(storage, tracking_uri, log=log)
        return _words(report, storage)
    result = _complete(training, storage, tracking_uri, log, FailureConfig().driver_timeout_s)
    return (
        f"{training.description}: run {result.run_id} is complete in MLflow and marked FINISHED, "
        f"model {result.model_uri}"
    )


def _words(report: SyncReport, storage: RunStorage) -> str:
    parts = [f"sent {report.num_points:,} points" if report.num_points else "no point was waiting"]
    end = recorded_end(storage.folder)
    if end is not None:
        was = "" if report.end_status_sent else "was "
        parts.append(f"run {was}marked {end.status}" + (f" ({end.reason})" if end.reason != "finished" else ""))
    elif (driver := driver_of(storage)) is not None:
        parts.append(f"run in progress (pid {driver.pid} on {driver.host})")
    else:
        parts.append("the run has not ended: the `train` command with its name resumes it")
    if report.num_rejected:
        parts.append(
            f"MLflow permanently refused {report.num_rejected:,} items: see tracking/*/rejected.jsonl of the run"
        )
    if report.num_bad_lines:
        parts.append(f"{report.num_bad_lines:,} lines that no tracker wrote were skipped")
    if report.other_runs:
        parts.append(f"left alone, as of other MLflow runs: {', '.join(report.other_runs)}")
    return shown(redacted("; ".join(parts)), None)
