"""A sqlite file that is not what MLflow expects is named at once; one that was moved keeps its files."""

from __future__ import annotations

import shutil
import sqlite3
import stat
from pathlib import Path

import pytest
from mlflow import MlflowClient

from resnet_dist.errors import UserError
from resnet_dist.tracking.connection import absolute_tracking_uri, prepare_store, sqlite_file
from resnet_dist.tracking.experiment import list_runs
from resnet_dist.tracking.mlflow_run import end_run, log_details, open_run


def write(database: Path, *statements: str) -> None:
    with sqlite3.connect(database) as connection:
        for statement in statements:
            connection.execute(statement)


@pytest.mark.parametrize(
    ("revision", "told"),
    [
        ("451aebb31d03", "older MLflow .*make a copy first: cp .*mlflow db upgrade sqlite:///"),
        ("f" * 12, "newer MLflow"),
    ],
)
def test_a_database_of_another_mlflow_is_not_touched(revision: str, told: str, sqlite_uri: str, tmp_path: Path) -> None:
    database = sqlite_file(sqlite_uri)
    assert database is not None
    write(database, f"update alembic_version set version_num = '{revision}'")
    before = database.read_bytes()
    for work in (list_runs, prepare_store, lambda uri: open_run(uri, "e", "r", tmp_path / "run", {}, {})):
        with pytest.raises(UserError, match=told):
            work(sqlite_uri)
    assert database.read_bytes() == before


def test_a_table_that_an_older_mlflow_lacks_is_not_made_by_a_listing(sqlite_uri: str) -> None:
    """What made MLflow migrate without a word."""
    database = sqlite_file(sqlite_uri)
    assert database is not None
    write(database, "drop table logged_models", "update alembic_version set version_num = '451aebb31d03'")
    with pytest.raises(UserError, match="older MLflow"):
        list_runs(sqlite_uri)


def test_another_programs_or_a_damaged_database_is_named(tmp_path: Path, sqlite_uri: str) -> None:
    other, damaged = tmp_path / "other.db", tmp_path / "damaged.db"
    write(other, "create table people (name text)")
    damaged.write_bytes(b"SQLite format 3\0" + b"\1" * 5000)
    text = tmp_path / "notes.txt"
    text.write_text("a text")
    for path, told in (
        (other, "not MLflow's"),
        (damaged, "damaged"),
        (text, "not a sqlite"),
        (tmp_path, "no file|folder"),
    ):
        with pytest.raises(UserError, match=told):
            prepare_store(f"sqlite:///{path}")
    assert text.read_text() == "a text"
    with pytest.raises(UserError, match="there is no MLflow database"):
        list_runs(f"sqlite:///{tmp_path}/none.db")
    assert not (tmp_path / "none.db").exists()
    with pytest.raises(UserError, match=f"{tmp_path} is a folder; name a database in it"):
        list_runs(f"sqlite:///{tmp_path}")
    with pytest.raises(UserError, match="'None' is no name"):
        list_runs(sqlite_uri, "None")


def test_a_new_database_is_its_owners(tmp_path: Path) -> None:
    prepare_store(f"sqlite:///{tmp_path}/a #b ü/mlflow.db")
    database = tmp_path / "a #b ü" / "mlflow.db"
    assert stat.S_IMODE(database.stat().st_mode) == 0o600
    assert list_runs(f"sqlite:///{database}") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a #b ü"]


@pytest.mark.parametrize(
    "uri",
    ["sqlite:////a/feature%2Ffoo/m.db", "sqlite:///100%.db", "sqlite:///m.db?mode=ro", "sqlite:////a/b?c/m.db"],
)
def test_paths_that_sqlalchemy_reads_otherwise_are_refused(uri: str) -> None:
    with pytest.raises(UserError, match=r"tracking_uri: .*(path holds|after the file's name)"):
        absolute_tracking_uri(uri, Path("/base"))
    with pytest.raises(UserError, match="path holds %"):
        absolute_tracking_uri("sqlite:///m.db", Path("/work/feature%2Ffoo"))


def test_files_follow_a_database_that_is_moved(tmp_path: Path) -> None:
    first, second, copy = tmp_path / "first", tmp_path / "second", tmp_path / "copy"

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
    assert text(alone, one) == "one"  # the files still lie at the old place only
