"""The store behind a tracking URI: a server that answers, or a sqlite file with MLflow's tables in it."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from data_prep.beton.files import open_regular
from data_prep.redaction import redacted
from resnet_dist.errors import Fault, UserError
from resnet_dist.tracking.environment import require_readable
from resnet_dist.tracking.reasons import root_reason
from resnet_dist.tracking.server import Unanswered, require_answer
from resnet_dist.tracking.sqlite_store import create_empty, follow_moved_files, require_current
from resnet_dist.tracking.uris import sqlite_file

if TYPE_CHECKING:
    from mlflow import MlflowClient

_log = logging.getLogger(__name__)
T = TypeVar("T")
_SCHEMA_LIMIT_S = 120.0
_REFUSALS = (401, 403)
_TOO_BUSY = 429
_RETRY_PAUSE_S = 0.3


def prepare_store(tracking_uri: str, *, answer_limit_s: float = 10.0) -> None:
    """Makes sure there is something to talk to: a server that answers, or a sqlite file with MLflow's tables in it.

    Raises Fault. Processes that meet a fresh sqlite file together all try to create its tables and all but one fail
    (mlflow 3.17), so the driver does it first, under a lock.
    """
    require_answer(tracking_uri, limit_s=answer_limit_s)
    database = sqlite_file(tracking_uri)
    if database is None:
        return
    try:
        create_empty(database)
        lock = database.with_name(f".{database.name}.lock")
        with _locked(lock), _quiet_schema(), mlflow_faults(tracking_uri, "creating its tables"):
            connect(tracking_uri).search_experiments(max_results=1)
            if (line := follow_moved_files(database)) is not None:
                _log.warning("%s", line)
    except OSError as error:
        raise UserError(f"tracking_uri: {database} cannot be created or written: {error.strerror}") from None


@contextmanager
def _quiet_schema() -> Iterator[None]:
    """Keeps what mlflow says of every table it creates off the user's screen; warnings stay."""
    logger = logging.getLogger("mlflow.store.db.utils")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def connect(tracking_uri: str) -> MlflowClient:
    """Raises UserError for a variable of the environment that MLflow does not take, and as `require_current`."""
    from mlflow import MlflowClient

    require_readable(os.environ)
    if (database := sqlite_file(tracking_uri)) is not None:
        require_current(database)
    return MlflowClient(tracking_uri, registry_uri=tracking_uri)  # not MLFLOW_REGISTRY_URI


@contextmanager
def mlflow_faults(tracking_uri: str, doing: str) -> Iterator[None]:
    """Turns what mlflow raises into one line without secrets: UserError if the server refuses this user, else Fault;
    Unanswered, a Fault, if the server may do it the next time.
    """
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        status = error.get_http_status_code()  # 500 also where no answer came
        if status in _REFUSALS:
            raise UserError(
                f"MLflow at {redacted(tracking_uri)} refuses this user ({doing}, status {status}); export "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, of a user who may "
                "write there"
            ) from error
        kind = Unanswered if sqlite_file(tracking_uri) is None and (status >= 500 or status == _TOO_BUSY) else Fault
        raise kind(f"MLflow at {redacted(tracking_uri)}: {doing} failed: {root_reason(error)}") from error
    except (UserError, Fault, OSError, ValueError, TypeError):
        raise
    except Exception as error:
        raise Fault(f"MLflow at {redacted(tracking_uri)}: {doing} failed: {root_reason(error)}") from error


def patiently(work: Callable[[], T], until_s: float) -> T:
    """Does `work`, which may be begun again, until it succeeds, or `time.monotonic()` is past `until_s`.

    Raises what `work` raises: an Unanswered of the last time, everything else of the first.
    """
    while True:
        try:
            return work()
        except Unanswered:
            if time.monotonic() > until_s:
                raise
            time.sleep(_RETRY_PAUSE_S)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock between processes of one machine; the kernel frees it if the holder dies. Raises Fault."""
    descriptor = open_regular(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        deadline_s = time.monotonic() + _SCHEMA_LIMIT_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    raise Fault(f"{path}: another process has held this lock for {_SCHEMA_LIMIT_S:.0f} s") from None
                time.sleep(0.1)
        yield
    finally:
        os.close(descriptor)
