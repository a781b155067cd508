"""What MLflow's client reads from the environment is settled once: nothing there sends a run elsewhere, or waits."""

from __future__ import annotations

import http.server
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from resnet_dist.errors import UserError
from resnet_dist.tracking.connection import (
    NOT_USED,
    connect,
    driver_environment,
    require_answer,
    server_credentials,
    settle_environment,
)
from resnet_dist.tracking.mlflow_run import open_run


def test_what_would_lead_a_run_elsewhere_is_taken_away_and_the_registry_is_told() -> None:
    environment = dict.fromkeys(NOT_USED, "x") | {"MLFLOW_REGISTRY_URI": "http://me:hunter2@elsewhere", "HOME": "/h"}
    (said,) = settle_environment(environment)
    assert environment == {"HOME": "/h"} | driver_environment()
    assert said == "MLFLOW_REGISTRY_URI (http://***@elsewhere) is not used: models go to the MLflow of their run"
    assert settle_environment(environment) == []


def test_empty_variables_are_none_and_ones_own_settings_stay() -> None:
    environment = {"MLFLOW_TRACKING_TOKEN": "", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
    settle_environment(environment)
    assert environment == driver_environment() | {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}


def test_workers_are_given_what_leads_to_the_server() -> None:
    given = {"MLFLOW_TRACKING_INSECURE_TLS": "true", "MLFLOW_S3_ENDPOINT_URL": "http://s3", "MLFLOW_RUN_ID": "x"}
    assert server_credentials(given) == {k: v for k, v in given.items() if k != "MLFLOW_RUN_ID"}


@pytest.mark.parametrize("key", ["MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_TRACKING_INSECURE_TLS"])
def test_a_value_that_mlflow_does_not_take_is_named(key: str, sqlite_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(key, "perhaps")
    with pytest.raises(UserError, match=f"{key}=perhaps: MLflow does not take it"):
        connect(sqlite_uri)


def test_models_are_registered_where_the_run_is(
    sqlite_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "http://127.0.0.1:9")
    open_run(sqlite_uri, "exp", "r", tmp_path / "run", {}, {})
    connect(sqlite_uri).create_registered_model("m")
    monkeypatch.delenv("MLFLOW_REGISTRY_URI")
    assert MlflowClient(sqlite_uri, sqlite_uri).get_registered_model("m").name == "m"


@pytest.fixture
def tls_port(tmp_path: Path) -> Iterator[int]:
    """Of a server whose certificate nobody knows."""
    key, certificate = tmp_path / "k.pem", tmp_path / "c.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as listener:
        listener.socket = context.wrap_socket(listener.socket, server_side=True)
        listener.handle_error = lambda *args: None  # type: ignore[method-assign]
        thread = threading.Thread(target=listener.serve_forever)
        thread.start()
        yield listener.server_port
        listener.shutdown()
        thread.join()


def test_a_certificate_that_is_not_accepted_is_told_at_once(
    tls_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"its certificate is not accepted \(self.signed certificate\); export MLFLOW"):
        require_answer(f"https://localhost:{tls_port}")
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(tmp_path / "c.pem"))
    require_answer(f"https://localhost:{tls_port}")
    with pytest.raises(UserError, match=r"not accepted .*127\.0\.0\.1"):
        require_answer(f"https://127.0.0.1:{tls_port}")
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(tmp_path / "none.pem"))
    with pytest.raises(UserError, match=r"none\.pem"):
        require_answer(f"https://localhost:{tls_port}")
    monkeypatch.delenv("MLFLOW_TRACKING_SERVER_CERT_PATH")
    monkeypatch.setenv("MLFLOW_TRACKING_INSECURE_TLS", "true")
    require_answer(f"https://localhost:{tls_port}")


def test_https_where_http_is_spoken(server) -> None:
    with pytest.raises(UserError, match=r"does not speak TLS.*write http:// instead"):
        require_answer(server.uri.replace("http://", "https://"))
