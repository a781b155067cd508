"""Tracking URIs: which ones work, where they point, and how they look without their secrets. Pure."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

from data_prep.redaction import redacted
from resnet_dist.errors import UserError


def absolute_tracking_uri(uri: str, base: Path) -> str:
    """The URI with an absolute path, if it has one: `sqlite:///runs.db` starts at `base` (an absolute folder).

    Raises UserError for a URI that cannot hold a training job's runs, with the mend.
    """
    scheme, separator, rest = uri.partition("://")
    if scheme in ("http", "https") and rest.strip("/"):
        _require_host(uri)
        return uri.rstrip("/")
    if scheme == "sqlite" and separator:
        name, question, query = rest.partition("?")
        path = str(base / name[1:])
        if question and not re.fullmatch(r"timeout=\d+(\.\d+)?", query):
            raise UserError(f"tracking_uri: {redacted(uri)}: after the file's name only ?timeout=SECONDS is understood")
        if odd := sorted({"%", "?"} & set(path)):
            raise UserError(
                f"tracking_uri: {path}: MLflow takes no database whose path holds {' and '.join(odd)}; name a file "
                "elsewhere, or use an MLflow server, http://host:port"
            )
        if not name.startswith("/") or name in ("/", "/:memory:") or name.endswith("/"):
            raise UserError(
                f"tracking_uri: {uri} names no file, and a run is written by several processes; "
                "use sqlite:///folder/mlflow.db"
            )
        return f"sqlite:///{path}{question}{query}"
    if not separator and Path(uri).suffix in (".db", ".sqlite", ".sqlite3"):
        raise UserError(f"tracking_uri: {uri} is a file's name; for an sqlite database write sqlite:///{uri}")
    if not separator or scheme == "file":
        raise UserError(
            f"tracking_uri: {redacted(uri)} is a folder, and MLflow 3 no longer keeps runs in folders; "
            "use sqlite:///folder/mlflow.db or http://host:port"
        )
    raise UserError(
        f"tracking_uri: {redacted(uri)}: {scheme} is not supported here; use sqlite:///folder/mlflow.db or "
        "http://host:port (a server in front of a database: mlflow server --backend-store-uri ...)"
    )


def _require_host(uri: str) -> None:
    """UserError for a URI that a client would read otherwise than it is meant; what is quoted would be a password."""
    try:
        parts = urlsplit(uri)
        is_read_whole = bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_read_whole = False
    user_info = redacted(uri) != uri
    if is_read_whole and (not user_info or "@" in parts.netloc or "***@" not in redacted(uri)):
        return
    raise UserError(
        f"tracking_uri: {redacted(uri)} is no address like http://host:port"
        + (
            "; give user and password as MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or write their / ? # @ "
            "and % as %2F %3F %23 %40 and %25"
            if user_info
            else ""
        )
    )


def sqlite_file(uri: str) -> Path | None:
    """The database file of an absolute `sqlite:///` URI; None for every other URI."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(uri.removeprefix("sqlite:///").partition("?")[0])
