"""Trained classifiers in MLflow: logged once; loaded and served by plain mlflow, without our code.

A logged model has two flavours: `mlflow.pytorch.load_model` gives the net (uint8 images -> logits),
`mlflow.pyfunc.load_model` and `mlflow models serve` take pictures as they come and answer with class names
(`served_classifier.py`, a copy of which lies in the model).
"""

from __future__ import annotations

import base64
import copy
import io
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from resnet_dist.errors import UserError
from resnet_dist.tracking.details import DataInput
from resnet_dist.tracking.experiment_view import NOTE_TAG
from resnet_dist.tracking.history import History
from resnet_dist.tracking.mlflow_run import RunHandle
from resnet_dist.tracking.model_notes import model_note
from resnet_dist.tracking.reasons import first_line
from resnet_dist.tracking.server import require_answer
from resnet_dist.tracking.store import connect, mlflow_faults
from resnet_dist.tracking.uris import redact_uri, sqlite_file

if TYPE_CHECKING:
    import torch
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

_log = logging.getLogger(__name__)
_STEP_TAG = "resnet_dist.step"
_SERVING_PACKAGES = ("mlflow", "torch", "numpy", "pandas", "pillow")


def log_classifier(
    handle: RunHandle,
    module: torch.nn.Module,
    *,
    name: str,
    input_example: NDArray[np.uint8],
    resize: int,
    class_names: Sequence[str],
    metadata: Mapping[str, Any],
    step: int,
) -> str:
    """Logs the module as a model of the run; returns its URI, `models:/m-...`. A second call with the same run, name
    and step returns the first one's URI, also if the first process was killed half-way.

    `module`: uint8 [N, H, W, 3] -> logits [N, num_classes]; a copy of it is put in evaluation mode on the CPU.
    `input_example`: uint8 [2, S, S, 3]; fixes S, while N stays free (with N = 1 torch.export would fix it too).
    `resize`: a served picture's shorter side becomes `resize` px before its centre of S x S px is taken.
    `metadata`: JSON values; comes back from `load_classifier` with `class_names` and `step` added.

    Raises Fault if the server does not answer or MLflow fails. The module is exported (torch.export, `pt2`) before the
    model gets a row at the server, and a row whose upload failed is deleted: `mlflow.pytorch.log_model` would leave
    one marked FAILED, and logs to the process-wide active run instead of this one.
    """
    if input_example.dtype != np.uint8 or input_example.ndim != 4 or len(input_example) < 2:
        raise ValueError(f"input_example: expected uint8 [2, S, S, 3], got {input_example.dtype} {input_example.shape}")
    require_answer(handle.tracking_uri)
    with mlflow_faults(handle.tracking_uri, f"logging the model {name}"):
        client = connect(handle.tracking_uri)
        model = _finished_model(client, handle, name, step)
        if model is None:
            facts = {**metadata, "class_names": list(class_names), "step": step}
            with tempfile.TemporaryDirectory(prefix="resnet-dist-model-") as folder:
                local = Path(folder) / "model"
                _export(module, local, input_example, facts)
                _make_servable(local, input_example[0], class_names, resize)
                model = _upload(client, handle, local, name, step)
        _link(client, handle, model.model_id, step)
        return f"models:/{model.model_id}"


def log_model_metrics(
    handle: RunHandle, model_uri: str, values: Mapping[str, float], step: int, history: History, data: DataInput
) -> None:
    """Shows `values`, which the run logged at `step` and were measured on `data`, on the model's page. Raises Fault.

    The run gets no second point: a point's time is part of MLflow's key, and it is the one in the spool.
    """
    from mlflow.entities import Metric

    metrics = [
        Metric(
            key,
            value,
            history.times_ms[key, step],
            step,
            model_id=model_uri.removeprefix("models:/"),
            dataset_name=data.name,
            dataset_digest=data.short_digest,
            run_id=handle.run_id,
        )
        for key, value in values.items()
        if (key, step) in history.times_ms
    ]
    require_answer(handle.tracking_uri)
    with mlflow_faults(handle.tracking_uri, "logging the model's metrics"):
        connect(handle.tracking_uri).log_batch(handle.run_id, metrics=metrics, synchronous=True)


