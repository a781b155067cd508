from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resnet_dist.errors import UserError
from resnet_dist.tracking.uris import absolute_tracking_uri, redact_uri, sqlite_file

BASE = Path("/home/me/project")
word = st.from_regex(r"[A-Za-z0-9_.~!$&*+,;=%-]{1,12}", fullmatch=True)


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


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite:///folder/", "sqlite://m.db"])
def test_a_database_that_other_processes_cannot_see_is_refused(uri):
    with pytest.raises(UserError, match="names no file"):
        absolute_tracking_uri(uri, BASE)


def test_a_database_without_a_server_is_refused_without_its_password():
    with pytest.raises(UserError, match="mlflow server --backend-store-uri") as caught:
        absolute_tracking_uri("postgresql://me:hunter2@db/mlflow", BASE)
    assert "hunter2" not in str(caught.value)
    assert "***@db/mlflow" in str(caught.value)


def test_sqlite_file():
    assert sqlite_file("sqlite:////var/m.db?timeout=20") == Path("/var/m.db")
    assert sqlite_file("http://mlflow:5000") is None


@given(user=word, password=word, before=st.text(max_size=20), after=st.text(max_size=20))
def test_no_password_is_left_anywhere_in_a_text(user, password, before, after):
    secret = f"s3cr3t{password}"
    text = f"{before} https://{user}:{secret}@host:5000/path {after}"
    assert redact_uri(text) == f"{redact_uri(before + ' ')}https://***@host:5000/path {redact_uri(after)}"
    assert secret not in redact_uri(f"x http://h/?access_token={secret}&b=1")


@pytest.mark.parametrize(
    "text",
    ["http://mlflow:5000/a?step=3", "sqlite:////var/a@b.db", "loss = 0.5 @ step 3", "a@b.org", "s3://bucket/x@y"],
)
def test_a_text_without_secrets_stays_as_it_is(text):
    assert redact_uri(text) == text
