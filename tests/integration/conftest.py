"""Fixtures of the integration tests: a small data set and a running Ray cluster."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
QUIET = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    # Ray's workers run at nice 15: beside anything else on the machine they would hardly move.
    "RAY_worker_niceness": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}


@dataclass(frozen=True)
class Cli:
    """Runs the project's commands as a user would, with paths of one test."""

    folder: Path
    data_root: Path
    environment: Mapping[str, str]

    def train_command(self, *extra: str, name: str = "run") -> list[str]:
        settings = {
            "data_root": self.data_root,
            "storage": self.folder / "runs",
            "tracking_uri": f"sqlite:///{self.folder}/mlflow.db",
        }
        sets = [part for key, value in settings.items() for part in ("--profile-set", f"{key}={value}")]
        recipe, profile = "resnet_dist/recipes/digits_resnet20.yaml", "cluster/profiles/laptop.yaml"
        return [str(BIN / "resnet-dist"), "train", recipe, "--on", profile, "--name", name, *sets, *extra]

    def start(self, command: list[str], **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
        process = self.start(command, **environment)
        try:
            out, err = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with the digits' train and val betons, made by the command."""
    root = tmp_path_factory.mktemp("data")
    (root / "digits").mkdir()
    for split in ("train", "val"):
        command = [str(BIN / "data-prep"), "convert", "--source", "digits", "--workers", "0"]
        subprocess.run(
            [*command, "--output", str(root / "digits" / f"{split}.beton")],
            env={**os.environ, **QUIET},
            check=True,
            timeout=120,
        )
    return root


@dataclass(frozen=True)
class Head:
    address: str
    dashboard: str
    pid: int
    """Of `ray start`; its node's processes descend from it."""

    @contextmanager
    def another_node(
        self, ip: str | None = None, *, num_cpus: int = 1, num_gpus: int = 0, **environment: str
    ) -> Iterator[None]:
        """One more node, as long as this lasts. `ip`: an own address; without one, Ray Train counts the head and this
        node as one. `environment`: of its processes.
        """
        options = [f"--address={self.address}", f"--num-cpus={num_cpus}", f"--num-gpus={num_gpus}"]
        with ray_process([*options, *([f"--node-ip-address={ip}"] if ip else [])], **environment):
            yield


@contextmanager
def ray_process(
    options: list[str], log: Path = Path(os.devnull), **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """`ray start --block` with these options, ended with its whole process group."""
    command = [str(BIN / "ray"), "start", "--block", "--disable-usage-stats", *options]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env={**os.environ, **QUIET, **environment}, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def ray_head(num_cpus: int, log: Path) -> Iterator[Head]:
    """A `ray start --head` of its own, with the dashboard that jobs need, on ports of its own."""
    port, dashboard = free_port(), free_port()
    options = ["--head", f"--num-cpus={num_cpus}", f"--port={port}", "--include-dashboard=true"]
    options += [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={free_port()}"]
    options += [f"--ray-client-server-port={free_port()}"]
    url = f"http://127.0.0.1:{dashboard}"
    with ray_process(options, log) as process:
        wait_until_answers(url + "/api/version", process, log)
        yield Head(f"127.0.0.1:{port}", url, process.pid)


@pytest.fixture(scope="session")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A cluster that somebody else started, with more logical CPUs than the machine has."""
    with ray_head(8, tmp_path_factory.mktemp("ray") / "head.log") as started:
        yield started


@pytest.fixture
def small_head(tmp_path: Path) -> Iterator[Head]:
    """A cluster with room for one worker, that a node may join."""
    with ray_head(1, tmp_path / "head.log") as started:
        yield started


def wait_until_answers(url: str, process: subprocess.Popen[bytes], log: Path, limit_s: float = 120.0) -> None:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(url, timeout=2.0)
            return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(f"{url} did not answer within {limit_s} s: {log.read_text()}")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture
def cli(tmp_path: Path, digits: Path) -> Cli:
    return Cli(tmp_path, digits, QUIET)
