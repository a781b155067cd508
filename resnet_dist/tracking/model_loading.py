"""What a logged classifier, or one that was saved to a folder, consists of: its tensors and its metadata."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from data_prep.redaction import redacted
from resnet_dist.errors import UserError
from resnet_dist.tracking.model_notes import STEP_TAG
from resnet_dist.tracking.reasons import first_line
from resnet_dist.tracking.server import require_answer
from resnet_dist.tracking.store import connect
from resnet_dist.tracking.uris import sqlite_file

if TYPE_CHECKING:
    import torch
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


def load_weights(uri: str, *, tracking_uri: str | None = None) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of a logged net by their names in it (`net.conv1.weight`), on the CPU, and the metadata that
    `log_classifier` was given. Runs nothing that the model brings: not its code, no pickle, not its graph.

    `uri`: `models:/m-...`, `models:/NAME@alias`, `runs:/RUN/NAME` or a folder; `tracking_uri` None: mlflow's own
    setting (MLFLOW_TRACKING_URI). Raises UserError if there is no such model, Fault if the server does not answer.
    """
    import mlflow
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
            archive = Path(local) / "data" / "model.pt2"
            if not archive.is_file():
                raise UserError(f"{uri}: has no data/model.pt2: it was not logged by resnet-dist")
            return _tensors(archive, uri), facts
        except (MlflowException, OSError) as error:
            raise UserError(f"{uri}: cannot be loaded from {redacted(tracking_uri)}: {first_line(error)}") from error


def _tensors(archive: Path, uri: str) -> dict[str, torch.Tensor]:
    """What `torch.export.save` stored; `torch.export.load` would also evaluate the graph's expressions as Python."""
    import torch
    from torch.export.pt2_archive import _package as package
    from torch.export.pt2_archive.constants import WEIGHTS_CONFIG_FILENAME_FORMAT

    # torch's own errors for a damaged archive are of many kinds, asserts among them
    try:
        reader = package.PT2ArchiveReader(str(archive))
        config = package._load_payload_config(reader, WEIGHTS_CONFIG_FILENAME_FORMAT.format("model"))
        pickled = [name for name, entry in config.config.items() if entry.use_pickle]
        if pickled:
            raise UserError(f"{uri}: {pickled[0]} is a pickle, which could run any program: it is not loaded")
        weights = package._load_state_dict(reader, "model")
        if isinstance(weights, bytes):  # as earlier versions of PyTorch stored them
            weights = torch.load(io.BytesIO(weights), map_location="cpu", weights_only=True)
    except (AssertionError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, UnpicklingError) as error:
        raise UserError(f"{uri}: data/model.pt2 is damaged or no exported net: {first_line(error)}") from None
    return {name: value.detach() for name, value in weights.items()}


def logged_class_names(client: MlflowClient, tracking_uri: str, version: ModelVersion) -> list[str] | None:
    """What a registered version answers, by label; None if its files do not say or are gone."""
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    with tempfile.TemporaryDirectory(prefix="resnet-dist-model-") as folder:
        try:
            location = _location(client, f"models:/{version.name}/{version.version}")
            uri = f"{location.rstrip('/')}/MLmodel"
            facts = Model.load(download_artifacts(uri, dst_path=folder, tracking_uri=tracking_uri)).metadata or {}
        except (MlflowException, OSError):
            return None
    names = facts.get("class_names")
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


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
        return max(finished, key=lambda model: int(model.tags.get(STEP_TAG, -1))).artifact_location
    if scheme != "models":
        return uri
    if "@" in head:
        head, _, alias = head.partition("@")
        tail = client.get_model_version_by_alias(head, alias).version
    if tail:
        source = client.get_model_version_download_uri(head, tail)
        return _location(client, source) if source.startswith("models:/m-") else source
    return client.get_logged_model(head).artifact_location
