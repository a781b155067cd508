"""Access to MLflow: URIs, the client's environment, broken servers and sqlite files."""

from __future__ import annotations

import http.server
import shutil
import socket
import sqlite3
import ssl
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from resnet_dist.config.profile import absolute_tracking_uri
from resnet_dist.errors import Fault, UserError
from resnet_dist.tracking.connection import (
    NOT_USED,
    configure_environment,
    connect,
    driver_environment,
    first_line,
    prepare_store,
    require_server,
    root_reason,
    server_credentials,
    sqlite_file,
)
from resnet_dist.tracking.experiment import list_runs
from resnet_dist.tracking.mlflow_run import end_run, log_details, open_run
from resnet_dist.tracking.sync import MetricPoint, MlflowTransport, Unavailable

pytestmark = pytest.mark.system

BASE = Path("/home/me/project")


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("sqlite:///runs/mlflow.db", "sqlite:////home/me/project/runs/mlflow.db"),
        ("sqlite:////var/mlflow.db", "sqlite:////var/mlflow.db"),
        ("sqlite:///m.db?timeout=20", "sqlite:////home/me/project/m.db?timeout=20"),
        ("http://mlflow:5000/", "http://mlflow:5000"),
        ("https://me:pw@mlflow.example.org/prefix", "https://me:pw@mlflow.example.org/prefix"),
    ],
)
def test_absolute(uri, expected):
    assert absolute_tracking_uri(uri, BASE) == expected
    assert absolute_tracking_uri(expected, Path("/elsewhere")) == expected


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        *((uri, r"sqlite:///folder/mlflow\.db") for uri in ("mlruns", "/tmp/mlruns", "file:mlruns", "databricks", "")),
        *((uri, f"write sqlite:///{uri}$") for uri in ("runs/mlflow.db", "/data/mlflow.sqlite")),
        *((f"sqlite:{end}", "names no file") for end in ("//", "///", "///:memory:", "///folder/", "//m.db")),
        *((f"http://{end}", "not an address like") for end in (":5000", "mlflow:port", "[::1")),
        *((f"sqlite:///{end}", "path has") for end in ("/a/feature%2Ffoo/m.db", "100%.db")),
        *((f"sqlite:///{end}", "after the file's name") for end in ("/a/b?c/m.db", "m.db?mode=ro")),
    ],
)
def test_a_uri_that_cannot_hold_runs_is_refused_with_what_to_write(uri, why):
    with pytest.raises(UserError, match=f"tracking_uri: .*{why}"):
        absolute_tracking_uri(uri, BASE)


def test_a_base_folder_that_sqlalchemy_would_misread_is_refused():
    with pytest.raises(UserError, match="path has %"):
        absolute_tracking_uri("sqlite:///m.db", Path("/work/feature%2Ffoo"))


def test_a_database_without_a_server_is_refused_without_its_password():
    with pytest.raises(UserError, match="mlflow server --backend-store-uri") as caught:
        absolute_tracking_uri("postgresql://me:hunter2@db/mlflow", BASE)
    assert "hunter2" not in str(caught.value)
    assert "***@db/mlflow" in str(caught.value)


