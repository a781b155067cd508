"""Trained classifiers as models in MLflow, each logged once: its files are written first, then it gets a row there."""

from __future__ import annotations

import base64
import copy
import hashlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from inspect import getfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data_prep.pixels import PictureSettings
from resnet_dist.errors import Fault
from resnet_dist.tracking.connection import mlflow_client
from resnet_dist.tracking.datasets import DataInput
from resnet_dist.tracking.experiment import NOTE_TAG
from resnet_dist.tracking.mlflow_run import RunHandle, newest_steps
from resnet_dist.tracking.spool import History

if TYPE_CHECKING:
    import torch
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

    from resnet_dist.tracking.served_classifier import ServingProtocol

_log = logging.getLogger(__name__)
STEP_TAG = "resnet_dist.step"
"""Tag of a logged model: the step whose weights it has."""
_CODE = "code"
_SERVING_PACKAGES = ("mlflow", "torch", "numpy", "pandas", "pillow")


def log_classifier(
    handle: RunHandle,
    module: torch.nn.Module,
    *,
    name: str,
    input_example: NDArray[np.uint8],
    resize: int,
    interpolation: str = "bilinear",
    class_names: Sequence[str],
    pictures: Mapping[str, Any],
    metadata: Mapping[str, Any],
    step: int,
) -> str:
    """Logs the module as a model of the run; returns its URI, `models:/m-...`. A second call with the same run, name
    and step returns the first one's URI, even if the first process was killed half-way.

    Args:
        module: uint8 [N, H, W, 3] -> logits [N, num_classes]; a copy of it is put in evaluation mode on the CPU.
        input_example: uint8 [2, S, S, 3]; fixes S, while N stays free (with N = 1 torch.export would fix it too).
        resize, interpolation: a served picture's shorter side becomes `resize` px by this filter before its centre of
            S x S px is taken.
        pictures: how the data's pictures became pixels, as the conversion's settings `exif`, `background`, `max_side`.
        metadata: JSON values; `load_weights` returns them with `class_names` and `step` added.

    Raises Fault if the server does not respond or MLflow fails. The module is exported (torch.export, `pt2`) before the
    model gets a row at the server, and a row whose upload failed is deleted: `mlflow.pytorch.log_model` would leave
    one marked FAILED, and logs to the process-wide active run instead of this one.
    """
    if input_example.dtype != np.uint8 or input_example.ndim != 4 or len(input_example) < 2:
        raise ValueError(f"input_example: expected uint8 [2, S, S, 3], got {input_example.dtype} {input_example.shape}")
    from resnet_dist.tracking.served_classifier import ServingProtocol

    protocol = ServingProtocol(
        tuple(class_names),
        size=input_example.shape[1],
        resize=resize,
        interpolation=interpolation,
        pictures=PictureSettings.from_dict(pictures),
        max_side=pictures.get("max_side"),
    )
    with mlflow_client(handle.tracking_uri, f"logging the model {name}") as client:
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

    This adds no point to the run: a point's time and value are part of MLflow's key, and both are taken from the spool,
    even where a step was evaluated again by a group whose sums differ in the last bits. Fault while MLflow does not
    have the run's own points: otherwise `sync` would assume that they, and all points before them in the spool, had
    been sent.
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
    with mlflow_client(handle.tracking_uri, "logging the model's metrics") as client:
        arrived = newest_steps(client, handle.run_id)
        if late := [metric.key for metric in metrics if arrived.get(metric.key, step - 1) < step]:
            raise Fault(f"MLflow does not have the run's {late[0]} of step {step} yet")
        client.log_batch(handle.run_id, metrics=metrics, synchronous=True)


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
    """The model of this run, name and step, if it is complete; incomplete ones, left by a killed process, are
    deleted."""
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


def model_note(model_uri: str, run_name: str, step: int) -> str:
    """Description of a logged model (`models:/m-...`)."""
    return (
        f"The weights of the run *{run_name}* after step {step}, with the preparation of pictures and the names of the "
        "classes. It takes picture files as they are, and needs nothing from the project that trained it:\n\n"
        f"    mlflow models serve --model-uri {model_uri} --env-manager local --port 5001\n"
        """    printf '{"inputs": {"image": ["%s"]}}' "$(base64 < PICTURE)" \\\n"""
        "      | curl -H 'Content-Type: application/json' localhost:5001/invocations -d @-\n"
    )


# The files of a logged model, which plain mlflow loads and serves without this package. It has two flavours:
# `mlflow.pytorch.load_model` gives the net (uint8 images -> logits); `mlflow.pyfunc.load_model` and `mlflow models
# serve` take pictures as they come and return class names (`served_classifier.py`, which is copied into the model
# together with `data_prep/pixels.py`).


def write_model(module: torch.nn.Module, folder: Path, input_example: NDArray[np.uint8], facts: dict[str, Any]) -> None:
    """The net alone, exported (`pt2`): what `mlflow.pytorch.load_model` reads. Arguments: `models.log_classifier`."""
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
    # Given, because mlflow would otherwise load the model in another process to find them (8 s).
    requirements = [f"{package}=={version(package).partition('+')[0]}" for package in _SERVING_PACKAGES]
    with warnings.catch_warnings():
        # torch warns of every weight in NHWC layout; the values are restored correctly all the same.
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


def make_servable(folder: Path, example: NDArray[np.uint8], protocol: ServingProtocol) -> None:
    """Puts `served_classifier.py` into the exported model, as what its pyfunc flavour loads. `example`: one image."""
    from mlflow.models import Model, ModelSignature
    from mlflow.models.utils import _save_example  # mlflow has no public way to replace a saved model's example
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import AnyType, Map
    from PIL import Image

    from resnet_dist.tracking import served_classifier

    loader = copy_code(folder / _CODE)
    (folder / served_classifier.PROTOCOL).write_text(protocol.to_json(), encoding="utf-8")
    model = Model.load(str(folder))
    pyfunc = model.flavors["python_function"]
    del pyfunc["data"], pyfunc["pickle_module_name"], pyfunc["config"]  # the pytorch flavour's; ours: the whole folder
    pyfunc |= {"loader_module": loader, "code": _CODE}
    model.signature = ModelSignature(
        # Any: bytes, base64 or an array; mlflow has no type that is one of these.
        inputs=Schema([ColSpec(AnyType(), served_classifier.COLUMN, required=False)]),
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


def copy_code(folder: Path) -> str:
    """Copies what a served model runs to `folder`, and returns the name of the module to load.

    The package is named by its content: Python keeps modules by their names, and a process may hold models of several
    versions.
    """
    from data_prep.pixels import PictureSettings
    from resnet_dist.tracking.served_classifier import ServedClassifier

    texts = {
        name: Path(getfile(part)).read_text(encoding="utf-8")
        for name, part in (("pixels", PictureSettings), ("served_classifier", ServedClassifier))
    }
    package = f"served_{hashlib.sha256(''.join(texts.values()).encode()).hexdigest()[:16]}"
    (folder / package).mkdir(parents=True)
    (folder / package / "__init__.py").touch()
    for name, text in texts.items():
        ours = text.replace("from data_prep.pixels import", f"from {package}.pixels import")
        (folder / package / f"{name}.py").write_text(ours, encoding="utf-8")
    return f"{package}.served_classifier"
