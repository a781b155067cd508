"""The model registry: every finished run's model is a `candidate`; the best on the same data is the `champion`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from resnet_dist.tracking.mlflow_run import RunHandle
from resnet_dist.tracking.model_notes import registered_note, version_note
from resnet_dist.tracking.server import require_answer
from resnet_dist.tracking.store import connect, mlflow_faults
from resnet_dist.tracking.uris import sqlite_file

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CANDIDATE, CHAMPION = "candidate", "champion"
_DIGEST_TAG, _TOP1_TAG, _MODEL_TAG = "evaluated_on", "val_top1", "model_id"
_RIVALRY_MS = 600_000
"""Versions registered within this time of each other may have met while their runs ended."""


@dataclass(frozen=True)
class Score:
    data_digest: str
    """Digest of the data that the accuracy was measured on."""
    top1: float
    """Percent."""


@dataclass(frozen=True)
class Registration:
    name: str
    version: str
    is_champion: bool


def becomes_champion(new: Score, champion: Score | None) -> bool:
    """The first model does; another one only if it is better on the very same data. Accuracies on different data say
    nothing about which model is better, so a champion of other data stays until a person moves the alias.
    """
    return champion is None or (new.data_digest == champion.data_digest and new.top1 > champion.top1)


def register(handle: RunHandle, name: str, model_uri: str, score: Score, tags: Mapping[str, str]) -> Registration:
    """Makes the logged model (`models:/m-...`) a version of the registered model `name`; a second call finds it.

    Its alias is `candidate`, and `champion` too if `becomes_champion` says so. Raises Fault.
    """
    require_answer(handle.tracking_uri)
    with mlflow_faults(handle.tracking_uri, f"registering the model {name}"):
        client = connect(handle.tracking_uri)
        _ensure_registered(client, name)
        version = _known_version(client, name, model_uri) or _create_version(
            client, handle, name, model_uri, score, {**tags, **_tags(model_uri, score)}
        )
        client.set_registered_model_alias(name, CANDIDATE, version.version)
        champion = _promote(client, name, version, score)
        return Registration(name, str(version.version), champion.version == version.version)


def _promote(client: MlflowClient, name: str, version: ModelVersion, score: Score) -> ModelVersion:
    """Moves `champion` if `version` deserves it, or a rival of it does; returns the champion.

    MLflow has no compare-and-set: of two runs that end together, both may find the old champion, and the one that is
    slower to set the alias would take it from the better one. So a version is created with its score first, every
    setting is followed by another look at all rivals, and whoever sees a better one puts that in its place: the last
    to set the alias has seen every version that was created before, and the last version's own run looks after that.
    """
    while True:
        champion = _champion(client, name)
        rivals = _rivals(client, name, version, score)
        best = max(rivals, key=lambda rival: (_score_of(rival, score).top1, -int(rival.version)))
        if champion is not None and (
            champion.version == best.version or not becomes_champion(_score_of(best, score), _score_of(champion, score))
        ):
            return champion
        client.set_registered_model_alias(name, CHAMPION, best.version)


def _rivals(client: MlflowClient, name: str, version: ModelVersion, score: Score) -> list[ModelVersion]:
    """`version` and those of the same data registered about then. Not all: a person may have preferred another one."""
    found = client.search_model_versions(f"name = '{name}' AND tags.{_DIGEST_TAG} = '{score.data_digest}'")
    return [version] + [
        other
        for other in found
        if other.version != version.version
        and abs(other.creation_timestamp - version.creation_timestamp) <= _RIVALRY_MS
    ]


def _ensure_registered(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description=registered_note(name, CANDIDATE, CHAMPION))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _model_id(model_uri: str) -> str:
    return model_uri.removeprefix("models:/")


def _tags(model_uri: str, score: Score) -> dict[str, str]:
    # The id is a tag too: mlflow's sqlite registry forgets it.
    return {_MODEL_TAG: _model_id(model_uri), _DIGEST_TAG: score.data_digest, _TOP1_TAG: repr(score.top1)}


def _known_version(client: MlflowClient, name: str, model_uri: str) -> ModelVersion | None:
    found = client.search_model_versions(f"name = '{name}' AND tags.{_MODEL_TAG} = '{_model_id(model_uri)}'")
    return min(found, key=lambda version: int(version.version)) if found else None


def _create_version(
    client: MlflowClient, handle: RunHandle, name: str, model_uri: str, score: Score, tags: dict[str, str]
) -> ModelVersion:
    source = model_uri
    if sqlite_file(handle.tracking_uri):  # mlflow would resolve models:/ with the process-wide tracking URI
        source = client.get_logged_model(_model_id(model_uri)).artifact_location
    return client.create_model_version(
        name,
        source,
        run_id=handle.run_id,
        tags=tags,
        description=version_note(score.top1, score.data_digest, client.get_run(handle.run_id).info.run_name),
        model_id=_model_id(model_uri),
        await_creation_for=None,
    )


def _champion(client: MlflowClient, name: str) -> ModelVersion | None:
    version = client.get_registered_model(name).aliases.get(CHAMPION)
    return client.get_model_version(name, version) if version is not None else None


def _score_of(version: ModelVersion, like: Score) -> Score:
    """What a version's tags say. One that a person registered has none: it counts as of other data, and stays."""
    try:
        return Score(version.tags[_DIGEST_TAG], float(version.tags[_TOP1_TAG]))
    except (KeyError, ValueError):
        return Score(f"not {like.data_digest}", 0.0)
