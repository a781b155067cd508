"""Tracking URIs: which ones work, where they point, and how they look without their secrets. Pure."""

from __future__ import annotations

import re
from pathlib import Path

from resnet_dist.errors import UserError

_USER_INFO = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)[^/\s@?#'\"]*(?:@[^/\s@?#'\"]*)*@")
_SECRET_QUERY = re.compile(
    r"(?P<name>[?&][A-Za-z0-9_.-]*(?:password|passwd|pwd|token|secret|key|sig|signature)=)[^&#\s'\"]*", re.I
)


def redact_uri(text: str) -> str:
    """`text` with `***` for the user info and the secret query values of every URI in it.

    Takes a URI or any longer text (an error message, a YAML file); text without such a URI comes back as it is.
    """
    return _SECRET_QUERY.sub(r"\g<name>***", _USER_INFO.sub(r"\g<scheme>***@", text))


def absolute_tracking_uri(uri: str, base: Path) -> str:
    """The URI with an absolute path, if it has one: `sqlite:///runs.db` starts at `base` (an absolute folder).

    Raises UserError for a URI that cannot hold a training job's runs, with the mend.
    """
    scheme, separator, rest = uri.partition("://")
    if scheme in ("http", "https") and rest.strip("/"):
        return uri.rstrip("/")
    if scheme == "sqlite" and separator:
        name, question, query = rest.partition("?")
        if not name.startswith("/") or name in ("/", "/:memory:") or name.endswith("/"):
            raise UserError(
                f"tracking_uri: {uri} names no file, and a run is written by several processes; "
                "use sqlite:///folder/mlflow.db"
            )
        return f"sqlite:///{base / name[1:]}{question}{query}"
    if not separator or scheme == "file":
        raise UserError(
            f"tracking_uri: {redact_uri(uri)} is a folder, and MLflow 3 no longer keeps runs in folders; "
            "use sqlite:///folder/mlflow.db or http://host:port"
        )
    raise UserError(
        f"tracking_uri: {redact_uri(uri)}: {scheme} is not supported here; use sqlite:///folder/mlflow.db or "
        "http://host:port (a server in front of a database: mlflow server --backend-store-uri ...)"
    )


def sqlite_file(uri: str) -> Path | None:
    """The database file of an absolute `sqlite:///` URI; None for every other URI."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(uri.removeprefix("sqlite:///").partition("?")[0])
