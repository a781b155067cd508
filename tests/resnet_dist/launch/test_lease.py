"""Two drivers of one run: the second waits until the first is dead; if the first comes back, it may not write."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from resnet_dist.errors import Fault, UserError
from resnet_dist.launch import lease as lease_module
from resnet_dist.launch.lease import FencedStorage, Holder, Lease, take, this_process
from resnet_dist.storage.base import RunStorage
from resnet_dist.storage.folder import FolderStorage
from resnet_dist.tracking.spool import spool_folder
from resnet_dist.tracking.tracker import Spool

ELSEWHERE = replace(this_process(), host="another-machine")


def driver_file(folder: Path, number: int, holder: object) -> None:
    (folder / "driver").mkdir(exist_ok=True)
    (folder / "driver" / f"{number:05d}.lease").touch()
    (folder / "driver" / f"{number:05d}.json").write_text(json.dumps(holder))


def test_a_driver_that_ended_in_order_is_followed_at_once(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path)
    first = take(storage, 60.0)
    first.release()
    second = take(storage, 60.0)
    second.release()
    assert (first.token.number, second.token.number) == (1, 2)
    assert sorted(path.name for path in (tmp_path / "driver").iterdir()) == [
        "00001.json", "00001.lease", "00002.json", "00002.lease",
    ]  # fmt: skip
    take(storage, 60.0).release()
    assert not (tmp_path / "driver" / "00001.lease").exists()


def test_a_lease_is_newer_than_the_spool_even_if_older_leases_were_removed(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path)
    Spool(spool_folder(tmp_path, "r"), storage, lease=7).close()
    lease = take(storage, 60.0)
    lease.release()
    assert lease.token.number == 8
    Spool(spool_folder(tmp_path, "r"), storage, lease=8).close()


def test_a_driver_at_work_keeps_its_run(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path)
    first = take(storage, 1.0)
    with pytest.raises(UserError, match=rf"another driver is working on this run \(pid {os.getpid()} on "):
        take(storage, 5.0)
    first.token.require_held()
    first.release()


def test_a_killed_driver_of_this_machine_is_followed_at_once(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from resnet_dist.launch.lease import take;"
    code += "from resnet_dist.storage.folder import FolderStorage; take(FolderStorage(Path(sys.argv[1])), 60.0);"
    code += "print('held', flush=True); time.sleep(100)"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    process.kill()
    process.wait()
    began_s = time.monotonic()
    assert take(FolderStorage(tmp_path), 600.0).token.number == 2
    assert time.monotonic() - began_s < 300.0


def test_a_dead_drivers_requests_to_ray_are_known_to_the_next(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path)
    driver_file(tmp_path, 1, asdict(replace(ELSEWHERE, request="train-1")))
    second = take(storage, 0.3)
    assert second.left_request == "train-1"
    second.note_request("train-2")
    second.release()
    third = take(storage, 60.0)
    assert third.left_request == ""  # its controller ended in order
    third.release()
    assert json.loads((tmp_path / "driver" / "00002.json").read_text())["request"] == "train-2"


SAME_NAME = replace(this_process(), pid=2**22 + 1, namespace="pid:[1]")
"""A container of this machine: its pids mean nothing here."""


@pytest.mark.parametrize(
    "holder",
    [
        pytest.param(ELSEWHERE, id="on another machine"),
        pytest.param(SAME_NAME, id="in another container"),
        pytest.param("", id="empty"),
        pytest.param("{", id="torn"),
        pytest.param('{"host": 3}', id="of another form"),
    ],
)
def test_a_driver_that_may_be_alive_is_waited_for(tmp_path: Path, holder: Holder | str) -> None:
    (tmp_path / "driver").mkdir()
    (tmp_path / "driver" / "00004.lease").touch()
    text = holder if isinstance(holder, str) else json.dumps(asdict(holder))
    (tmp_path / "driver" / "00004.json").write_text(text)
    said: list[str] = []
    lease = take(FolderStorage(tmp_path), 0.3, said.append)
    assert lease.token.number == 5
    assert "may still be using this run; waiting up to 0.3 s for its heartbeat" in said[0]
    lease.release()


def test_a_driver_that_comes_back_is_fenced_off(tmp_path: Path) -> None:
    """Cut off from storage for longer than the limit, it was followed by another; neither it nor its workers write."""
    storage = FolderStorage(tmp_path)
    old = take(storage, 0.3)
    assert old.is_ours()
    driver_file(tmp_path, 2, asdict(ELSEWHERE))
    with pytest.raises(Fault, match=r"another driver .* on another-machine.* has taken over"):
        old.token.require_held()
    assert not old.is_ours()
    deadline = time.monotonic() + 30
    while old.lost is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert "has taken over" in str(old.lost)
    old.release()
    Lease(storage, 2).require_held()


def test_a_node_without_the_shared_folder_gets_that_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not see what the driver wrote"):
        Lease(FolderStorage(tmp_path), 1).require_held()


def test_a_driver_outlives_a_moment_without_its_folder(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    first = take(FolderStorage(run_dir), 0.6)
    (run_dir / "driver").rename(tmp_path / "away")
    time.sleep(0.5)  # some beats
    (tmp_path / "away").rename(run_dir / "driver")
    with pytest.raises(UserError, match="another driver is working on this run"):
        take(FolderStorage(run_dir), 5.0)
    assert first.is_ours()
    first.release()


# A checkpoint and a storage that is full for a while, or for good.


@dataclass
class Commits:
    """What storage that fails like this made of one checkpoint."""

    failures: list[Exception]
    said: list[str] = field(default_factory=list)
    gave_up: list[str] = field(default_factory=list)
    num_heartbeats: int = 0
    now_s: float = 0.0
    location: str = "runs/r"

    def require_held(self) -> None:
        if self.failures:
            raise self.failures.pop()

    def commit(self, name: str, write: object, last: str) -> None:
        self.said.append(f"committed {name}")

    def heartbeat(self) -> None:
        self.num_heartbeats += 1

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def commit(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Exception]], Commits]:
    def commit(failures: list[Exception]) -> Commits:
        seen = Commits(failures)
        monkeypatch.setattr(lease_module, "time", SimpleNamespace(monotonic=lambda: seen.now_s, sleep=seen.sleep))
        storage: Any = FencedStorage(
            cast(Any, seen), cast(Any, seen), 10, seen.said.append, seen.gave_up.append, seen.heartbeat
        )
        try:
            storage.commit("c", print, "last")
        except Fault as fault:
            seen.said.append(f"raised {fault}")
        return seen

    return commit


FENCED = {"commit", "remove"}
READS = {"location", "folder", "sync_every_s", "names", "fetched", "read", "pull", "require_writable"}
WRITES_ITS_OWN_FILES = {"upload", "create_exclusive", "extended"}
"""Stacks and spools: their names hold the rank or the lease, so nothing of another driver is overwritten."""


def test_whatever_changes_the_checkpoints_of_a_run_is_fenced(tmp_path: Path) -> None:
    public = {name for name in vars(RunStorage) if not name.startswith("_")}
    assert public == FENCED | READS | WRITES_ITS_OWN_FILES
    storage = FolderStorage(tmp_path)
    driver_file(tmp_path, 1, {})
    fenced = FencedStorage(storage, Lease(storage, 1), 10, print)

    def write(folder: Path) -> None:
        (folder / "f").touch()

    for name in ("a", "b"):
        fenced.commit(name, write, "f")
    fenced.remove("a")
    driver_file(tmp_path, 2, {})
    for change in (lambda: fenced.commit("c", write, "f"), lambda: fenced.remove("b")):
        with pytest.raises(Fault, match="has taken over"):
            change()
    assert sorted(storage.names()) == ["b", "driver"]


def full(times: int) -> list[Exception]:
    return [OSError(errno.ENOSPC, "No space left on device") for _ in range(times)]


def test_a_full_disk_that_gets_room_costs_a_warning_and_is_no_hang(commit: Callable[..., Commits]) -> None:
    assert commit([]).said == ["committed c"]
    seen = commit(full(3))
    assert seen.said == [
        "runs/r/c cannot be written: No space left on device; tried again for up to 10 s, training continues",
        "committed c",
        "runs/r/c has been written",
    ]
    assert (seen.now_s, seen.num_heartbeats, seen.gave_up) == (6.0, 3, [])


def test_a_commit_is_given_up_at_the_limit_or_when_another_driver_has_the_run(commit: Callable[..., Commits]) -> None:
    seen = commit(full(100))
    assert (seen.now_s, seen.said[-1]) == (10.0, f"raised {seen.gave_up[0]}")
    assert "runs/r/c could not be written for 10 s" in seen.gave_up[0]
    assert "No space left on device; free some space" in seen.gave_up[0]
    taken_over = commit([Fault("another driver")])
    assert (taken_over.gave_up, taken_over.said) == (["another driver"], ["raised another driver"])
    not_mounted = commit([UserError("does not see what the driver wrote")])  # perhaps it is being mounted again
    assert not_mounted.said[-2:] == ["committed c", "runs/r/c has been written"]