@pytest.mark.parametrize("password", ["hun/ter2", "hun?ter2", "hun#ter2", "1/hunter2"])
def test_a_password_that_a_client_would_read_as_a_host_or_path_is_refused(password):
    with pytest.raises(UserError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        absolute_tracking_uri(f"http://me:{password}@mlflow:5000", BASE)
    assert "hun" not in str(caught.value)


def test_sqlite_file():
    assert sqlite_file("sqlite:////var/m.db?timeout=20") == Path("/var/m.db")
    assert sqlite_file("http://mlflow:5000") is None


def test_variables_that_redirect_a_run_are_removed_with_a_warning() -> None:
    environment = dict.fromkeys(NOT_USED, "x") | {"MLFLOW_REGISTRY_URI": "http://me:hunter2@elsewhere", "HOME": "/h"}
    (warning,) = configure_environment(environment)
    assert environment == {"HOME": "/h"} | driver_environment()
    assert warning == "MLFLOW_REGISTRY_URI (http://***@elsewhere) is not used: models go to the MLflow of their run"
    assert configure_environment(environment) == []


def test_empty_variables_are_none_and_ones_own_settings_stay() -> None:
    environment = {"MLFLOW_TRACKING_TOKEN": "", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
    configure_environment(environment)
    assert environment == driver_environment() | {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}


def test_workers_are_given_what_leads_to_the_server() -> None:
    given = {"MLFLOW_TRACKING_INSECURE_TLS": "true", "MLFLOW_S3_ENDPOINT_URL": "http://s3", "MLFLOW_RUN_ID": "x"}
    assert server_credentials(given) == {k: v for k, v in given.items() if k != "MLFLOW_RUN_ID"}


@pytest.mark.parametrize("key", ["MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_TRACKING_INSECURE_TLS"])
def test_a_value_that_mlflow_does_not_take_is_named(key: str, sqlite_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(key, "perhaps")
    with pytest.raises(UserError, match=f"{key}=perhaps: MLflow does not accept it"):
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


def test_an_unaccepted_certificate_is_reported_at_once(
    tls_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"its certificate is not accepted \(self.signed certificate\); export MLFLOW"):
        require_server(f"https://localhost:{tls_port}")
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(tmp_path / "c.pem"))
    require_server(f"https://localhost:{tls_port}")
    with pytest.raises(UserError, match=r"not accepted .*127\.0\.0\.1"):
        require_server(f"https://127.0.0.1:{tls_port}")
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(tmp_path / "none.pem"))
    with pytest.raises(UserError, match=r"none\.pem"):
        require_server(f"https://localhost:{tls_port}")
    monkeypatch.delenv("MLFLOW_TRACKING_SERVER_CERT_PATH")
    monkeypatch.setenv("MLFLOW_TRACKING_INSECURE_TLS", "true")
    require_server(f"https://localhost:{tls_port}")


def test_https_where_http_is_spoken(server) -> None:
    with pytest.raises(UserError, match=r"does not speak TLS.*write http:// instead"):
        require_server(server.uri.replace("http://", "https://"))


def test_the_first_line_without_secrets():
    assert first_line(ValueError("\n  http://me:hunter2@host is bad\nmore")) == "http://***@host is bad"
    assert first_line(ValueError()) == "ValueError"
    assert len(first_line(ValueError("x" * 5000))) == 300


def test_the_root_is_what_happened_first():
    wrapped = RuntimeError("a long story")
    wrapped.__context__ = OSError("disk full")  # as `raise` inside an `except` leaves it
    assert root_reason(wrapped) == "disk full"
    looped = ValueError("a")
    looped.__cause__ = KeyError("b")
    looped.__cause__.__cause__ = looped
    assert root_reason(looped) == "'b'"


def test_a_dead_server_is_two_words():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    transport = MlflowTransport(f"http://me:hunter2@127.0.0.1:{port}", "a" * 32)
    with pytest.raises(Unavailable, match=r"^Connection refused$"):
        transport.send([MetricPoint("loss", 1.0, 0, 1)])
    with pytest.raises(Unavailable, match=r"^Connection refused$"):
        transport.newest_steps()


def write(database: Path, *statements: str) -> None:
    with sqlite3.connect(database) as connection:
        for statement in statements:
            connection.execute(statement)


@pytest.mark.parametrize(
    ("revision", "why"),
    [
        ("451aebb31d03", "older MLflow .*make a copy first: cp .*mlflow db upgrade sqlite:///"),
        ("f" * 12, "newer MLflow"),
    ],
)
def test_a_database_of_another_mlflow_is_not_touched(revision: str, why: str, sqlite_uri: str, tmp_path: Path) -> None:
    database = sqlite_file(sqlite_uri)
    assert database is not None
    write(database, f"update alembic_version set version_num = '{revision}'")
    before = database.read_bytes()
    for work in (list_runs, prepare_store, lambda uri: open_run(uri, "e", "r", tmp_path / "run", {}, {})):
        with pytest.raises(UserError, match=why):
            work(sqlite_uri)
    assert database.read_bytes() == before


def test_another_programs_or_a_damaged_database_is_named(tmp_path: Path, sqlite_uri: str) -> None:
    other, damaged = tmp_path / "other.db", tmp_path / "damaged.db"
    write(other, "create table people (name text)")
    damaged.write_bytes(b"SQLite format 3\0" + b"\1" * 5000)
    text = tmp_path / "notes.txt"
    text.write_text("a text")
    for path, why in (
        (other, "not MLflow's"),
        (damaged, "damaged"),
        (text, "not a sqlite"),
        (text / "mlflow.db", "cannot be created"),
        (tmp_path, "not a file|folder"),
    ):
        with pytest.raises(UserError, match=why):
            prepare_store(f"sqlite:///{path}")
    assert text.read_text() == "a text"
    with pytest.raises(UserError, match="there is no MLflow database"):
        list_runs(f"sqlite:///{tmp_path}/none.db")
    assert not (tmp_path / "none.db").exists()
    with pytest.raises(UserError, match=f"{tmp_path} is a folder; name a database in it"):
        list_runs(f"sqlite:///{tmp_path}")
    with pytest.raises(UserError, match="'None' is not a name"):
        list_runs(sqlite_uri, "None")


def test_a_new_database_is_its_owners(tmp_path: Path) -> None:
    prepare_store(f"sqlite:///{tmp_path}/a #b ü/mlflow.db")
    database = tmp_path / "a #b ü" / "mlflow.db"
    assert stat.S_IMODE(database.stat().st_mode) == 0o600
    assert list_runs(f"sqlite:///{database}") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a #b ü"]


def test_processes_that_meet_a_fresh_database_together_all_get_through(tmp_path):
    uri = f"sqlite:///{tmp_path}/new/folder/mlflow.db"
    program = (
        "import sys\nfrom pathlib import Path\nfrom resnet_dist.tracking.mlflow_run import open_run\n"
        "print(open_run(sys.argv[1], 'exp', 'r', Path(sys.argv[2]), {}, {}).experiment_id)\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, uri, str(tmp_path / f"run{i}")], stdout=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    experiment_ids = [process.communicate(timeout=240)[0].splitlines()[-1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert len(set(experiment_ids)) == 1
    assert len(list_runs(uri)) == 2
    assert not list(tmp_path.glob("mlruns*"))


def test_files_follow_a_database_that_is_moved(template_database: Path, tmp_path: Path) -> None:
    first, second, copy = tmp_path / "first", tmp_path / "second", tmp_path / "copy"
    first.mkdir()
    shutil.copy(template_database, first / "mlflow.db")

    def run(folder: Path, name: str) -> str:
        handle = open_run(f"sqlite:///{folder}/mlflow.db", "exp", name, folder / name, {}, {})
        log_details(handle, texts={"a.txt": name})
        end_run(handle, "FINISHED")
        return handle.run_id

    def text(folder: Path, run_id: str) -> str:
        return Path(MlflowClient(f"sqlite:///{folder}/mlflow.db").download_artifacts(run_id, "a.txt")).read_text()

    one = run(first, "one")
    shutil.move(first, second)
    two = run(second, "two")
    assert (text(second, one), text(second, two)) == ("one", "two")
    assert not first.exists()
    shutil.copytree(second, copy)
    three = run(copy, "three")
    assert [text(copy, run_id) for run_id in (one, two, three)] == ["one", "two", "three"]
    assert not list((second / "mlartifacts").rglob(three))
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(second / "mlflow.db", alone)
    run(alone, "four")
    assert text(alone, one) == "one"  # the files are still at the old path only


def test_a_server_that_only_returns_500_counts_as_down(broken_server):
    _, uri = broken_server
    with pytest.raises(Fault, match="status 500"):
        require_server(uri, limit_s=0.6)


def test_a_server_that_refuses_the_host_name_says_how_to_start_it(broken_server):
    handler, uri = broken_server
    handler.status, handler.body = 403, b"Invalid Host header - possible DNS rebinding attack detected"
    with pytest.raises(UserError, match="--allowed-hosts"):
        require_server(uri)


def test_a_real_server_responds(server):
    require_server(server.uri, limit_s=10)
    require_server(server.uri.replace("://", "://me:pw@"), limit_s=10)
