"""A run's storage in Ray Train's words."""

from __future__ import annotations

from typing import Any

from resnet_dist.storage.location import is_url, split


def ray_storage(location: str) -> tuple[str, str, Any]:
    """`storage_path`, `name` and `storage_filesystem` of a RunConfig whose folder is `location`.

    Ray gets the same S3 client as everybody else, so that one set of credentials and one endpoint hold for all.
    """
    parent, name = split(location)
    if not is_url(location):
        return parent, name, None
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    from resnet_dist.storage.objects import connect

    return parent.partition("://")[2], name, PyFileSystem(FSSpecHandler(connect()))
