"""Fixtures for tests of several packages: a separate environment, an object store on loopback, a node with GPUs."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import fsspec
import hypothesis
import pytest
from moto.server import ThreadedMotoServer

SHARED_RAY = "shared Ray"
# Ray reads it once per process: a test that starts a Ray with tokens would break the next one's without.
os.environ["RAY_AUTH_MODE"] = "disabled"
hypothesis.settings.register_profile("tests", deadline=None)  # a slow machine is no failure
hypothesis.settings.load_profile("tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Makes the tests of one file, and all that share a session's Ray cluster, run in one process: fixtures are made
    once. The longest come first, so that no process is left with them at the end. All of `integration/` and `browser/`
    are `system` tests.
    """
    for item in items:
        folder = item.path.relative_to(item.config.rootpath).parts[1]
        if folder in ("integration", "browser"):
            item.add_marker("system")
        uses_head = "head" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group(SHARED_RAY if uses_head else item.path.name))
    items.sort(key=lambda item: "head" not in getattr(item, "fixturenames", ()))
    items.sort(key=lambda item: item.get_closest_marker("system") is None)


@pytest.fixture(autouse=True)
def environment_restored() -> Iterator[None]:
    """The command lines set variables of their process; run inside a test, they must not reach the next test."""
    before = dict(os.environ)
    yield
    for key in os.environ.keys() - before.keys():
        del os.environ[key]
    os.environ.update(before)


@pytest.fixture(scope="module")
def object_store() -> Iterator[Any]:
    """boto3's client of an S3 server; its address and key are in the environment, as a user has them.

    fsspec keeps file systems by their arguments, which do not name the address: one of a server that has ended is
    thrown away, before and after.
    """
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    forget = fsspec.get_filesystem_class("s3").clear_instance_cache
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        }.items():
            patch.setenv(key, value)
        forget()
        yield boto3.client("s3")
        forget()
    server.stop()


@pytest.fixture(scope="session")
def nvml_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for LD_LIBRARY_PATH: processes that start with it see NVIDIA's GPUs, as `fake_nvml.c` has them."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler here")
    folder, source = tmp_path_factory.mktemp("nvml"), Path(__file__).with_name("resnet_dist") / "gpus" / "fake_nvml.c"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-o", str(folder / "libnvidia-ml.so.1"), str(source)], check=True, timeout=60
    )
    return folder
