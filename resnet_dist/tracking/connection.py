"""Access to MLflow: tracking URIs, the client's environment, checks that the server responds, and errors in one
line."""

from __future__ import annotations

import fcntl
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from data_prep.beton.files import open_regular
from data_prep.redaction import redacted
from resnet_dist.errors import Fault, UserError
from resnet_dist.tracking.sqlite_store import create_empty, follow_moved_files, require_current

if TYPE_CHECKING:
    from mlflow import MlflowClient

_log = logging.getLogger(__name__)
T = TypeVar("T")
NOT_USED = (
    "MLFLOW_RUN_ID",
    "MLFLOW_EXPERIMENT_ID",
    "MLFLOW_EXPERIMENT_NAME",
    "MLFLOW_ACTIVE_MODEL_ID",
    "MLFLOW_ENABLE_ASYNC_LOGGING",
    "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING",
    "MLFLOW_AUTOLOGGING_CONFIG",
    "MLFLOW_REGISTRY_URI",
)
"""Variables that would send parts of a run somewhere else than its profile says, or later than we wait for."""
_PASSED_ON = (
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_AUTH",
    "MLFLOW_TRACKING_AWS_SIGV4",
    "MLFLOW_TRACKING_INSECURE_TLS",
    "MLFLOW_TRACKING_SERVER_CERT_PATH",
    "MLFLOW_TRACKING_CLIENT_CERT_PATH",
    "MLFLOW_S3_ENDPOINT_URL",
    "MLFLOW_S3_IGNORE_TLS",
    "MLFLOW_WORKSPACE",
)
# Uses the server's database, which /health does not; any response to it will do.
_PROBE = "/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"
_PROBE_PAUSE_S = 0.5
_RETRY_PAUSE_S = 0.3
_SCHEMA_LIMIT_S = 120.0
_REFUSALS = (401, 403)
_TOO_BUSY = 429
_MAX_LINE_CHARS = 300


# Tracking URIs.


