"""A cluster whose machines share no disk, only a bucket and an MLflow server: two nodes convert digits into the bucket,
three train from it with their own caches, one is lost, the result has the bits of one process, and a sweep runs.

Usage: no_shared_disk.py --folder DIR      (Linux, root, iproute2, moto; 6 GB of memory)
"""

from __future__ import annotations

import argparse
import json
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

from lab import BIN, ROOT, Lab, lab
from network import available
from training import LIMITS, RECIPE, alone, digest, make_data

_BUCKET_PORT = 5555
_MLFLOW = "http://10.77.0.10:5556"
_SPACE = f"""
base: {ROOT}/resnet_dist/recipes/digits_resnet20.yaml
proxy: {{model.name: resnet8, train.total_epochs: 2}}
space:
  optim.lr: {{kind: grid, values: [0.02, 0.05, 0.1, 0.2]}}
search: {{kind: grid}}
metric: val/loss
"""
KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_ENDPOINT_URL": f"http://10.77.0.10:{_BUCKET_PORT}",
}
_MAKE = "import boto3; boto3.client('s3').create_bucket(Bucket='apart')"
_ASK = """
import boto3, sys
client = boto3.client("s3")
for entry in client.list_objects_v2(Bucket="apart", Prefix=sys.argv[1]).get("Contents", []):
    print(entry["Key"])
"""
_GET = "import boto3, sys; boto3.client('s3').download_file('apart', sys.argv[1], sys.argv[2])"


