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
from resnet_dist.launch.run import UNPUBLISHED, Record, Run
from resnet_dist.storage.base import RunStorage, write_json
from resnet_dist.tracking.connection import Unanswered
from resnet_dist.tracking.datasets import DataInput
from resnet_dist.tracking.mlflow_run import RunEnd, RunHandle, recorded_end, recorded_run, require_run
from resnet_dist.tracking.models import log_classifier, log_model_metrics
from resnet_dist.tracking.registry import Registration, Score, register
from resnet_dist.tracking.spool import read_history
from resnet_dist.tracking.sync import SyncReport, sync
from resnet_dist.training.checkpoint import Identity, load_state, newest_complete, newest_step
from resnet_dist.training.checkpoint_manager import open_best
from resnet_dist.training.context import WorkerResult
from resnet_dist.training.model import build_classifier
from resnet_dist.training.state import evaluated_weights

_RESULT = "result.json"
"""Written last of all into the run's folder; its presence means that the run is complete."""
_TRAINED = "trained.json"
"""Written when the training is over. With the checkpoint this is all that publishing needs, so any command on any
machine that sees the storage can publish, without Ray and the data."""


@dataclass(frozen=True)
class RunResult:
    name: str
    run_dir: str
    run_id: str
    """MLflow's."""
    tracking_uri: str
    model_uri: str
    checkpoint: str
    step: int
    metrics: Mapping[str, float]


def read_result(storage: RunStorage) -> RunResult | None:
    """The result that the run's end wrote, with the current paths of the run's files: its folder may have been
    moved."""
    content = storage.read(_RESULT)
    if content is None:
        return None
    try:
        result = read_record(RunResult, content)
    except ValueError as error:
        raise Fault(f"{storage.location}/{_RESULT}: is damaged ({error}); delete it and run again") from None
    checkpoint = f"{storage.location}/{result.checkpoint.rpartition('/')[2]}"
    return replace(result, run_dir=storage.location, checkpoint=checkpoint)


def write_result(storage: RunStorage, result: RunResult) -> None:
    write_json(storage.folder / _RESULT, asdict(result))
    storage.upload(storage.folder / _RESULT)


@dataclass(frozen=True)
class Trained:
    """A finished training."""

    name: str
    """Of the run."""
    step: int
    """Its last; there is a checkpoint of it."""
    metrics: Mapping[str, float]
    recipe: Recipe
    identity: Identity
    validation: DataInput
    validation_digest: str
    """With the name of its algorithm."""
    register_models: bool
    pictures: Mapping[str, Any]
    """How the training data's pictures became pixels: `checks.picture_settings`."""

    @property
    def words(self) -> str:
        """Describes what was reached."""
        top1 = self.metrics.get("val/top1")
        return f"training finished after step {self.step}" + ("" if top1 is None else f" at {top1:.2f} % top-1")


def trained_run(prepared: Prepared, result: WorkerResult) -> Trained:
    return Trained(
        name=prepared.name,
        step=result.step,
        metrics=dict(result.metrics),
        recipe=prepared.recipe,
        identity=prepared.identity,
        validation=data_inputs(prepared)[1],
        validation_digest=prepared.val.digest,
        register_models=prepared.profile.register_models,
        pictures=picture_settings(prepared.train),
    )


def write_trained(storage: RunStorage, trained: Trained) -> None:
    tree = {key: value for key, value in vars(trained).items() if key not in ("recipe", "identity", "validation")}
    tree |= {"recipe": to_yaml(trained.recipe)}
    tree |= {key: asdict(getattr(trained, key)) for key in ("identity", "validation")}
    write_json(storage.folder / _TRAINED, tree)
    storage.upload(storage.folder / _TRAINED)


def read_trained(storage: RunStorage) -> Trained | None:
    """None if there is none that can be read, or its checkpoint is missing: then the training has to continue."""
    content = storage.read(_TRAINED)
    if content is None:
        return None
    try:
        trained = _parsed(json.loads(content))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, UserError):
        return None
    return trained if trained.step == newest_step(storage) else None


def _parsed(tree: dict[str, Any]) -> Trained:
    identity = tree["identity"]
    return Trained(
        **{key: tree[key] for key in ("name", "validation_digest")},
        step=int(tree["step"]),
        metrics={str(key): float(value) for key, value in tree["metrics"].items()},
        recipe=recipe_from_yaml(tree["recipe"], _TRAINED),
        identity=replace(Identity(**identity), class_names=tuple(identity["class_names"])),
        validation=DataInput(**tree["validation"]),
        register_models=tree["register_models"] is True,
        pictures=known_pictures(tree.get("pictures")) or {},
    )


def publish_model(run: Run, result: WorkerResult) -> RunResult:
    """Publishes a finished run's models to MLflow; leaving the run's block then sends its end. Raises as `publish`."""
    trained = trained_run(run.prepared, result)
    write_trained(run.storage, trained)
    return publish(trained, run.record)


