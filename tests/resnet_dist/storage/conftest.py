"""A folder and a bucket: an S3 server on loopback, with the protocol's real requests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from resnet_dist.storage.base import RunStorage
from resnet_dist.storage.location import open_storage

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """`s3://` of an empty bucket; credentials and endpoint in the environment, as a user has them."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for key, value in ENVIRONMENT.items():
            patch.setenv(key, value)
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        boto3.client("s3").create_bucket(Bucket="runs")
        yield "s3://runs"
    server.stop()


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
