"""Rounds of chaos: in each, a run is started, a fault strikes it at a random step, and it must end with the same bits.

Usage: rounds.py --rounds 20 --seed 0 --folder DIR --report FILE.md      (Linux, root, iproute2; 10 GB of memory)
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from faults import FAULTS, Scene
from lab import Lab, lab
from network import available, send
from training import LAST_STEP, Training, alone, make_data

NODES = 3
LIMIT_S = 900.0
_STORAGE_BYTES = 64 << 20
_GROUP = re.compile(r"workers up: (\d+), from step (\d+)(?: \(last seen at step (\d+)\))?")


@dataclass(frozen=True)
class Round:
    number: int
    fault: str
    asked_step: int
    struck_step: int
    groups: list[tuple[int, int]]
    """(workers, step it went on from) of every worker group."""
    recovery_s: float | None
    """From the fault to the first new step; None if training was over before."""
    seconds: float
    problem: str = ""

    def row(self) -> str:
        groups = ", ".join(f"{workers} from {step}" for workers, step in self.groups)
        lost = max((self.struck_step - step for _, step in self.groups[1:]), default=0)
        recovery = "-" if self.recovery_s is None else f"{self.recovery_s:.0f}"
        end = self.problem or "same bits, every point once"
        cells = [self.number, self.fault, self.struck_step, groups, max(lost, 0), recovery, f"{self.seconds:.0f}", end]
        return "| " + " | ".join(str(cell) for cell in cells) + " |"


HEADER = (
    "| round | fault | at step | workers of each group, and the step it went on from | steps done again "
    "| fault to next new step, s | round, s | end |\n|---|---|---|---|---|---|---|---|"
)


def deck(seed: int) -> list[str]:
    """The order of the faults: every one once before any comes again."""
    dice, cards = random.Random(seed), list(FAULTS)
    dice.shuffle(cards)
    return cards


def play(cluster: Lab, folder: Path, disk: Path, seed: int, number: int, fault: str, expected: Expected) -> Round:
    dice = random.Random(f"{seed}-{number}")
    began_s = time.monotonic()
    place = disk / f"round-{seed}-{number}-{time.time_ns()}"
    training = Training(cluster, folder, place, dice.choice([f"1..{NODES}", "2"]))  # 2: with a spare node
    asked, struck, recovery_s = dice.randrange(1, LAST_STEP - 8), 0, None
    problem = ""
    try:
        training.start()
        training.wait_for(lambda: training.step() >= asked, LIMIT_S)
        struck = training.step()
        repair = FAULTS[fault](Scene(cluster, training, dice))
        struck_s = time.monotonic()
        struck = max(struck, training.step())
        repair()
        if training.wait_for(lambda: training.step() > struck, LIMIT_S) is not None:
            recovery_s = time.monotonic() - struck_s
        code = training.finish(LIMIT_S)
        assert code == 0, f"exit code {code}: {training.tail()[-300:]}"
        expected.compare(training)
    except AssertionError as error:
        problem = " ".join(str(error).split())[-400:].replace("|", "/")
    except Exception as error:  # noqa: BLE001 - the other rounds go on
        problem = repr(error)[:400].replace("|", "/")
    finally:
        for pid in cluster.machines[0].find("resnet-dist train") if 0 in cluster.machines else ():
            send(pid, signal.SIGKILL)
        training.ballast.unlink(missing_ok=True)
    groups = [
        (int(m.group(1)), int(m.group(2))) for line in training.events() if (m := _GROUP.search(line)) is not None
    ]
    if problem:
        shutil.copytree(training.folder, folder / "kept" / training.folder.name)
    shutil.rmtree(training.folder)
    return Round(number, fault, asked, struck, groups, recovery_s, time.monotonic() - began_s, problem)


@dataclass
class Expected:
    digest: str
    points: dict[str, list[tuple[int, float]]]

    def compare(self, training: Training) -> None:
        found = training.digest()
        assert found == self.digest, f"weights {found}, undisturbed {self.digest}"
        points = training.points()
        assert set(points) == set(self.points), f"curves {sorted(points)}"
        for key, rows in points.items():
            wrong = [pair for pair in zip(rows, self.points[key], strict=False) if pair[0] != pair[1]]
            assert len(rows) == len(self.points[key]), f"{key}: {len(rows)} points, {len(self.points[key])} expected"
            assert not wrong, f"{key}: {wrong[:2]}"


@contextmanager
def tiny_disk(folder: Path) -> Iterator[Path]:
    """A file system in memory for the runs, so that filling it fills nothing else. Before any node starts: each has its
    own view of the mounts."""
    disk = folder / "storage"
    disk.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_STORAGE_BYTES}", "chaos", str(disk)], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def repair_cluster(cluster: Lab) -> None:
    """A whole cluster for the next round, whatever the last one left."""
    try:
        cluster.wait_for_nodes(1 + NODES, limit_s=60.0)
        if len(cluster.nodes) == NODES:
            return
    except (TimeoutError, RuntimeError, OSError, KeyError):  # no head at all
        pass
    for node in cluster.nodes:
        cluster.remove(node.number)
    cluster.start_head()
    for _ in range(NODES):
        cluster.add_node()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--first", type=int, default=1, help="number of the first round, to go on where one stopped")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--only", action="append", help="this fault in every round; given again, these in turns")
    options = parser.parse_args()
    if not available():
        raise SystemExit("needs Linux, root and iproute2: no network namespace can be made here")
    folder: Path = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    data_root = make_data(folder / "data")
    digest = alone(folder / f"alone-{time.time_ns()}" / "run", data_root)
    print(f"one process: {digest}", flush=True)
    with tiny_disk(folder) as disk, lab(folder / "lab", NODES) as cluster:
        undisturbed = Training(cluster, folder, disk / f"undisturbed-{time.time_ns()}", f"1..{NODES}")
        undisturbed.start()
        assert undisturbed.finish(LIMIT_S) == 0, undisturbed.tail()
        assert undisturbed.digest() == digest
        expected = Expected(digest, undisturbed.points())
        print("undisturbed on the cluster: the same", flush=True)
        if not options.report.exists():
            options.report.write_text(f"Undisturbed, one process and {NODES} workers: weights {digest}\n\n{HEADER}\n")
        cards = options.only or deck(options.seed)
        for number in range(options.first, options.first + options.rounds):
            fault = cards[(number - 1) % len(cards)]
            print(f"round {number}: {fault}", flush=True)
            played = play(cluster, folder, disk, options.seed, number, fault, expected)
            print(played.row(), flush=True)
            with options.report.open("a") as report:
                report.write(played.row() + "\n")
            repair_cluster(cluster)


if __name__ == "__main__":
    main()