def publish(trained: Trained, record: Record) -> RunResult:
    """Publishes a finished training to MLflow: unsent metrics, plots, models, their registration.

    A second call, from any machine, does what is missing. Raises Fault, or UserError if the server refuses this user,
    saying what was reached and how to send the rest; the training counts as finished either way.
    """
    record.trained, record.end = trained.words, RunEnd("FINISHED", UNPUBLISHED)
    try:
        require_run(record.handle)
        record.log(f"{trained.words}; metrics, plots and model go to MLflow now")
        unsent = record.send_measured()
        if isinstance(unsent, Unanswered):
            raise unsent
        result = _publish_models(trained, record)
    except (Fault, UserError, OSError) as error:
        raise record.unpublished(error) from error
    record.end = RunEnd("FINISHED", "finished")
    return result


def _publish_models(trained: Trained, record: Record) -> RunResult:
    """Logs the last weights as `model`, better ones of an earlier step as `model-best`, registers the better of them if
    the profile says so, and returns where everything is."""
    storage, handle = record.storage, record.handle
    with newest_complete(storage) as found:
        if found is None or found.metadata.step != trained.step:
            raise Fault(f"{storage.location}: the checkpoint of step {trained.step} is missing or damaged")
        checkpoint = f"{storage.location}/{found.name}"
        last_uri = _log(trained, handle, "model", found.directory, trained.step, trained.metrics)
    best_uri, metrics = last_uri, trained.metrics
    with open_best(storage, trained.identity) as best:
        if best is not None and best.metadata.metrics["val/top1"] > metrics["val/top1"]:
            metrics = best.metadata.metrics
            best_uri = _log(trained, handle, "model-best", best.directory, best.metadata.step, metrics)
    if trained.register_models:
        registered = _register(trained, handle, best_uri, metrics)
        record.log(
            f"registered {registered.name} version {registered.version} as candidate"
            + (" and champion" if registered.is_champion else "; the champion stays" + _why(registered))
        )
    return RunResult(
        name=trained.name,
        run_dir=storage.location,
        run_id=handle.run_id,
        tracking_uri=redacted(handle.tracking_uri),
        model_uri=last_uri,
        checkpoint=checkpoint,
        step=trained.step,
        metrics=dict(trained.metrics),
    )


def model_card(trained: Trained, metrics: Mapping[str, float]) -> dict[str, str]:
    """The metadata of a logged model: how it was made, and its input."""
    return {
        "recipe": to_yaml(trained.recipe),
        "recipe_hash": trained.identity.recipe_hash,
        "data_digest": trained.identity.data_digest,
        **{key: f"{value:.6g}" for key, value in metrics.items() if key.startswith("val/")},
    }


def _log(
    trained: Trained, handle: RunHandle, model_name: str, weights: Path, step: int, metrics: Mapping[str, float]
) -> str:
    model = build_classifier(trained.recipe)
    model.net.load_state_dict(evaluated_weights(load_state(weights, torch.device("cpu"))))
    crop = trained.recipe.data.eval
    uri = log_classifier(
        handle,
        model.eval(),
        name=model_name,
        input_example=np.zeros((2, crop.size, crop.size, 3), dtype=np.uint8),
        resize=crop.resize,
        class_names=trained.identity.class_names,
        pictures=trained.pictures,
        metadata=model_card(trained, metrics),
        step=step,
    )
    history = read_history(handle.run_dir, handle.run_id)
    values = {key: value for key, value in metrics.items() if key.startswith("val/")}
    log_model_metrics(handle, uri, values, step, history, trained.validation)
    return uri


def _register(trained: Trained, handle: RunHandle, model_uri: str, metrics: Mapping[str, float]) -> Registration:
    recipe, identity = trained.recipe, trained.identity
    return register(
        handle,
        f"{recipe.data.dataset}-{recipe.model.name}",
        model_uri,
        Score(trained.validation_digest, metrics["val/top1"]),
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


def trained_before(prepared: Prepared) -> Trained | None:
    """What an earlier command trained, to the end that is still requested, but could not publish to MLflow."""
    trained = read_trained(prepared.storage)
    if trained is None or trained.step != prepared.plan.last_step or prepared.damaged:
        return None
    return trained if trained.identity.is_of(prepared.identity) else None


def complete(
    trained: Trained,
    storage: RunStorage,
    tracking_uri: str,
    log: Log,
    *,
    driver_timeout_s: float = FailureConfig().driver_timeout_s,
) -> RunResult:
    """Publishes what an earlier command trained, from any machine: needs neither Ray nor the data. Raises as
    `publish`."""
    with held(storage, driver_timeout_s, log) as lease:
        handle = recorded_run(storage, tracking_uri)
        if handle is None:
            raise Fault(f"{storage.location}: {trained.words}, but the record of its MLflow run is gone")
        with Record(handle, lease, trained.identity.class_names, log) as record:
            result = publish(trained, record)
        write_result(storage, result)
    return result


def sync_run(storage: RunStorage, tracking_uri: str, log: Log) -> str:
    """Sends MLflow everything that it lacks of a run, as `train` would have; returns a description.

    Harmless at any time: for a run that a driver is working on, only points are sent. Raises as `sync` and `complete`
    do.
    """
    trained = read_trained(storage) if read_result(storage) is None else None
    if trained is None:
        report = sync(storage, tracking_uri, log=log)
        return _words(report, storage)
    result = complete(trained, storage, tracking_uri, log)
    return f"{trained.words}: run {result.run_id} is complete in MLflow and marked FINISHED, model {result.model_uri}"


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
