"""A folder and a bucket: an S3 server on loopback, with the protocol's real requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from resnet_dist.storage.base import RunStorage
from resnet_dist.storage.locations import open_storage


@pytest.fixture(scope="module")
def bucket(object_store: Any) -> str:
    """`s3://` of an empty bucket."""
    object_store.create_bucket(Bucket="runs")
    return "s3://runs"


@pytest.fixture(params=["folder", "objects"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a run may lie that no other test has written to."""
    if request.param == "folder":
        return str(tmp_path / "storage" / "run")
    url: str = request.getfixturevalue("bucket")
    return f"{url}/{tmp_path.name}/run"


@pytest.fixture
def storage(location: str) -> RunStorage:
    return open_storage(location)
