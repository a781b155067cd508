"""The one MLflow run of a training job, from its first start to its end: created, resumed and closed by the driver."""

from __future__ import annotations

import io
import logging
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from data_prep.redaction import redacted, redacted_values
from resnet_dist.errors import Fault, UserError
from resnet_dist.storage.base import RunStorage, read_json, write_json
from resnet_dist.storage.folder import as_storage
from resnet_dist.tracking.connection import (
    connect,
    mlflow_client,
    mlflow_faults,
    patiently,
    prepare_store,
    require_server,
)
from resnet_dist.tracking.datasets import DataInput, dataset_input
from resnet_dist.tracking.experiment import NOTE_TAG, viewed_experiment_id

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_log = logging.getLogger(__name__)
RUN_KEY_TAG = "resnet_dist.run_key"
PARENT_TAG = "mlflow.parentRunId"
RESUMED_TAG = "resumed"
"""How often a driver resumed the run."""
ENDED_TAG = "ended"
"""Why a run ended. MLflow has four statuses, and none for a trial that was not worth finishing."""
_PARAMS_PER_CALL = 100
_MAX_REASON_CHARS = 500
EndStatus = Literal["FINISHED", "FAILED", "KILLED"]
_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")


@dataclass(frozen=True)
class RunHandle:
    run_id: str
    experiment_id: str
    tracking_uri: str = field(repr=False)
    """May hold a password."""
    storage: RunStorage = field(compare=False)
    """The run's storage, with `mlflow_run.json` in it."""

    @property
    def run_dir(self) -> Path:
        return self.storage.folder


def run_file(run_dir: Path) -> Path:
    """`mlflow_run.json`: the run's key and ids; once it has ended also how, and whether the server knows."""
    return run_dir / "mlflow_run.json"


def _read_record(run_dir: Path) -> dict[str, Any] | None:
    """None if there is no such file. Raises UserError for what `_write_record` did not write."""
    record = read_json(run_file(run_dir))
    if record is None:
        return None
    end = record.get("end")
    texts = {key: record[key] for key in ("run_key", "run_id", "experiment_id") if key in record}
    is_whole = "experiment_id" in texts and all(isinstance(v, str) and _ID.fullmatch(v) for v in texts.values())
    if end is not None:
        is_whole = (
            is_whole
            and isinstance(end, dict)
            and end.get("status") in get_args(EndStatus)
            and type(end.get("time_ms")) is int
            and isinstance(end.get("reason"), str)
            and isinstance(end.get("sent"), bool)
        )
    if not is_whole:
        raise UserError(f"{run_file(run_dir)} is damaged; remove it to continue in a new MLflow run")
    return record


def recorded_run(storage: RunStorage | Path, tracking_uri: str) -> RunHandle | None:
    """The run that this storage belongs to, without asking the server; None before `open_run` has created it."""
    storage = as_storage(storage)
    record = _read_record(storage.folder)
    if record is None or "run_id" not in record:
        return None
    return RunHandle(record["run_id"], record["experiment_id"], tracking_uri, storage)


@dataclass(frozen=True)
class RunEnd:
    status: EndStatus
    reason: str


def recorded_end(run_dir: Path) -> RunEnd | None:
    """How the folder's run ended since it was last opened; None if it did not. Asks no server."""
    end = (_read_record(run_dir) or {}).get("end")
    return RunEnd(end["status"], end["reason"]) if end else None


def open_run(
    tracking_uri: str,
    experiment: str,
    run_name: str,
    storage: RunStorage | Path,
    tags: Mapping[str, str],
    params: Mapping[str, str],
    *,
    parent_run_id: str | None = None,
    limit_s: float = 10.0,
) -> RunHandle:
    """Begins the MLflow run that belongs to this storage, or continues it; its status is RUNNING afterwards.

    A random key is in storage before the run is created, and in a tag of the run from its first moment: the successor
    of a driver that was killed in between finds the run and does not make a second one.

    Args:
        tracking_uri: as `absolute_tracking_uri` returns it.
        storage: the run's (a path: that folder).
        tags: set again at every start.
        params: logged if the run does not have them yet (MLflow never changes one).
        parent_run_id: the sweep's run, under which MLflow shows this one.

    Raises Fault if MLflow fails, or if the server has not done everything within `limit_s` plus the request in
    progress; UserError if the storage belongs to a run that this server does not have.
    """
    storage = as_storage(storage)
    tags = dict(tags) | ({PARENT_TAG: parent_run_id} if parent_run_id else {})
    until_s = time.monotonic() + limit_s
    prepare_store(tracking_uri, limit_s=limit_s)
    client = connect(tracking_uri)
    resumes = "run_id" in (_read_record(storage.folder) or {})

    def find() -> Run:
        with mlflow_faults(tracking_uri, f"opening the run {run_name}"):
            return _find_or_create(client, experiment, run_name, storage, tags, tracking_uri)

    def describe() -> None:
        with mlflow_faults(tracking_uri, f"opening the run {run_name}"):
            _make_running(client, run, tags, params)

    run = patiently(find, until_s)
    if resumes:
        tags[RESUMED_TAG] = str(int(run.data.tags.get(RESUMED_TAG, 0)) + 1)
    patiently(describe, until_s)
    return RunHandle(run.info.run_id, run.info.experiment_id, tracking_uri, storage)