def load_classifier(uri: str, *, tracking_uri: str | None = None) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The module (uint8 [N, H, W, 3] -> logits, on the CPU) and the metadata that `log_classifier` was given.

    `uri`: `models:/m-...`, `models:/NAME@alias`, `runs:/RUN/NAME` or a folder; `tracking_uri` None: mlflow's own
    setting (MLFLOW_TRACKING_URI). The module is a graph in evaluation mode for ever: `.eval()` changes nothing,
    `.train()` raises; `.to(device)` moves it. Raises UserError if there is no such model, Fault if the server does not
    answer.
    """
    import mlflow.pytorch
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    tracking_uri = tracking_uri or mlflow.get_tracking_uri()
    database = sqlite_file(tracking_uri)
    remote = "://" in uri or uri.startswith(("models:/", "runs:/"))
    if remote and database and not database.exists():
        raise UserError(
            f"{uri}: there is no MLflow database {database}; set MLFLOW_TRACKING_URI to the one that has it"
        )
    if not remote and not (Path(uri) / "MLmodel").is_file():
        raise UserError(f"{uri}: not a model: a URI like models:/m-... or a folder with a file MLmodel is expected")
    if remote:
        require_answer(tracking_uri)
    with tempfile.TemporaryDirectory(prefix="resnet-dist-model-") as folder:
        try:
            location = _location(connect(tracking_uri), uri) if remote else uri
            local = download_artifacts(location, dst_path=folder, tracking_uri=tracking_uri)
            facts = Model.load(local).metadata or {}
            return _for_evaluation(mlflow.pytorch.load_model(local)), facts
        except (MlflowException, OSError) as error:
            raise UserError(f"{uri}: cannot be loaded from {redact_uri(tracking_uri)}: {first_line(error)}") from error


def _for_evaluation(graph: torch.nn.Module) -> torch.nn.Module:
    """The graph with an `eval()` that can be called: torch's own raises, as it cannot switch a graph's mode."""
    import torch

    class LoadedClassifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.graph = graph
            self.training = False

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.graph(images)

        def train(self, mode: bool = True) -> LoadedClassifier:
            if mode:
                raise RuntimeError("a logged model cannot be trained; resume from a checkpoint of its run")
            return self

    return LoadedClassifier()


def _location(client: MlflowClient, uri: str) -> str:
    """Where the artifacts of a model URI lie. mlflow's own resolution would ask the process-wide tracking URI."""
    from mlflow.exceptions import MlflowException

    scheme, _, path = uri.partition(":/")
    head, _, tail = path.lstrip("/").partition("/")
    if scheme == "runs":
        run = client.get_run(head)
        condition = f"source_run_id = '{head}' AND name = '{tail}'"
        found = client.search_logged_models([run.info.experiment_id], filter_string=condition)
        finished = [model for model in found if model.status == "READY"]
        if not finished:
            raise MlflowException(f"the run has no finished model named {tail}")
        return max(finished, key=lambda model: int(model.tags.get(_STEP_TAG, -1))).artifact_location
    if scheme != "models":
        return uri
    if "@" in head:
        head, _, alias = head.partition("@")
        tail = client.get_model_version_by_alias(head, alias).version
    if tail:
        source = client.get_model_version_download_uri(head, tail)
        return _location(client, source) if source.startswith("models:/m-") else source
    return client.get_logged_model(head).artifact_location


def _export(module: torch.nn.Module, folder: Path, input_example: NDArray[np.uint8], facts: dict[str, Any]) -> None:
    import mlflow.pytorch
    import torch
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    module = copy.deepcopy(module).cpu().eval()
    with torch.no_grad():
        logits = module(torch.from_numpy(input_example)).numpy()
    signature = ModelSignature(
        # Unnamed: with a name, pyfunc wraps an array into a dict, which mlflow's PyTorch flavour then refuses.
        inputs=Schema([TensorSpec(input_example.dtype, (-1, *input_example.shape[1:]))]),
        outputs=Schema([TensorSpec(logits.dtype, (-1, *logits.shape[1:]))]),
    )
    # Stated, because mlflow would find them out by loading the model in another process (8 s).
    requirements = [f"{package}=={version(package).partition('+')[0]}" for package in _SERVING_PACKAGES]
    with warnings.catch_warnings():
        # torch says so of every weight in NHWC layout; the values come back whole all the same.
        warnings.filterwarnings("ignore", message="No complete tensor found in the group")
        mlflow.pytorch.save_model(
            module,
            str(folder),
            signature=signature,
            input_example=input_example,
            metadata=facts,
            serialization_format="pt2",
            pip_requirements=requirements,
        )


def _make_servable(folder: Path, example: NDArray[np.uint8], class_names: Sequence[str], resize: int) -> None:
    """Puts `served_classifier.py` into the exported model, as what its pyfunc flavour loads."""
    from mlflow.models import Model, ModelSignature
    from mlflow.models.utils import _save_example  # mlflow has no public way to give a saved model another example
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import AnyType, Map
    from PIL import Image

    from resnet_dist.tracking import served_classifier

    code = folder / "code"
    code.mkdir()
    shutil.copy(served_classifier.__file__, code)
    protocol = {"class_names": list(class_names), "size": example.shape[0], "resize": resize}
    (folder / served_classifier.PROTOCOL).write_text(json.dumps(protocol), encoding="utf-8")
    model = Model.load(str(folder))
    pyfunc = model.flavors["python_function"]
    del pyfunc["data"], pyfunc["pickle_module_name"], pyfunc["config"]  # the pytorch flavour's; ours: the whole folder
    pyfunc |= {"loader_module": "served_classifier", "code": "code"}
    model.signature = ModelSignature(
        # Any: bytes, base64 or an array; mlflow has no type that is one of these.
        inputs=Schema([ColSpec(AnyType(), served_classifier.COLUMN)]),
        outputs=Schema(
            [
                ColSpec(DataType.string, "class"),
                ColSpec(DataType.double, "probability"),
                ColSpec(Map(DataType.double), "probabilities"),
            ]
        ),
    )
    png = io.BytesIO()
    Image.fromarray(example).save(png, format="PNG")
    for old in folder.glob("*input_example.json"):
        old.unlink()
    _save_example(model, {served_classifier.COLUMN: [base64.b64encode(png.getvalue()).decode()]}, str(folder))
    model.save(str(folder / "MLmodel"))


def _upload(client: MlflowClient, handle: RunHandle, folder: Path, name: str, step: int) -> LoggedModel:
    from mlflow.models import Model

    run = client.get_run(handle.run_id)
    model = client.create_logged_model(
        handle.experiment_id,
        name=name,
        source_run_id=handle.run_id,
        tags={_STEP_TAG: str(step)},
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
    mine = [model for model in found if model.tags.get(_STEP_TAG) == str(step)]
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
