"""Network namespaces on one bridge: machines whose cables can be cut. Linux, root, iproute2."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

PREFIX = os.environ.get("LAB_PREFIX", "rdlab")
"""Begins the names of all namespaces of the lab: leftovers of a killed lab are found by it. Two labs need two."""
_BRIDGE = f"{PREFIX}-bridge"
_NET = "10.77.0"


def available() -> bool:
    """Whether this machine lets us make namespaces."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"{PREFIX}-probe"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    if made:
        _ip("netns", "del", name)
    return made


def make_bridge() -> None:
    """The switch: a bridge in a namespace of its own, so that nothing reaches the machine's own network."""
    remove_all()
    _ip("netns", "add", _BRIDGE)
    _ip("-n", _BRIDGE, "link", "add", "br0", "type", "bridge")
    _ip("-n", _BRIDGE, "link", "set", "br0", "up")


def add_machine(number: int, disk: Path | None = None) -> Machine:
    machine = Machine(number, disk)
    _ip("netns", "add", machine.namespace)
    _ip(*f"-n {machine.namespace} link add eth0 type veth peer name p{number} netns {_BRIDGE}".split())
    _ip("-n", machine.namespace, "link", "set", "lo", "up")
    _ip(*f"-n {machine.namespace} addr add {machine.address}/24 dev eth0".split())
    _ip("-n", machine.namespace, "link", "set", "eth0", "up")
    _ip("-n", _BRIDGE, "link", "set", f"p{number}", "master", "br0")
    machine.restore_link()
    return machine


class Machine:
    """A namespace with one cable to the bridge, and the processes in it. With a `disk` (a folder), /mnt is its own."""

    def __init__(self, number: int, disk: Path | None = None) -> None:
        self.number = number
        self._disk = disk
        self.namespace = f"{PREFIX}-{number}"
        self.address = f"{_NET}.{10 + number}"

    def inside(self, command: list[str]) -> list[str]:
        """The command line that runs `command` on this machine."""
        if self._disk is None:
            return ["ip", "netns", "exec", self.namespace, *command]
        mount = f'mount --bind {shlex.quote(str(self._disk))} /mnt && exec "$@"'
        return ["ip", "netns", "exec", self.namespace, "unshare", "--mount", "sh", "-c", mount, "sh", *command]

    def pids(self) -> list[int]:
        return _pids(self.namespace)

    def find(self, pattern: str) -> list[int]:
        """Processes of this machine with `pattern` in their command line or name, oldest first."""
        return sorted(pid for pid in self.pids() if pattern in _name(pid))

    def cut_link(self) -> None:
        _ip("-n", _BRIDGE, "link", "set", f"p{self.number}", "down")

    def restore_link(self) -> None:
        _ip("-n", _BRIDGE, "link", "set", f"p{self.number}", "up")

    def kill_everything(self) -> None:
        for pid in self.pids():
            send(pid, signal.SIGKILL)

    def remove(self) -> None:
        """The cable too: the kernel takes its time with a namespace's own, and a machine may come back at once."""
        _empty(self.namespace)
        subprocess.run(["ip", "-n", _BRIDGE, "link", "del", f"p{self.number}"], capture_output=True, check=False)
        _ip("netns", "del", self.namespace)


def remove_all() -> None:
    """Every namespace of the lab, with its processes; also those of a lab that was killed."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    for namespace in (line.split()[0] for line in listed.splitlines() if line.startswith(f"{PREFIX}-")):
        _empty(namespace)
        _ip("netns", "del", namespace)


def send(pid: int, number: signal.Signals) -> bool:
    """False if the process is gone already."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _empty(namespace: str, limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while pids := _pids(namespace):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{namespace}: processes {pids} do not end")
        for pid in pids:
            send(pid, signal.SIGKILL)
        time.sleep(0.1)


def _pids(namespace: str) -> list[int]:
    found = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False).stdout
    return [int(word) for word in found.split()]


def _name(pid: int) -> str:
    try:
        folder = Path("/proc") / str(pid)
        line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        return f"{(folder / 'comm').read_text().strip()} {line}"
    except OSError:
        return ""


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
