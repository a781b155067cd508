"""A real server whose disks are full: small disks of its own, in a mount namespace that ends with it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient

from resnet_dist.bench.mlflow_server import MlflowServer
from resnet_dist.errors import Fault
from resnet_dist.tracking.mlflow_run import RunHandle, end_run, open_run
from resnet_dist.tracking.spool import Metrics, SpoolReader, spool_folder
from resnet_dist.tracking.sync import sync
from resnet_dist.tracking.tracker import SpoolTracker

NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]
NEW_DISKS = """
for disk in database artifacts; do mount -t tmpfs -o size=6m small "$1/$disk"; done
cp "$2" "$1/database/mlflow.db"; shift 2; exec "$@"
"""
MAY_MOUNT = (
    shutil.which("unshare") is not None
    and subprocess.run([*NAMESPACE, "mount", "-t", "tmpfs", "x", "/mnt"], capture_output=True).returncode == 0
)
pytestmark = pytest.mark.skipif(not MAY_MOUNT, reason="may not mount a disk of its own here")


@dataclass(frozen=True)
class Disk:
    """6 MB, as the server sees them; nobody else does."""

    path: Path

    def fill(self) -> None:
        with (self.path / "ballast").open("wb", buffering=0) as ballast:
            try:
                while True:
                    ballast.write(b"\0" * 4096)
            except OSError:
                return

    def empty(self) -> None:
        (self.path / "ballast").unlink()


@dataclass(frozen=True)
class SmallServer:
    uri: str
    log: Path
    database: Disk
    artifacts: Disk


@pytest.fixture(scope="module")
def small(template_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallServer]:
    folder = tmp_path_factory.mktemp("small")
    for disk in ("database", "artifacts"):
        (folder / disk).mkdir()
    server = MlflowServer(
        folder, wrapper=[*NAMESPACE, "sh", "-ec", NEW_DISKS, "sh", str(folder), str(template_database)]
    )
    server.database = folder / "database" / "mlflow.db"
    server.start()
    seen = Path(f"/proc/{server.pid}/root{folder}")
    yield SmallServer(server.uri, folder / "server.log", Disk(seen / "database"), Disk(seen / "artifacts"))
    server.kill()


def spooled(handle: RunHandle) -> list[tuple[str, int, float]]:
    reader, found = SpoolReader(spool_folder(handle.run_dir, handle.run_id)), []
    while events := reader.read():
        found += [(k, e.step, v) for e in events if isinstance(e, Metrics) for k, v in e.values.items()]
    return found


def stored(handle: RunHandle, *keys: str) -> list[tuple[str, int, float]]:
    client = MlflowClient(handle.tracking_uri)
    return [(m.key, m.step, m.value) for key in keys for m in client.get_metric_history(handle.run_id, key)]


def test_a_full_database(small: SmallServer, tmp_path: Path) -> None:
    """Points wait until there is room again; what had gone in before is neither lost nor doubled."""
    handle = open_run(small.uri, "exp", "r", tmp_path / "run", {}, {})
    tracker = SpoolTracker(handle.run_dir, handle.run_id, small.uri, max_backoff_s=0.5, close_limit_s=0.5)
    for step in range(1, 51):
        tracker.metrics({"loss": 1.0 / step, "lr": 0.1}, step)
    assert tracker.flush(60)
    small.database.fill()
    for step in range(51, 3001):
        tracker.metrics({"loss": 1.0 / step, "lr": 0.1}, step)
    assert not tracker.flush(3.0)
    tracker.close()
    assert not end_run(handle, "KILLED", "ended while the database was full")
    with pytest.raises(Fault, match="run the same command again"):
        sync(handle.run_dir, small.uri)
    assert "database or disk is full" in small.log.read_text()
    small.database.empty()
    assert sync(handle.run_dir, small.uri).end_status_sent
    assert sorted(stored(handle, "loss", "lr")) == sorted(spooled(handle))
    assert len(spooled(handle)) == 6000
    run = MlflowClient(small.uri).get_run(handle.run_id)
    assert (run.info.status, run.data.tags["ended"]) == ("KILLED", "ended while the database was full")


def test_a_full_artifact_store(small: SmallServer, tmp_path: Path) -> None:
    """Texts wait, points do not."""
    handle = open_run(small.uri, "exp", "r", tmp_path / "run", {}, {})
    tracker = SpoolTracker(handle.run_dir, handle.run_id, small.uri, max_backoff_s=0.5)
    small.artifacts.fill()
    tracker.text("notes/small.txt", "kept" * 2000)
    tracker.metrics({"loss": 0.5}, 1)
    tracker.tags({"seen": "yes"})
    assert not tracker.flush(3.0)
    assert "No space left on device" in small.log.read_text()
    client = MlflowClient(small.uri)
    assert stored(handle, "loss") == [("loss", 1, 0.5)]
    assert client.get_run(handle.run_id).data.tags["seen"] == "yes"
    small.artifacts.empty()
    assert tracker.flush(60)
    tracker.close()
    target = client.download_artifacts(handle.run_id, "notes/small.txt", str(tmp_path))
    assert Path(target).read_text() == "kept" * 2000