def end_run(handle: RunHandle, status: EndStatus, reason: str = "", *, limit_s: float = 10.0) -> bool:
    """Gives the run its end status, and `reason` as its tag `ended`. If the server is unreachable, both wait in
    `mlflow_run.json` for `sync`.

    True if the server has it. Never raises because of the server: the training is over and its result is valid.
    """
    record_end(handle, status, reason)
    try:
        return send_end_status(handle, limit_s=limit_s)
    except (Fault, UserError) as fault:
        _log.warning("the status %s of the run waits in %s: %s", status, run_file(handle.run_dir), fault)
        return False


@dataclass
class Ending:
    end: RunEnd | None = None
    """How the run ends, if not as `end_status` finds; set by its block."""


@contextmanager
def end_status(write: Callable[[EndStatus, str], object]) -> Iterator[Ending]:
    """Calls `write` with how a run ended and why, however the block is left.

    A block that ends normally has FINISHED, unless it sets another `end`. Ctrl-C and SIGTERM make the run KILLED, any
    other exception FAILED.

        with end_status(partial(end_run, handle)) as ending:
            ...
            ending.end = RunEnd("KILLED", "stopped after step 10")
    """
    ending = Ending()
    try:
        yield ending
    except BaseException as error:
        # A training that has finished stays so, even if its model cannot be published.
        end = ending.end if ending.end is not None and ending.end.status == "FINISHED" else _end_of(error)
        write(end.status, end.reason)
        raise
    end = ending.end or RunEnd("FINISHED", "finished")
    write(end.status, end.reason)


def _end_of(error: BaseException) -> RunEnd:
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return RunEnd("KILLED", "interrupted")
    if isinstance(error, (UserError, Fault, OSError)):
        return RunEnd("FAILED", f"failed: {error}")
    return RunEnd("FAILED", f"an unexpected error: {type(error).__name__}")


def record_end(handle: RunHandle, status: EndStatus, reason: str = "") -> None:
    """Keeps the run's end in `mlflow_run.json`, for `send_end_status`. Its time is that of the first such call."""
    record = _read_record(handle.run_dir) or {"run_id": handle.run_id, "experiment_id": handle.experiment_id}
    reason = redacted(reason)[:_MAX_REASON_CHARS]
    before = record.get("end") or {}
    time_ms = before["time_ms"] if before.get("status") == status else time.time_ns() // 1_000_000
    record["end"] = {"status": status, "time_ms": time_ms, "reason": reason, "sent": False}
    _write_record(handle.storage, record)


def send_end_status(handle: RunHandle, *, limit_s: float = 10.0) -> bool:
    """Sends the end that waits in `mlflow_run.json`. False if none waits; raises Fault as `open_run` does."""
    record = _read_record(handle.run_dir) or {}
    end = record.get("end")
    if not end or end["sent"]:
        return False
    until_s = time.monotonic() + limit_s
    require_server(handle.tracking_uri, limit_s=limit_s)
    client = connect(handle.tracking_uri)

    def send() -> None:
        # mlflow prints links to stdout here, which belongs to the command's own result.
        with mlflow_faults(handle.tracking_uri, "ending the run"), redirect_stdout(io.StringIO()):
            if end["reason"]:
                client.set_tag(record["run_id"], ENDED_TAG, end["reason"])
            client.set_terminated(record["run_id"], end["status"], end["time_ms"])

    patiently(send, until_s)
    _write_record(handle.storage, {**record, "end": {**end, "sent": True}})
    return True


def require_run(handle: RunHandle) -> None:
    """Raises UserError unless the server has the run, as that of the handle's storage; Fault if it does not respond."""
    record = _read_record(handle.run_dir) or {"run_id": handle.run_id}
    with mlflow_client(handle.tracking_uri, "looking for the run") as client:
        _known_run(client, record, handle.run_dir, handle.tracking_uri)


def newest_steps(client: MlflowClient, run_id: str) -> dict[str, int]:
    """Newest step of every metric of the run at the server."""
    # RunData.metrics has values without steps; its protobuf form has the newest point of each key whole.
    return {metric.key: metric.step for metric in client.get_run(run_id).data.to_proto().metrics}


def _write_record(storage: RunStorage, record: dict[str, Any]) -> None:
    write_json(run_file(storage.folder), record)
    storage.upload(run_file(storage.folder))