class Bucket:
    """moto's S3 on the head, and questions to it from there: nothing outside the lab reaches its network."""

    def __init__(self, cluster: Lab) -> None:
        self._cluster = cluster
        self._server = subprocess.Popen(
            cluster.head.inside([str(BIN / "moto_server"), "-H", "0.0.0.0", "-p", str(_BUCKET_PORT)]),
            env=cluster.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while (made := self._python(_MAKE)).returncode:
            assert time.monotonic() < deadline, f"the bucket did not come up: {made.stderr[-1000:]}"

    def keys(self, prefix: str) -> list[str]:
        return self._python(_ASK, prefix).stdout.split()

    def fetch(self, key: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        assert self._python(_GET, key, str(target)).returncode == 0, key

    def _python(self, program: str, *words: str) -> subprocess.CompletedProcess[str]:
        # Not on the machine's own /mnt: `target` is the caller's.
        command = ["ip", "netns", "exec", self._cluster.head.namespace, sys.executable, "-c", program, *words]
        return subprocess.run(
            command, env=self._cluster.environment(), capture_output=True, text=True, check=False, timeout=120
        )


def start_mlflow(cluster: Lab) -> None:
    """On the head, its database on the head's own disk."""
    server = f"{BIN}/mlflow server --host 0.0.0.0 --port 5556 --workers 1 --allowed-hosts *".split()
    place = ["--backend-store-uri", "sqlite:////mnt/mlflow.db", "--artifacts-destination", "/mnt/artifacts"]
    log = (cluster.folder / "mlflow.log").open("wb")
    subprocess.Popen(cluster.head.inside([*server, *place]), env=cluster.environment(), stdout=log, stderr=log)
    ask = f"import urllib.request; urllib.request.urlopen('{_MLFLOW}/health', timeout=5)"
    deadline = time.monotonic() + 240
    command = ["ip", "netns", "exec", cluster.head.namespace, sys.executable, "-c", ask]
    while subprocess.run(command, capture_output=True, check=False).returncode:
        assert time.monotonic() < deadline, "MLflow did not come up"


def statuses(folder: Path) -> dict[str, str]:
    """Run name -> status, of all runs that MLflow has."""
    with sqlite3.connect(folder / "disk-0" / "mlflow.db", timeout=60) as database:
        return dict(database.execute("select name, status from runs").fetchall())


def run(cluster: Lab, *words: str) -> subprocess.Popen[str]:
    """A command on the head."""
    return subprocess.Popen(
        cluster.head.inside([str(BIN / words[0]), *words[1:]]),
        cwd=ROOT, env={**cluster.environment(), "RAY_ADDRESS": cluster.address},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def convert(cluster: Lab) -> None:
    for split in ("train", "val"):
        target = f"s3://apart/data/digits/{split}.beton"
        done = run(cluster, "data-prep", "convert", "--source", "digits", "--output", target)
        out, _ = done.communicate(timeout=600)
        assert done.returncode == 0, out[-3000:]


def profile_sets(**more: str) -> list[str]:
    profile = {
        **LIMITS,
        "data_root": "s3://apart/data",
        "cache": "/mnt/cache",
        "storage": "s3://apart/runs",
        "tracking_uri": _MLFLOW,
        **more,
    }
    return [part for key, value in profile.items() for part in ("--profile-set", f"{key}={value}")]


def train(cluster: Lab, bucket: Bucket, lost: int, at_step: int) -> None:
    process = run(
        cluster, "resnet-dist", "train", "resnet_dist/recipes/digits_resnet20.yaml", "--on",
        "cluster/profiles/laptop.yaml", "--name", "apart",
        *profile_sets(workers="1..3"),
        *(part for key, value in RECIPE.items() for part in ("--set", f"{key}={value}")),
    )  # fmt: skip
    deadline = time.monotonic() + 900
    while max(map(_step, bucket.keys("runs/apart/epoch=")), default=0) < at_step:
        assert process.poll() is None, (process.communicate()[0] or "")[-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.5)
    cluster.remove(lost)
    out, _ = process.communicate(timeout=900)
    assert process.returncode == 0, out[-4000:]
    print(out[-3000:])


def _step(key: str) -> int:
    """Of the complete checkpoint that this key proves; 0 for any other key."""
    folder, _, file = key.rpartition("/")
    return int(folder.rpartition("step=")[2]) if file == "checkpoint.json" else 0


def sweep(cluster: Lab) -> Path:
    """Trials on all nodes, the ledger on the head's disk; the sweep's folder, as seen from outside."""
    space = cluster.folder / "space.yaml"
    space.write_text(_SPACE)
    process = run(
        cluster, "resnet-dist", "tune", str(space), "--on", "cluster/profiles/laptop.yaml", "--name", "sweep",
        *profile_sets(workers="1", sweeps="/mnt/sweeps"),
    )  # fmt: skip
    out, _ = process.communicate(timeout=900)
    assert process.returncode == 0, out[-4000:]
    print(out[-3000:])
    return cluster.folder / "disk-0" / "sweeps" / "sweep"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    folder: Path = parser.parse_args().folder
    assert available(), "needs Linux, root and iproute2"
    shutil.rmtree(folder, ignore_errors=True)
    began = time.monotonic()

    def say(what: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {what}", flush=True)

    with lab(folder, 2, own_disks=True, environment=KEYS) as cluster:
        bucket = Bucket(cluster)
        start_mlflow(cluster)
        say("head, two nodes, a bucket and MLflow are up")
        convert(cluster)
        say(f"two nodes converted: {', '.join(bucket.keys('data/'))}")
        third = cluster.add_node()
        say("a third node")
        train(cluster, bucket, third.number, at_step=20)
        say("trained; the third node was lost on the way")
        cluster.add_node()
        swept = sweep(cluster)
        ends = [json.loads(line) for line in (swept / "ledger.jsonl").read_text().splitlines() if "val/loss" in line]
        say(f"a sweep on three nodes: {len(ends)} reports and ends, {sorted(path.name for path in swept.iterdir())}")
        assert (swept / "best_recipe.yaml").is_file()
        say(f"the sweep's weights: {', '.join(bucket.keys('runs/sweep/'))}")
        say(f"MLflow: {statuses(folder)}")
        assert set(statuses(folder).values()) == {"FINISHED"}
        caches = {
            machine: sorted(path.name for path in (folder / f"disk-{machine}").rglob("*.beton")) for machine in range(5)
        }
        say(f"betons on each machine's own disk: {caches}")
        assert all(caches[machine] for machine in (1, 2, 3)), "a node trained without a copy of its own"
        newest = max(key for key in bucket.keys("runs/apart/epoch=") if key.endswith("state.pt"))
        name = Path(newest).parent.name
        bucket.fetch(newest, folder / "result" / name / "state.pt")
    expected = alone(folder / "alone", make_data(folder / "shared"))
    found = digest(folder / "result")
    say(f"weights and optimizer: {found}, in one process: {expected}")
    assert found == expected


if __name__ == "__main__":
    main()
