"""What makes a run readable: description, data sets, configuration and code as small files, plots. The driver logs it.

Everything here may be logged twice: a later driver of the same run replaces files and tags, and adds no second input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from data_prep.redaction import redacted, redacted_values
from resnet_dist.tracking.mlflow_run import RunHandle
from resnet_dist.tracking.preparations import DataInput, dataset_input
from resnet_dist.tracking.server import require_answer
from resnet_dist.tracking.store import connect, mlflow_faults

_NOTE_TAG = "mlflow.note.content"


def log_details(
    handle: RunHandle, *, description: str = "", texts: Mapping[str, str], inputs: Sequence[DataInput] = ()
) -> None:
    """Logs a Markdown description (kept as it is if the run has one: somebody may have edited it), texts by artifact
    path, and data sets. Passwords in URIs are cut out. Raises Fault.
    """
    require_answer(handle.tracking_uri)
    with mlflow_faults(handle.tracking_uri, "describing the run"):
        client = connect(handle.tracking_uri)
        if description and _NOTE_TAG not in client.get_run(handle.run_id).data.tags:
            client.set_tag(handle.run_id, _NOTE_TAG, redacted(description))
        if inputs:
            client.log_inputs(handle.run_id, [dataset_input(data) for data in inputs])
        for path, content in texts.items():
            client.log_text(handle.run_id, redacted(content), path)


def set_tags(handle: RunHandle, tags: Mapping[str, str]) -> None:
    """Raises Fault."""
    require_answer(handle.tracking_uri)
    with mlflow_faults(handle.tracking_uri, "tagging the run"):
        client = connect(handle.tracking_uri)
        for key, value in redacted_values(tags).items():
            client.set_tag(handle.run_id, key, value)


def log_folder(handle: RunHandle, folder: Path, artifact_path: str) -> None:
    """Uploads a folder's files as artifacts under `artifact_path`. Raises Fault."""
    require_answer(handle.tracking_uri)
    with mlflow_faults(handle.tracking_uri, f"uploading {artifact_path}"):
        connect(handle.tracking_uri).log_artifacts(handle.run_id, str(folder), artifact_path)
