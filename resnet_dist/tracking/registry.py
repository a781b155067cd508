"""The model registry, and models read back from MLflow.

The model of every finished run is a `candidate`; the best on the same data is the `champion`.
"""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from data_prep.beton.class_names import difference
from data_prep.redaction import redacted
from resnet_dist.errors import UserError
from resnet_dist.tracking.connection import connect, first_line, mlflow_client, require_server, sqlite_file
from resnet_dist.tracking.mlflow_run import RunHandle
from resnet_dist.tracking.models import STEP_TAG

if TYPE_CHECKING:
    import torch
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CANDIDATE, CHAMPION = "candidate", "champion"
_DIGEST_TAG, _MODEL_TAG, _CLASSES_TAG = "evaluated_on", "model_id", "classes"
_VALUE_TAGS = {"top1": "val_top1", "balanced_top1": "val_balanced_top1", "loss": "val_loss"}
"""By what models were judged, and the tag with the value."""
_IN_WORDS = {"top1": "top-1", "balanced_top1": "balanced top-1"}
_RIVALRY_MS = 600_000
"""Versions registered within this time of each other may have been registered concurrently."""


@dataclass(frozen=True)
class Score:
    data_digest: str
    """Digest of the data that the value was measured on."""
    value: float
    """Percent; for `loss`, nats."""
    classes: str = ""
    """Digest of the class names in their order; empty where they are not known."""
    by: str = "top1"
    """Which metric the value is of: the recipe's `eval.best_by`."""

    @property
    def rank(self) -> float:
        """Larger is better."""
        return -self.value if self.by == "loss" else self.value

    @property
    def in_words(self) -> str:
        return f"loss {self.value:.4f}" if self.by == "loss" else f"{self.value:.2f} % {_IN_WORDS[self.by]}"


@dataclass(frozen=True)
class Registration:
    name: str
    version: str
    is_champion: bool
    other_classes: str | None = None
    """Why the champion cannot be compared, if its classes are not the model's."""


def becomes_champion(new: Score, champion: Score | None) -> bool:
    """The first model becomes champion; another one only if it is better by the same metric on the same data and has
    the same classes. Accuracies on different data do not say which model is better, and whoever serves the champion
    expects its classes: a champion of other data, metric or classes stays until a person moves the alias.
    """
    return champion is None or (
        (new.data_digest, new.by) == (champion.data_digest, champion.by)
        and _may_be_same_classes(new, champion)
        and new.rank > champion.rank
    )


def digest_of(class_names: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(class_names)).encode()).hexdigest()[:16]


def _may_be_same_classes(one: Score, other: Score) -> bool:
    return one.classes == other.classes or not (one.classes and other.classes)


def register(
    handle: RunHandle,
    name: str,
    model_uri: str,
    score: Score,
    tags: Mapping[str, str],
    class_names: Sequence[str],
) -> Registration:
    """Makes the logged model (`models:/m-...`) a version of the registered model `name`; a second call finds it.

    Its alias is `candidate`, and `champion` too if `becomes_champion` says so and the champion has the same
    `class_names`. Raises Fault.
    """
    score = replace(score, classes=digest_of(class_names))
    with mlflow_client(handle.tracking_uri, f"registering the model {name}") as client:
        _ensure_registered(client, name)
        model_id = model_uri.removeprefix("models:/")
        version = _known_version(client, name, model_id) or _create_version(client, handle, name, model_id, score, tags)
        client.set_registered_model_alias(name, CANDIDATE, version.version)
        champion = _champion(client, name)
        other = _other_classes(client, handle.tracking_uri, champion, class_names) if champion else None
        if other is None:
            champion = _promote(client, name, version, score)
        assert champion is not None
        return Registration(name, str(version.version), champion.version == version.version, other)


def _promote(client: MlflowClient, name: str, version: ModelVersion, score: Score) -> ModelVersion:
    """Moves `champion` to `version`, or to a rival, if that is better; returns the champion.

    MLflow has no compare-and-set: of two runs that end together, both may find the old champion, and the one that is
    slower to set the alias would take it from the better one. So a version is created with its score first, all rivals
    are checked again after every change of the alias, and a better one replaces it. The last process to set the alias
    has seen every version created before that, and the run of the newest version checks after creating it.
    """
    while True:
        champion = _champion(client, name)
        rivals = _rivals(client, name, version, score)
        best = max(rivals, key=lambda rival: (_score_of(rival, score).rank, -int(rival.version)))
        if champion is not None and (
            champion.version == best.version or not becomes_champion(_score_of(best, score), _score_of(champion, score))
        ):
            return champion
        client.set_registered_model_alias(name, CHAMPION, best.version)


def _other_classes(
    client: MlflowClient, tracking_uri: str, champion: ModelVersion, class_names: Sequence[str]
) -> str | None:
    """How the champion's classes differ from these; None if they do not, or are not known."""
    known = champion.tags.get(_CLASSES_TAG)
    if known == digest_of(class_names):
        return None
    names = logged_class_names(client, tracking_uri, champion)
    if names is None:
        return "they have other names or another order" if known else None
    return difference(names, class_names, f"the champion (version {champion.version})", "this model")


