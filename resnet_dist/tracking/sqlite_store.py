"""A sqlite file as MLflow's store: whether it is one, of which version, and whether its paths are still right."""

from __future__ import annotations

import os
import shlex
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from functools import cache
from pathlib import Path
from urllib.parse import quote

from resnet_dist.errors import UserError

ARTIFACTS = "mlartifacts"
"""The folder beside the database that has the files of its runs."""
_HEADER = b"SQLite format 3\0"
_LIMIT_S = 10.0
_PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Columns in which MLflow keeps absolute paths."""


def require_current(database: Path) -> None:
    """UserError unless `database` is MLflow's, of the version of the library that is installed, or still empty.

    MLflow itself would migrate an older one whenever it is opened, so that the older version could no longer read it.
    It would also make its tables in another program's file, and try for minutes to open a file that it cannot open.
    """
    if not database.exists():
        raise UserError(f"tracking_uri: there is no MLflow database {database}")
    tables: set[str] = set()
    found = None
    with suppress(_Locked), _opened(database, "ro") as connection:
        tables = {name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")}
        found = _revision(connection) if "alembic_version" in tables else None
    if found is None:
        if tables and "experiments" not in tables:
            raise UserError(f"tracking_uri: {database} is a sqlite database, but not MLflow's; name another file")
        return  # empty, or its tables were never finished, which MLflow does
    head, known = _schemas()
    if found == head:
        return
    import mlflow

    if found not in known:
        raise UserError(
            f"tracking_uri: {database} was written by a newer MLflow than {mlflow.__version__}, which is installed "
            f"(schema {found} is not known); use that version of MLflow, or name another file"
        )
    uri = f"sqlite:///{database}"
    raise UserError(
        f"tracking_uri: {database} was written by an older MLflow (schema {found}; {mlflow.__version__} has {head}); "
        "that one cannot read it once it is upgraded; make a copy first: "
        f"cp {shlex.quote(str(database))} {shlex.quote(f'{database}.before-upgrade')}, then upgrade it: "
        f"mlflow db upgrade {shlex.quote(uri)}"
    )


def create_empty(database: Path) -> None:
    """An empty file that only its owner may read, unless there is one. Raises OSError, UserError."""
    database.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.close(os.open(database, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        return
    except FileExistsError:
        pass
    if not database.is_file():
        raise UserError(f"tracking_uri: {database} is not a file; name another one")
    with database.open("r+b") as file:  # mlflow would try for 100 s to open what cannot be opened
        header = file.read(len(_HEADER))
    if header not in (b"", _HEADER):
        raise UserError(f"tracking_uri: {database} is not a sqlite database; name another file")


def follow_moved_files(database: Path) -> str | None:
    """Corrects the paths in `database` if it and the files of its runs were moved or copied together; returns a
    message.

    MLflow keeps absolute paths: new files would be written to the old location, and older ones would not be found.
    Nothing is changed if the files are still only at the old location.
    """
    own = (database.parent / ARTIFACTS).as_uri()
    moved: list[str] = []
    with suppress(_Locked), _opened(database, "ro") as connection:
        rows = connection.execute("select artifact_location from experiments").fetchall()
        locations = [location for (location,) in rows if location and f"/{ARTIFACTS}/" in location]
        olds = {location.rpartition(f"/{ARTIFACTS}/")[0] + f"/{ARTIFACTS}" for location in locations} - {own}
        moved = [old for old in sorted(olds) if old.startswith("file:///") and _came_along(connection, old, own)]
    if not moved:
        return None
    with _opened(database, "rw") as connection:
        for old in moved:
            for table, column in _PLACES:
                connection.execute(
                    f"update {table} set {column} = ? || substr({column}, ?) where substr({column}, 1, ?) = ?",
                    (own, len(old) + 1, len(old) + 1, f"{old}/"),
                )
        connection.commit()
    return f"{database} was moved: the files of its runs are now looked for in {database.parent / ARTIFACTS}"


def _came_along(connection: sqlite3.Connection, old: str, own: str) -> bool:
    """Whether the files are at the new location: the old folder is gone, or a run's folder is in the new one."""
    from mlflow.utils.file_utils import local_file_uri_to_path

    old_folder, own_folder = Path(local_file_uri_to_path(old)), Path(local_file_uri_to_path(own))
    if not old_folder.exists():
        return True
    uris = connection.execute("select artifact_uri from runs where substr(artifact_uri, 1, ?) = ?", (len(old), old))
    inside = [uri.removeprefix(old).strip("/").removesuffix("/artifacts") for (uri,) in uris]
    return any((own_folder / run).is_dir() for run in inside if run)


class _Locked(UserError):
    """Seconds to wait for another writer; MLflow itself waits longer."""


@contextmanager
def _opened(database: Path, mode: str) -> Iterator[sqlite3.Connection]:
    """Raises UserError for a file that is damaged, cannot be read, or stays locked for too long."""
    if database.is_dir():
        raise UserError(f"tracking_uri: {database} is a folder; name a database in it, such as mlflow.db")
    try:
        uri = f"file:{quote(str(database))}?mode={mode}"
        with closing(sqlite3.connect(uri, uri=True, timeout=_LIMIT_S)) as connection:
            yield connection
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            raise _Locked(f"tracking_uri: {database} is locked by another process; try again when it is done") from None
        raise UserError(f"tracking_uri: {database} cannot be opened: {error}") from None
    except sqlite3.DatabaseError as error:
        raise UserError(f"tracking_uri: {database} is damaged ({error}); replace it with a copy") from None


def _revision(connection: sqlite3.Connection) -> str | None:
    row = connection.execute("select version_num from alembic_version").fetchone()
    return None if row is None else str(row[0])


@cache
def _schemas() -> tuple[str, frozenset[str]]:
    """The revision of MLflow's tables in the installed library, and all those that it can upgrade."""
    from alembic.script import ScriptDirectory
    from mlflow.store.db.utils import _get_alembic_config, _get_latest_schema_revision  # no public way to ask

    known = ScriptDirectory.from_config(_get_alembic_config(db_url="")).walk_revisions()
    return _get_latest_schema_revision(), frozenset(revision.revision for revision in known)