def _known_run(client: MlflowClient, record: Mapping[str, Any], run_dir: Path, tracking_uri: str) -> Run | None:
    """The run that the record names by its id, else by its key; None if it was never created."""
    from mlflow.exceptions import MlflowException

    if "run_id" not in record:
        return _oldest_with_key(client, record)
    try:
        run = client.get_run(record["run_id"])
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise UserError(
            f"{run_file(run_dir)}: {redacted(tracking_uri)} has no run {record['run_id']}; set tracking_uri to the "
            "MLflow that has it, or remove this file to continue in a new MLflow run"
        ) from None
    if run.data.tags.get(RUN_KEY_TAG) != record.get("run_key"):  # else points could end up in someone else's run
        raise UserError(
            f"{run_file(run_dir)}: the MLflow run {record['run_id']} belongs to another folder (its tag {RUN_KEY_TAG} "
            "is not this file's run_key); remove this file to continue in a new MLflow run"
        )
    if run.info.lifecycle_stage != "active":
        raise UserError(
            f"{run_file(run_dir)}: the MLflow run {record['run_id']} was deleted; restore it with "
            f"`mlflow runs restore --run-id {record['run_id']}`, or remove this file to continue in a new MLflow run"
        )
    return run


def _find_or_create(
    client: MlflowClient,
    experiment: str,
    run_name: str,
    storage: RunStorage,
    tags: Mapping[str, str],
    tracking_uri: str,
) -> Run:
    record = _read_record(storage.folder)
    if record is None:
        record = {"run_key": uuid.uuid4().hex, "experiment_id": viewed_experiment_id(client, experiment, tracking_uri)}
        _write_record(storage, record)
    run = _known_run(client, record, storage.folder, tracking_uri)
    if run is None:
        first_tags = {**redacted_values(tags), RUN_KEY_TAG: record["run_key"], RESUMED_TAG: "0"}
        client.create_run(record["experiment_id"], tags=first_tags, run_name=run_name)
        run = _oldest_with_key(client, record)
    if run is None:
        raise Fault(f"MLflow: the run {run_name} was created but cannot be found by its tag {RUN_KEY_TAG}")
    known = {"run_key": record["run_key"], "experiment_id": run.info.experiment_id, "run_id": run.info.run_id}
    _write_record(storage, known)
    return run


def _oldest_with_key(client: MlflowClient, record: Mapping[str, Any]) -> Run | None:
    """The run with the record's key. Duplicates, from a request repeated after a lost response, are deleted."""
    runs = client.search_runs(
        [record["experiment_id"]], filter_string=f"tags.`{RUN_KEY_TAG}` = '{record['run_key']}'", max_results=10
    )
    oldest_first = sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id))
    for run in oldest_first[1:]:
        client.delete_run(run.info.run_id)
    return oldest_first[0] if oldest_first else None


def _make_running(client: MlflowClient, run: Run, tags: Mapping[str, str], params: Mapping[str, str]) -> None:
    from mlflow.entities import Param, RunTag
    from mlflow.exceptions import MlflowException

    run_id = run.info.run_id
    client.update_run(run_id, status="RUNNING")
    if ENDED_TAG in run.data.tags:
        try:
            client.delete_tag(run_id, ENDED_TAG)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # deleted by a request whose response was lost
                raise
    new = [Param(key, value) for key, value in redacted_values(params).items() if key not in run.data.params]
    for start in range(0, len(new), _PARAMS_PER_CALL):
        client.log_batch(run_id, params=new[start : start + _PARAMS_PER_CALL], synchronous=True)
    client.log_batch(
        run_id, tags=[RunTag(key, value) for key, value in redacted_values(tags).items()], synchronous=True
    )


# The description of a run, logged by the driver. Logging it again in a later attempt replaces files and tags.


def log_details(
    handle: RunHandle, *, description: str = "", texts: Mapping[str, str], inputs: Sequence[DataInput] = ()
) -> None:
    """Logs a Markdown description (kept as it is if the run has one: somebody may have edited it), texts by artifact
    path, and data sets. Passwords in URIs are removed. Raises Fault.
    """
    with mlflow_client(handle.tracking_uri, "describing the run") as client:
        if description and NOTE_TAG not in client.get_run(handle.run_id).data.tags:
            client.set_tag(handle.run_id, NOTE_TAG, redacted(description))
        if inputs:
            client.log_inputs(handle.run_id, [dataset_input(data) for data in inputs])
        for path, content in texts.items():
            client.log_text(handle.run_id, redacted(content), path)


def set_tags(handle: RunHandle, tags: Mapping[str, str]) -> None:
    """Raises Fault."""
    with mlflow_client(handle.tracking_uri, "tagging the run") as client:
        for key, value in redacted_values(tags).items():
            client.set_tag(handle.run_id, key, value)


def log_folder(handle: RunHandle, folder: Path, artifact_path: str) -> None:
    """Uploads a folder's files as artifacts under `artifact_path`. Raises Fault."""
    with mlflow_client(handle.tracking_uri, f"uploading {artifact_path}") as client:
        client.log_artifacts(handle.run_id, str(folder), artifact_path)
