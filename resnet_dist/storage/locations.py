"""Where runs are kept, as a user writes it: a folder, or `s3://bucket/prefix`."""

from __future__ import annotations

from pathlib import Path

from resnet_dist.errors import UserError
from resnet_dist.storage.base import RunStorage
from resnet_dist.storage.folder import FolderStorage


def open_storage(location: str) -> RunStorage:
    """The storage of the run at `location`: a path, or `s3://bucket/prefix/run`. Opens no connection yet.

    Raises UserError for any other URL.
    """
    require_supported(location)
    if not is_url(location):
        return FolderStorage(Path(location).expanduser().absolute())
    from resnet_dist.storage.objects import ObjectStorage  # brings fsspec and botocore

    return ObjectStorage(location.rstrip("/"))


def is_url(location: str) -> bool:
    return "://" in location


def require_supported(location: str) -> None:
    """UserError for a URL that cannot hold runs."""
    if not is_url(location):
        return
    scheme, _, rest = location.partition("://")
    if scheme != "s3":
        raise UserError(f"storage {location}: {scheme}:// is not supported; use a folder or s3://bucket/prefix")
    if not rest.strip("/") or rest.startswith("/"):
        raise UserError(f"storage {location}: names no bucket; use s3://bucket/prefix")
    if "@" in rest or "?" in rest:
        raise UserError(
            "storage: the URL holds more than bucket and prefix; credentials and endpoint come from the environment "
            "(AWS_PROFILE, AWS_ENDPOINT_URL, an instance's role)"
        )


def beside(location: str, name: str) -> str:
    """The location of `name` under the folder or prefix `location`."""
    return f"{location.rstrip('/')}/{name}"


def split(location: str) -> tuple[str, str]:
    """The folder or prefix that holds `location`, and its last name."""
    if not is_url(location):
        path = Path(location).expanduser().absolute().resolve()
        return str(path.parent), path.name
    parent, _, name = location.rstrip("/").rpartition("/")
    return parent, name
