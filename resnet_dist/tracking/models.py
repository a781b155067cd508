"""Trained classifiers in MLflow, each logged once: the files are made first (`model_files.py`), then they get a row."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data_prep.pixels import PictureSettings
from resnet_dist.tracking.preparations import DataInput
from resnet_dist.tracking.experiment_view import NOTE_TAG
from resnet_dist.tracking.history import History
from resnet_dist.tracking.mlflow_run import RunHandle
from resnet_dist.tracking.model_files import make_servable, write_model
from resnet_dist.tracking.model_notes import STEP_TAG, model_note
from resnet_dist.tracking.server import require_answer
from resnet_dist.tracking.store import connect, mlflow_faults

if TYPE_CHECKING:
    import torch
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

_log = logging.getLogger(__name__)


def log_classifier(
    handle: RunHandle,
    module: torch.nn.Module,
    *,
    name: str,
    input_example: NDArray[np.uint8],
    resize: int,
    class_names: Sequence[str],
    pictures: Mapping[str, Any],
    metadata: Mapping[str, Any],
    step: int,
) -> str:
    """Logs the module as a model of the run; returns its URI, `models:/m-...`. A second call with the same run, name
    and step returns the first one's URI, also if the first process was killed half-way.

    `module`: uint8 [N, H, W, 3] -> logits [N, num_classes]; a copy of it is put in evaluation mode on the CPU.
    `input_example`: uint8 [2, S, S, 3]; fixes S, while N stays free (with N = 1 torch.export would fix it too).
    `resize`: a served picture's shorter side becomes `resize` px before its centre of S x S px is taken.
    `pictures`: how the data's pictures became pixels: the conversion's settings `exif`, `background` and `max_side`.
    `metadata`: JSON values; comes back from `load_classifier` with `class_names` and `step` added.

    Raises Fault if the server does not answer or MLflow fails. The module is exported (torch.export, `pt2`) before the
    model gets a row at the server, and a row whose upload failed is deleted: `mlflow.pytorch.log_model` would leave
    one marked FAILED, and logs to the process-wide active run instead of this one.
    """
    if input_example.dtype != np.uint8 or input_example.ndim != 4 or len(input_example) < 2:
        raise ValueError(f"input_example: expected uint8 [2, S, S, 3], got {input_example.dtype} {input_example.shape}")
    from resnet_dist.tracking.served_classifier import Protocol

    protocol = Protocol(
        tuple(class_names),
        size=input_example.shape[1],
        resize=resize,
        pictures=PictureSettings.from_dict(pictures),
        max_side=pictures.get("max_side"),
    )
    require_answer(handle.tracking_uri)
    with mlflow_faults(handle.tracking_uri, f"logging the model {name}"):
        client = connect(handle.tracking_uri)
        model = _finished_model(client, handle, name, step)
        if model is None:
            facts = {**metadata, "class_names": list(class_names), "pictures": dict(pictures), "step": step}
            with tempfile.TemporaryDirectory(prefix="resnet-dist-model-") as folder:
                local = Path(folder) / "model"
                write_model(module, local, input_example, facts)
                make_servable(local, input_example[0], protocol)
                model = _upload(client, handle, local, name, step)
        _link(client, handle, model.model_id, step)
        return f"models:/{model.model_id}"


def log_model_metrics(
    handle: RunHandle, model_uri: str, values: Iterable[str], step: int, history: History, data: DataInput
) -> None:
    """Shows what the run logged under these names at `step`, measured on `data`, on the model's page. Raises Fault.

    The run gets no second point: a point's time and value are part of MLflow's key, and they are those in the spool,
    also where a step was evaluated again, by a group whose sums have other last bits.
    """
    from mlflow.entities import Metric

    metrics = [
        Metric(
            key,
            next(value for at, value in history.points[key] if at == step),
            history.times_ms[key, step],
            step,
            model_id=model_uri.removeprefix("models:/"),
            dataset_name=data.name,
            dataset_digest=data.short_digest,
            run_id=handle.run_id,
        )
        for key in values
        if (key, step) in history.times_ms
    ]
    require_answer(handle.tracking_uri)
    with mlflow_faults(handle.tracking_uri, "logging the model's metrics"):
        connect(handle.tracking_uri).log_batch(handle.run_id, metrics=metrics, synchronous=True)


def _upload(client: MlflowClient, handle: RunHandle, folder: Path, name: str, step: int) -> LoggedModel:
    from mlflow.models import Model

    run = client.get_run(handle.run_id)
    model = client.create_logged_model(
        handle.experiment_id,
        name=name,
        source_run_id=handle.run_id,
        tags={STEP_TAG: str(step)},
        params=run.data.params,
        model_type="classifier",
    )
    try:
        note = model_note(f"models:/{model.model_id}", run.info.run_name, step)
        client.set_logged_model_tags(model.model_id, {NOTE_TAG: note})
        description = Model.load(str(folder))
        description.model_id = description.model_uuid = model.model_id
        description.run_id = handle.run_id
        description.artifact_path = model.artifact_location
        description.save(str(folder / "MLmodel"))
        client.log_model_artifacts(model.model_id, str(folder))
        return client.finalize_logged_model(model.model_id, "READY")
    except BaseException:
        try:
            client.delete_logged_model(model.model_id)
        except Exception:  # noqa: BLE001 - the first error is the one to raise
            _log.warning("the half-logged model %s is deleted at the next attempt", model.model_id, exc_info=True)
        raise


def _finished_model(client: MlflowClient, handle: RunHandle, name: str, step: int) -> LoggedModel | None:
    """The model of this run, name and step, if it is complete; half ones, left by a killed process, are deleted."""
    condition = f"source_run_id = '{handle.run_id}' AND name = '{name}'"
    found = client.search_logged_models([handle.experiment_id], filter_string=condition)
    mine = [model for model in found if model.tags.get(STEP_TAG) == str(step)]
    finished = [model for model in mine if model.status == "READY"]
    for model in mine:
        if model not in finished:
            client.delete_logged_model(model.model_id)
    return finished[0] if finished else None


def _link(client: MlflowClient, handle: RunHandle, model_id: str, step: int) -> None:
    """Shows the model on the run's page. Done last and checked first: the process may have been killed before it."""
    from mlflow.entities import LoggedModelOutput

    outputs = client.get_run(handle.run_id).outputs
    if model_id not in [output.model_id for output in (outputs.model_outputs if outputs else [])]:
        client.log_outputs(handle.run_id, [LoggedModelOutput(model_id, step=step)])
