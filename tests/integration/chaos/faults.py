"""Faults of a cluster, caused in the lab. A fault strikes a running training; its `repair` is what a person, a
supervisor or a cloud then does: new nodes, the same command again.
"""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lab import Lab
from network import Machine, send
from training import Training

Mend = Callable[[], None]


@dataclass
class Scene:
    lab: Lab
    training: Training
    dice: random.Random

    def busy_node(self) -> Machine:
        """A node with a worker on it."""
        nodes = [node for node in self.lab.nodes if node.find("ray::RayTrainWorker")]
        return self.dice.choice(nodes or self.lab.nodes)

    def replace(self, node: Machine) -> None:
        """The broken machine goes, a new one comes."""
        self.lab.remove(node.number)
        self.lab.wait_for_nodes(1 + len(self.lab.nodes))
        self.lab.add_node()

    def again(self) -> None:
        """The same command, when the first one has ended."""
        self.training.finish(300)
        self.training.start()


def worker_killed(scene: Scene) -> Mend:
    node = scene.busy_node()
    for pid in node.find("ray::RayTrainWorker"):
        send(pid, signal.SIGKILL)
    return nothing


def worker_stopped(scene: Scene) -> Mend:
    """The clock of one process stands still: a worker that hangs."""
    for pid in scene.busy_node().find("ray::RayTrainWorker"):
        send(pid, signal.SIGSTOP)
    return nothing


def raylet_killed(scene: Scene) -> Mend:
    node = scene.busy_node()
    for pid in node.find("raylet/raylet"):
        send(pid, signal.SIGKILL)
    return lambda: scene.replace(node)


def raylet_stopped(scene: Scene) -> Mend:
    """The node lives and does not answer: its workers go on, Ray gives them up."""
    node = scene.busy_node()
    for pid in node.find("raylet/raylet"):
        send(pid, signal.SIGSTOP)
    return lambda: scene.replace(node)


def node_lost(scene: Scene) -> Mend:
    node = scene.busy_node()
    node.kill_everything()
    return lambda: scene.replace(node)


def link_cut(scene: Scene) -> Mend:
    """For good: the node's processes live on and hear nobody."""
    node = scene.busy_node()
    node.cut_link()
    return lambda: scene.replace(node)


def link_shaky(scene: Scene) -> Mend:
    """Cut for some seconds: sometimes short enough to be survived, sometimes not."""
    node = scene.busy_node()
    node.cut_link()
    time.sleep(scene.dice.uniform(1.0, 20.0))
    node.restore_link()

    def repair() -> None:
        time.sleep(20.0)  # a raylet that was given up hears of it and ends
        if node.address not in scene.lab.alive():
            scene.replace(node)

    return repair


def node_drained(scene: Scene) -> Mend:
    node = scene.busy_node()
    seconds = scene.dice.uniform(20.0, 40.0)
    scene.lab.drain(node, seconds)
    leaves_at = time.monotonic() + seconds

    def repair() -> None:
        time.sleep(max(0.0, leaves_at - time.monotonic()))
        scene.replace(node)

    return repair


def controller_killed(scene: Scene) -> Mend:
    for pid in scene.lab.head.find("ray::TrainController"):
        send(pid, signal.SIGKILL)
    return nothing


def control_killed(scene: Scene) -> Mend:
    """The driver's small actor."""
    for pid in scene.lab.head.find("ray::RunControl"):
        send(pid, signal.SIGKILL)
    return nothing


def driver_killed(scene: Scene) -> Mend:
    for pid in scene.lab.head.find("resnet-dist train"):
        send(pid, signal.SIGKILL)
    return scene.again


def driver_stopped_by_the_user(scene: Scene) -> Mend:
    for pid in scene.lab.head.find("resnet-dist train"):
        send(pid, signal.SIGTERM)
    return scene.again


def driver_followed(scene: Scene) -> Mend:
    """Stands still for so long that the same command takes the run over, and then wakes up."""
    first, pids = scene.training.process, scene.lab.head.find("resnet-dist train")
    assert first is not None
    for pid in pids:
        send(pid, signal.SIGSTOP)

    def repair() -> None:
        before = scene.training.leases()
        scene.training.start()
        scene.training.wait_for(lambda: scene.training.leases() - before != set(), 200)
        for pid in pids:
            send(pid, signal.SIGCONT)
        code = first.wait(timeout=240)
        assert code == 1, f"the driver that was followed ended with {code}"

    return repair


def second_driver(scene: Scene) -> Mend:
    """The same command while the first one is at work: must be refused, and the first one not disturbed."""
    process = scene.training.another()
    try:
        code = process.wait(timeout=400)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError("the second driver neither worked nor was refused") from None
    # 0: the first one was at its end meanwhile, and the second showed its result.
    assert code in (0, 2), f"the second driver ended with {code}"
    return nothing


def head_lost(scene: Scene) -> Mend:
    """GCS, controller and driver at once; then a new, empty cluster, and the job is submitted again."""
    scene.lab.head.kill_everything()

    def repair() -> None:
        scene.training.finish(120)
        for node in scene.lab.nodes:
            scene.lab.remove(node.number)
        scene.lab.start_head()
        for _ in range(scene.lab.num_nodes):
            scene.lab.add_node()
        scene.training.start()

    return repair


def gcs_killed(scene: Scene) -> Mend:
    """The cluster's memory is gone; the driver sees its end coming. Then as above."""
    for pid in scene.lab.head.find("gcs_server"):
        send(pid, signal.SIGKILL)

    def repair() -> None:
        code = scene.training.finish(240)
        assert code == 1, f"the driver ended with {code}"
        head_lost(scene)()

    return repair


def gcs_stopped(scene: Scene) -> Mend:
    """The cluster's memory does not answer for a while."""
    pids = scene.lab.head.find("gcs_server")
    for pid in pids:
        send(pid, signal.SIGSTOP)
    time.sleep(scene.dice.uniform(2.0, 20.0))
    for pid in pids:
        send(pid, signal.SIGCONT)
    return nothing


def disk_full(scene: Scene) -> Mend:
    """Storage has no byte left for a while."""
    ballast = scene.training.ballast
    fill(ballast)

    def repair() -> None:
        time.sleep(scene.dice.uniform(5.0, 40.0))
        ballast.unlink()

    return repair


def fill(file: Path) -> None:
    """Takes what is left of the file system, which is the round's own."""
    with file.open("wb", buffering=0) as opened:
        block = bytes(1 << 16)
        try:
            while True:
                opened.write(block)
        except OSError:
            return


def nothing() -> None:
    """Needs no mending: the run sees to it."""


FAULTS: dict[str, Callable[[Scene], Mend]] = {
    "worker: SIGKILL": worker_killed,
    "worker: SIGSTOP": worker_stopped,
    "raylet: SIGKILL": raylet_killed,
    "node: all processes killed": node_lost,
    "node: link cut for good": link_cut,
    "node: link cut for 1-20 s": link_shaky,
    "node: drained, 20-40 s notice": node_drained,
    "controller: SIGKILL": controller_killed,
    "run control actor: SIGKILL": control_killed,
    "driver: SIGKILL": driver_killed,
    "driver: SIGTERM": driver_stopped_by_the_user,
    "second driver": second_driver,
    "storage: disk full for 5-40 s": disk_full,
    "GCS: SIGKILL": gcs_killed,
    "head: all processes killed": head_lost,
    "raylet: SIGSTOP": raylet_stopped,
    "GCS: SIGSTOP for 2-20 s": gcs_stopped,
    "driver: SIGSTOP, followed by another": driver_followed,
}