def sqlite_file(uri: str) -> Path | None:
    """The database file of an absolute `sqlite:///` URI; None for every other URI."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(uri.removeprefix("sqlite:///").partition("?")[0])


# The environment variables that MLflow's client reads at every request.


def configure_environment(environment: MutableMapping[str, str]) -> list[str]:
    """Makes MLflow's client do what the profile says, and fail within seconds where it would retry for minutes.

    Returns warnings for the user. Loads nothing.
    """
    warned = []
    registry, tracking = environment.get("MLFLOW_REGISTRY_URI"), environment.get("MLFLOW_TRACKING_URI")
    if registry and registry != tracking:
        warned.append(f"MLFLOW_REGISTRY_URI ({redacted(registry)}) is not used: models go to the MLflow of their run")
    for key in NOT_USED:
        environment.pop(key, None)
    for key in [key for key, value in environment.items() if key.startswith("MLFLOW_") and not value.strip()]:
        del environment[key]  # set but empty, as in containers
    for key, value in driver_environment().items():
        environment.setdefault(key, value)
    return warned


def driver_environment() -> dict[str, str]:
    """For every command: a broken server costs seconds, not four minutes."""
    return {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }


def client_environment() -> dict[str, str]:
    """For workers, which track in the background; the driver, which uploads models, has `driver_environment`.

    MLflow's defaults (7 retries, 120 s each) keep one call for 247 s when the server is down. The sender has its own
    backoff and needs a short limit, but not so short that a busy server can never meet it: then it would do the same
    work again and again.
    """
    return {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
        "MLFLOW_DISABLE_TELEMETRY": "true",  # compute nodes often have no internet access
    }


def server_credentials(environment: Mapping[str, str]) -> dict[str, str]:
    """What MLflow's client reads to find its way and log in: for workers on other machines, which do not have the
    driver's environment. Never part of a runtime environment, which Ray's dashboard shows.
    """
    return {key: environment[key] for key in _PASSED_ON if key in environment}


def _require_readable(environment: Mapping[str, str]) -> None:
    """UserError for a variable with a value that MLflow does not accept: it would fail at some later request."""
    import mlflow.environment_variables as known

    for key, value in environment.items():
        variable = getattr(known, key, None) if key.startswith("MLFLOW_") else None
        if variable is not None and hasattr(variable, "get"):
            try:
                variable.get()
            except ValueError as error:
                mistake = f"{redacted(f'{key}={value}')}: MLflow does not accept it ({error}); correct it"
                raise UserError(mistake) from None


# Checks that a server responds, with short limits, before mlflow's long retries can begin.


class ServerUnavailable(Fault):
    """The server was too slow, unreachable or broken; the same call may succeed a moment later."""

    def __init__(self, why: str, fix: str = "") -> None:
        super().__init__(f"{why}; {fix}" if fix else why)
        self.why = why


def require_server(tracking_uri: str, *, limit_s: float = 10.0) -> None:
    """Returns as soon as the server responds; at once for a URI without a server.

    Raises ServerUnavailable after `limit_s` without a response (down, hung, or a 5xx status), UserError if the server
    refuses the host name or its certificate is not accepted.
    """
    if not tracking_uri.startswith(("http://", "https://")):
        return
    deadline_s = time.monotonic() + limit_s
    attempt_s = 3.0  # doubles each time that there was no response
    while True:
        left_s = deadline_s - time.monotonic()
        reason = _probe(tracking_uri, timeout_s=max(0.5, min(attempt_s, left_s)))
        if reason is None:
            return
        if deadline_s - time.monotonic() < _PROBE_PAUSE_S:
            raise ServerUnavailable(
                f"{redacted(tracking_uri)}: the MLflow server does not respond ({reason}, tried for {limit_s:.0f} s)",
                "start it or correct tracking_uri (of the profile, or --tracking-uri), then run the same command again",
            )
        attempt_s *= 2
        time.sleep(_PROBE_PAUSE_S)


def _probe(tracking_uri: str, timeout_s: float) -> str | None:
    """None if the server responded, else what happened instead. Asks as MLflow does, but without a password."""
    import requests

    parts = urlsplit(tracking_uri)
    address = parts.netloc.rpartition("@")[2]
    url = f"{parts.scheme}://{address}{parts.path.rstrip('/')}{_PROBE}"
    insecure = os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1")
    verify = False if insecure else os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the user asked not to check certificates
            response = requests.get(url, timeout=timeout_s, verify=verify, stream=True)
        with response:
            if response.status_code == 403 and b"Invalid Host" in next(response.iter_content(2000), b""):
                raise UserError(
                    f"{redacted(tracking_uri)}: the MLflow server refuses the host name {address}; "
                    f"start it with --allowed-hosts '{address}'"
                )
            return None if response.status_code < 500 else f"status {response.status_code}"
    except requests.exceptions.SSLError as error:
        raise UserError(f"{redacted(tracking_uri)}: {_tls_mistake(root_reason(error))}") from None
    except requests.exceptions.Timeout:
        return "no reply"
    except requests.exceptions.ConnectionError as error:
        return root_reason(error)
    except (requests.exceptions.RequestException, OSError) as error:  # OSError: no such file of certificates
        raise UserError(f"{redacted(tracking_uri)}: the MLflow server cannot be asked: {first_line(error)}") from None


def _tls_mistake(reason: str) -> str:
    """What is wrong with a TLS connection, and how to fix it."""
    _, failed, what = reason.partition("certificate verify failed: ")
    if not failed:
        return f"it does not speak TLS ({reason}); write http:// instead of https://, or another port"
    return (
        f"its certificate is not accepted ({what.partition(' (_ssl')[0]}); export "
        "MLFLOW_TRACKING_SERVER_CERT_PATH=FILE.pem with that of its authority, or correct tracking_uri"
    )


# Talking to it.


@contextmanager
def mlflow_client(tracking_uri: str, doing: str) -> Iterator[MlflowClient]:
    """A client for one piece of work; errors name it as `doing`. Raises as `require_server` and
    `mlflow_faults` do.
    """
    require_server(tracking_uri)
    with mlflow_faults(tracking_uri, doing):
        yield connect(tracking_uri)


def connect(tracking_uri: str) -> MlflowClient:
    """Raises UserError for a variable of the environment that MLflow does not accept, and as `require_current`."""
    from mlflow import MlflowClient

    _require_readable(os.environ)
    if (database := sqlite_file(tracking_uri)) is not None:
        require_current(database)
    return MlflowClient(tracking_uri, registry_uri=tracking_uri)  # not MLFLOW_REGISTRY_URI


@contextmanager
def mlflow_faults(tracking_uri: str, doing: str) -> Iterator[None]:
    """Turns what mlflow raises into one line without secrets: UserError if the server refuses this user, else Fault;
    ServerUnavailable, a Fault, if it may succeed the next time.
    """
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        status = error.get_http_status_code()  # 500 also when there was no response
        if status in _REFUSALS:
            raise UserError(
                f"MLflow at {redacted(tracking_uri)} refuses this user ({doing}, status {status}); export "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, of a user who may "
                "write there"
            ) from error
        kind = (
            ServerUnavailable if sqlite_file(tracking_uri) is None and (status >= 500 or status == _TOO_BUSY) else Fault
        )
        raise kind(f"MLflow at {redacted(tracking_uri)}: {doing} failed: {root_reason(error)}") from error
    except (UserError, Fault, OSError, ValueError, TypeError):
        raise
    except Exception as error:
        raise Fault(f"MLflow at {redacted(tracking_uri)}: {doing} failed: {root_reason(error)}") from error


def patiently(work: Callable[[], T], until_s: float) -> T:
    """Repeats `work`, which must allow that, until it succeeds or `time.monotonic()` is past `until_s`.

    Raises what `work` raises: an ServerUnavailable from the last attempt, anything else at once.
    """
    while True:
        try:
            return work()
        except ServerUnavailable:
            if time.monotonic() > until_s:
                raise
            time.sleep(_RETRY_PAUSE_S)


def prepare_store(tracking_uri: str, *, limit_s: float = 10.0) -> None:
    """Makes sure that a server responds, or that there is a sqlite file with MLflow's tables.

    Processes that open a new sqlite file at once all try to create its tables, and all but one fail (mlflow 3.17). So
    the driver does it first, under a lock. Raises Fault, UserError.
    """
    require_server(tracking_uri, limit_s=limit_s)
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
    """Keeps mlflow's line about every table it creates off the user's screen; warnings stay."""
    logger = logging.getLogger("mlflow.store.db.utils")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


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


# Makes one readable line of an mlflow exception, which often wraps four others and shows the full address.


def first_line(error: BaseException) -> str:
    """The exception's own message, without secrets: what a server that responded says."""
    lines = [line.strip() for line in redacted(str(error)).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:_MAX_LINE_CHARS]


def root_reason(error: BaseException) -> str:
    """The message of the root cause ("Connection refused"), without secrets: why a call failed."""
    seen = {id(error)}
    while (below := error.__cause__ or error.__context__) and id(below) not in seen:
        seen.add(id(below))
        error = below
    if isinstance(error, OSError) and error.strerror and error.filename is None:
        return first_line(OSError(error.strerror))  # without its number
    return first_line(error)
