"""Links planted in a run's storage are replaced or refused; their targets stay untouched."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from data_prep.beton.files import (
    Unfit,
    append,
    make_folder,
    open_regular,
    read_small,
    temporary_beside,
    write_text_atomically,
)
from resnet_dist.errors import Fault, UserError
from resnet_dist.launch.lease import take
from resnet_dist.launch.progress import EventLog
from resnet_dist.launch.publish import read_result
from resnet_dist.storage.base import read_json, write_json
from resnet_dist.storage.folder import FolderStorage
from resnet_dist.storage.objects import _is_plain
from resnet_dist.sweeps.ledger import open_ledger, read_ledger
from resnet_dist.tracking.plots import new_figure, save
from resnet_dist.training.checkpoint import (
    METADATA,
    CheckpointMetadata,
    Identity,
    checkpoint_name,
    verify_checkpoint,
    write_checkpoint,
)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A file of the user's that others may not write to."""
    path = tmp_path / "mine" / "profile"
    path.parent.mkdir()
    path.write_text("mine")
    return path


@pytest.fixture
def run(tmp_path: Path) -> FolderStorage:
    storage = FolderStorage(tmp_path / "runs" / "r")
    storage.pull()
    return storage


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (lambda path: write_text_atomically(path, "ours"), "recipe.yaml"),
        (lambda path: write_json(path, {"a": 1}), "mlflow_run.json"),
        (lambda path: save(new_figure((1.0, 1.0)), path), "loss.png"),
    ],
)
def test_a_link_in_place_of_a_file_is_replaced(
    run: FolderStorage, target: Path, write: Callable[[Path], object], name: str
) -> None:
    path = run.folder / name
    path.symlink_to(target)
    temporary_beside(path).symlink_to(target)  # its name can be guessed
    write(path)
    assert target.read_text() == "mine"
    assert not path.is_symlink()
    assert [entry.name for entry in run.folder.iterdir()] == [name]


def test_a_link_in_place_of_a_checkpoint_is_replaced(run: FolderStorage, target: Path) -> None:
    name = checkpoint_name(1, 10)
    (run.folder / name).symlink_to(target.parent)
    metadata = CheckpointMetadata(1, 10, Identity("a", "d"), {}, {}, files={})
    run.commit(name, partial(write_checkpoint, state={"net": {"w": torch.zeros(1)}}, metadata=metadata), last=METADATA)
    assert verify_checkpoint(run.folder / name).step == 10
    assert [path.name for path in target.parent.iterdir()] == ["profile"]
    (run.folder / checkpoint_name(2, 20)).symlink_to(target.parent)
    run.remove(checkpoint_name(2, 20))
    assert target.read_text() == "mine"


def test_logs_that_grow_do_not_grow_elsewhere(run: FolderStorage, target: Path) -> None:
    (run.folder / "events.log").symlink_to(target)
    EventLog(run).note("hello")  # no run ends for it
    with pytest.raises(Unfit, match="is a symbolic link"):
        append(run.folder / "events.log", "hello")
    assert target.read_text() == "mine"


def test_a_link_in_place_of_a_folder_is_refused(run: FolderStorage, target: Path) -> None:
    (run.folder / "driver").symlink_to(target.parent)
    with pytest.raises(OSError, match="is a symbolic link"):
        take(run, 1.0)
    with pytest.raises(OSError, match="is a symbolic link"):
        make_folder(run.folder / "driver")
    assert [path.name for path in target.parent.iterdir()] == ["profile"]


def test_a_link_in_place_of_a_ledger_is_refused(run: FolderStorage, target: Path) -> None:
    (run.folder / "ledger.jsonl").symlink_to(target)
    with pytest.raises(OSError, match="is a symbolic link"), open_ledger(run.folder):
        pass
    with pytest.raises(UserError, match="is a symbolic link"):
        read_ledger(run.folder)
    assert target.read_text() == "mine"


@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_a_pipe_or_device_is_neither_read_nor_waited_for(run: FolderStorage, target: Path, kind: str) -> None:
    path = run.folder / "result.json"
    {"pipe": lambda: os.mkfifo(path), "link": lambda: path.symlink_to(target), "folder": path.mkdir}[kind]()
    with pytest.raises(Unfit, match=r"is a symbolic link|is not a regular file"):
        read_result(run)
    with pytest.raises(UserError, match=r"result\.json: cannot be read"):
        read_json(path)


def test_small_files_are_small(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"123456")
    assert read_small(tmp_path / "a", 6) == b"123456"
    with pytest.raises(Unfit, match="has more than 5 bytes"):
        read_small(tmp_path / "a", 5)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "b", os.O_RDONLY)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"name": 5}', b"null", b"{}", b"\xff"])
def test_a_result_of_another_kind_is_reported_in_one_line(run: FolderStorage, content: bytes) -> None:
    (run.folder / "result.json").write_bytes(content)
    with pytest.raises(Fault, match=r"result\.json: is damaged \(.*\); delete it and run again"):
        read_result(run)


def test_new_folders_are_private_and_existing_ones_keep_their_modes(tmp_path: Path) -> None:
    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    FolderStorage(tmp_path / "new" / "r").pull()
    assert mode(tmp_path / "new") == 0o700
    (tmp_path / "shared").mkdir(mode=0o755)
    FolderStorage(tmp_path / "shared" / "r").require_writable()
    FolderStorage(tmp_path / "shared" / "r").pull()
    assert mode(tmp_path / "shared") == 0o755


def test_keys_of_a_bucket_stay_below_the_runs_folder() -> None:
    names = ["a", "driver/00001.json", "../x", "a/../../x", "/etc/x", "a//b", "a/", "", "./a", "a\0b"]
    assert [name for name in names if _is_plain(name)] == ["a", "driver/00001.json"]


def test_invalid_lease_holders_are_skipped(run: FolderStorage) -> None:
    (run.folder / "driver").mkdir()
    for number, content in enumerate(("[" * 100_000, json.dumps({"host": 1}), "null"), 1):
        (run.folder / "driver" / f"{number:05d}.lease").touch()
        (run.folder / "driver" / f"{number:05d}.json").write_text(content)
    (run.folder / "driver" / "².lease").touch()
    take(run, 0.1).release()
