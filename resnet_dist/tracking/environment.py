"""The environment variables that MLflow's client reads, settled once for every command and worker."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

from data_prep.redaction import redacted
from resnet_dist.errors import UserError

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
"""What would send something of a run elsewhere than where its profile says, or later than it is waited for."""
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


def settle_environment(environment: MutableMapping[str, str]) -> list[str]:
    """Makes MLflow's client do what the profile says, and answer within seconds where it would try for minutes; what
    there is to say about it. Loads nothing.
    """
    said = []
    registry, tracking = environment.get("MLFLOW_REGISTRY_URI"), environment.get("MLFLOW_TRACKING_URI")
    if registry and registry != tracking:
        said.append(f"MLFLOW_REGISTRY_URI ({redacted(registry)}) is not used: models go to the MLflow of their run")
    for key in NOT_USED:
        environment.pop(key, None)
    for key in [key for key, value in environment.items() if key.startswith("MLFLOW_") and not value.strip()]:
        del environment[key]  # set and empty, as containers have it
    for key, value in driver_environment().items():
        environment.setdefault(key, value)
    return said


def require_readable(environment: Mapping[str, str]) -> None:
    """UserError for a variable with a value that MLflow does not take: it would say so at some request or other."""
    import mlflow.environment_variables as known

    for key, value in environment.items():
        variable = getattr(known, key, None) if key.startswith("MLFLOW_") else None
        if variable is not None and hasattr(variable, "get"):
            try:
                variable.get()
            except ValueError as error:
                mistake = f"{redacted(f'{key}={value}')}: MLflow does not take it ({error}); correct it"
                raise UserError(mistake) from None


def driver_environment() -> dict[str, str]:
    """Environment variables of every command: a server that is out of order costs seconds, not four minutes."""
    return {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }


def server_credentials(environment: Mapping[str, str]) -> dict[str, str]:
    """What mlflow's client reads to find its way and log in: for workers on other machines,
    which do not have the driver's environment.

    Never part of a runtime environment: Ray's dashboard shows those.
    """
    return {key: environment[key] for key in _PASSED_ON if key in environment}


def client_environment() -> dict[str, str]:
    """Environment variables of a process that tracks in the background: apply them to the workers, not to the driver.

    mlflow reads them at every request. Its defaults (7 retries, 120 s each) keep one call for 247 s when the server is
    down; the sender has its own backoff and wants a short answer, but not so short that a busy server never gets
    to give it: what it then does is asked for again and again. The driver uploads models: `driver_environment`.
    """
    return {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
        "MLFLOW_DISABLE_TELEMETRY": "true",  # compute nodes often have no way out, and nobody asked for it
    }
