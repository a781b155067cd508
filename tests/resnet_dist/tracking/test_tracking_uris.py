from __future__ import annotations

from pathlib import Path

import pytest

from resnet_dist.errors import UserError
from resnet_dist.tracking.connection import absolute_tracking_uri, sqlite_file

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
    "uri", ["mlruns", "./mlruns", "/tmp/mlruns", "file:///tmp/mlruns", "file:mlruns", "databricks", ""]
)
def test_a_folder_is_refused_with_the_mend(uri):
    with pytest.raises(UserError, match=r"sqlite:///folder/mlflow\.db"):
        absolute_tracking_uri(uri, BASE)


@pytest.mark.parametrize("uri", ["runs/mlflow.db", "/data/mlflow.sqlite"])
def test_a_databases_path_is_told_its_uri(uri):
    with pytest.raises(UserError, match=f"write sqlite:///{uri}$"):
        absolute_tracking_uri(uri, BASE)


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite:///folder/", "sqlite://m.db"])
def test_a_database_that_other_processes_cannot_see_is_refused(uri):
    with pytest.raises(UserError, match="names no file"):
        absolute_tracking_uri(uri, BASE)


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


@pytest.mark.parametrize("uri", ["http://:5000", "http://mlflow:port", "http://[::1"])
def test_an_address_without_host_or_port_is_refused(uri):
    with pytest.raises(UserError, match="no address like"):
        absolute_tracking_uri(uri, BASE)


def test_sqlite_file():
    assert sqlite_file("sqlite:////var/m.db?timeout=20") == Path("/var/m.db")
    assert sqlite_file("http://mlflow:5000") is None
