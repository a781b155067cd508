"""A Ray cluster of separate machines on one computer: a head and nodes, each in its own network namespace."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from network import Machine, add_machine, make_bridge, remove_all

ROOT = Path(__file__).parents[3]
BIN = Path(sys.executable).parent
_PORT = 6379
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "GLOO_SOCKET_IFNAME": "eth0",  # the host's name means 127.0.0.1 in every namespace
    # A dead node is known after 11 s instead of Ray's 64.
    "RAY_health_check_initial_delay_ms": "3000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "20",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "3",
}


class Lab:
    """Machine 0 is the head (GCS, driver, controller; no CPUs to train on), the others are nodes with one CPU each."""

    def __init__(
        self,
        folder: Path,
        num_nodes: int,
        *,
        dashboard: bool = False,
        own_disks: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`own_disks`: each machine's /mnt is a folder that no other machine has. `environment`: of all processes."""
        self.folder = folder
        self._own_disks = own_disks
        self._environment = dict(environment or {})
        self.num_nodes = num_nodes
        self._dashboard = dashboard
        self._temporary = Path(tempfile.mkdtemp(prefix="rl", dir="/tmp"))
        self._started: dict[int, subprocess.Popen[bytes]] = {}
        self.machines: dict[int, Machine] = {}
        self._next = 1
        self._probe: subprocess.Popen[str] | None = None

    @property
    def head(self) -> Machine:
        return self.machines[0]

    @property
    def nodes(self) -> list[Machine]:
        return [machine for number, machine in self.machines.items() if number]

    @property
    def address(self) -> str:
        return f"{self.head.address}:{_PORT}"

    @property
    def dashboard_url(self) -> str:
        return f"http://{self.head.address}:8265"

    def start_head(self) -> None:
        """A new, empty head, under the old one's address if there was one."""
        if 0 in self.machines:
            self.remove(0)
        if self._probe is not None:
            self._probe.kill()
            self._probe.wait()
        self.machines[0] = add_machine(0, self._disk(0))
        options = [f"--port={_PORT}", "--head", "--num-cpus=0", f"--include-dashboard={str(self._dashboard).lower()}"]
        self._ray_start(self.head, [*options, "--dashboard-host=0.0.0.0"])
        self.wait_for_nodes(1)

    def add_node(self) -> Machine:
        """One more machine. Nodes come one after the other: Ray's set-up of several at once on one disk races."""
        alive = len(self.alive())
        machine = add_machine(self._next, self._disk(self._next))
        self.machines[machine.number] = machine
        self._next = self._next % 200 + 1
        self._ray_start(machine, [f"--address={self.address}", "--num-cpus=1"])
        self.wait_for_nodes(alive + 1)
        return machine

    def _disk(self, number: int) -> Path | None:
        if not self._own_disks:
            return None
        disk = self.folder / f"disk-{number}"
        disk.mkdir(exist_ok=True)
        return disk

    def remove(self, number: int) -> None:
        """The machine is gone, with everything on it."""
        self.machines.pop(number).remove()
        process = self._started.pop(number, None)
        if process is not None:
            process.wait(timeout=30)

    def process(self, machine: Machine) -> subprocess.Popen[bytes]:
        """The machine's `ray start --block`."""
        return self._started[machine.number]

    def alive(self) -> dict[str, str]:
        """Address -> Ray's id of every node that the GCS takes for alive. Raises RuntimeError if it does not say."""
        answer = self._ask("nodes")
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return dict(answer)

    def wait_for_nodes(self, number: int, limit_s: float = 300.0) -> None:
        deadline = time.monotonic() + limit_s
        while True:
            try:
                found = self.alive()
            except RuntimeError as error:
                found, problem = {}, str(error)
            else:
                problem = str(found)
            if len(found) == number:
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"{number} nodes expected after {limit_s:g} s: {problem[-2000:]}")
            time.sleep(0.5)

    def drain(self, machine: Machine, seconds: float) -> None:
        """What a cloud says before it takes a spot machine back."""
        node_id = self.alive()[machine.address]
        answer = self._ask(f"drain {node_id} {int(1000 * (time.time() + seconds))}")
        if not answer[0]:
            raise RuntimeError(f"{machine.address} was not drained: {answer}")

    def _ask(self, question: str) -> Any:
        """One question to a process on the head, which is started again if it has ended."""
        if self._probe is None or self._probe.poll() is not None:
            self._probe = subprocess.Popen(
                self.head.inside([sys.executable, str(Path(__file__).with_name("probe.py")), self.address]),
                env=self.environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        assert self._probe.stdin is not None
        assert self._probe.stdout is not None
        try:
            self._probe.stdin.write(question + "\n")
            self._probe.stdin.flush()
            return json.loads(self._probe.stdout.readline() or '{"error": "the probe ended"}')
        except (OSError, ValueError) as error:
            return {"error": repr(error)}

    def environment(self) -> dict[str, str]:
        return {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT), **self._environment}

    def close(self) -> None:
        remove_all()
        if self._probe is not None:
            self._probe.wait(timeout=30)
        for process in self._started.values():
            process.wait(timeout=30)
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _ray_start(self, machine: Machine, options: list[str]) -> None:
        log = self.folder / f"ray-{machine.number}.log"
        temporary = self._temporary / str(machine.number)
        command = [str(BIN / "ray"), "start", "--block", "--disable-usage-stats", f"--temp-dir={temporary}"]
        command += [f"--node-ip-address={machine.address}", *options]
        with log.open("ab") as output:
            self._started[machine.number] = subprocess.Popen(
                machine.inside(command), env=self.environment(), stdout=output, stderr=output, start_new_session=True
            )


@contextmanager
def lab(folder: Path, num_nodes: int, **options: Any) -> Iterator[Lab]:
    """A cluster that is up, and gone afterwards whatever happened."""
    folder.mkdir(parents=True, exist_ok=True)
    make_bridge()
    built = Lab(folder, num_nodes, **options)
    try:
        built.start_head()
        for _ in range(num_nodes):
            built.add_node()
        yield built
    finally:
        built.close()
