"""A logged classifier, or one that was saved to a folder, as a module that evaluates."""

from __future__ import annotations

import tempfile
from pathlib import Path
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
            raise UserError(f"{uri}: cannot be loaded from {redacted(tracking_uri)}: {first_line(error)}") from error


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