def _rivals(client: MlflowClient, name: str, version: ModelVersion, score: Score) -> list[ModelVersion]:
    """`version` and those of the same data registered at about the same time. Not all: a person may have preferred
    another."""
    found = client.search_model_versions(f"name = '{name}' AND tags.{_DIGEST_TAG} = '{score.data_digest}'")
    return [version] + [
        other
        for other in found
        if other.version != version.version
        and _score_of(other, score).by == score.by
        and _may_be_same_classes(_score_of(other, score), score)
        and abs(other.creation_timestamp - version.creation_timestamp) <= _RIVALRY_MS
    ]


def _ensure_registered(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    description = (
        f"Each version comes from one finished run. `{CANDIDATE}` is the newest one, `{CHAMPION}` the best on its "
        "validation data:\n\n"
        f"    mlflow models serve --model-uri models:/{name}@{CHAMPION} --env-manager local --port 5001\n"
    )
    try:
        client.create_registered_model(name, description=description)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _known_version(client: MlflowClient, name: str, model_id: str) -> ModelVersion | None:
    found = client.search_model_versions(f"name = '{name}' AND tags.{_MODEL_TAG} = '{model_id}'")
    return min(found, key=lambda version: int(version.version)) if found else None


def _create_version(
    client: MlflowClient, handle: RunHandle, name: str, model_id: str, score: Score, tags: Mapping[str, str]
) -> ModelVersion:
    source = f"models:/{model_id}"
    if sqlite_file(handle.tracking_uri):  # mlflow would resolve models:/ with the process-wide tracking URI
        source = client.get_logged_model(model_id).artifact_location
    run_name = client.get_run(handle.run_id).info.run_name
    own_tags = {
        _MODEL_TAG: model_id,  # mlflow's sqlite registry forgets it
        _DIGEST_TAG: score.data_digest,
        _VALUE_TAGS[score.by]: repr(score.value),
        _CLASSES_TAG: score.classes,
    }
    return client.create_model_version(
        name,
        source,
        run_id=handle.run_id,
        tags={**tags, **own_tags},
        description=f"{score.in_words} on the validation data {score.data_digest}; from the run {run_name}.",
        model_id=model_id,
        await_creation_for=None,
    )


def _champion(client: MlflowClient, name: str) -> ModelVersion | None:
    version = client.get_registered_model(name).aliases.get(CHAMPION)
    return client.get_model_version(name, version) if version is not None else None


def _score_of(version: ModelVersion, like: Score) -> Score:
    """From a version's tags. A version that a person registered has none: it counts as having other data, and stays
    champion."""
    tags = version.tags
    try:
        by, value = next((by, float(tags[tag])) for by, tag in _VALUE_TAGS.items() if tag in tags)
        return Score(tags[_DIGEST_TAG], value, tags.get(_CLASSES_TAG, ""), by)
    except (KeyError, ValueError, StopIteration):
        return Score(f"not {like.data_digest}", 0.0)


# Reads a classifier back, logged or saved to a folder: its tensors and its metadata.


def load_weights(uri: str, *, tracking_uri: str | None = None) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of a logged net by their names in it (`net.conv1.weight`), on the CPU, and the metadata that
    `log_classifier` was given. Runs nothing from the model: no code, no pickle, no graph.

    `uri`: `models:/m-...`, `models:/NAME@alias`, `runs:/RUN/NAME` or a folder; `tracking_uri` None: mlflow's own
    setting (MLFLOW_TRACKING_URI). Raises UserError if there is no such model, Fault if the server does not respond.
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
        require_server(tracking_uri)
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

    # torch raises many kinds of errors for a damaged archive, even AssertionError
    try:
        reader = package.PT2ArchiveReader(str(archive))
        config = package._load_payload_config(reader, WEIGHTS_CONFIG_FILENAME_FORMAT.format("model"))
        pickled = [name for name, entry in config.config.items() if entry.use_pickle]
        if pickled:
            raise UserError(f"{uri}: {pickled[0]} is a pickle, which could run any code, so it is not loaded")
        weights = package._load_state_dict(reader, "model")
        if isinstance(weights, bytes):  # as earlier versions of PyTorch stored them
            weights = torch.load(io.BytesIO(weights), map_location="cpu", weights_only=True)
    except (AssertionError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, UnpicklingError) as error:
        raise UserError(f"{uri}: data/model.pt2 is damaged or not an exported net: {first_line(error)}") from None
    return {name: value.detach() for name, value in weights.items()}


def logged_class_names(client: MlflowClient, tracking_uri: str, version: ModelVersion) -> list[str] | None:
    """A registered version's class names, by label; None if its files do not have them or are gone."""
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
    """Where the artifacts of a model URI are. mlflow's own resolution would ask the process-wide tracking URI."""
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
