"""A damaged run folder: what the doctor finds, removes and leaves alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resnet_dist.doctor.run import examine, repair, verdict
from resnet_dist.errors import UserError
from resnet_dist.launch.publish import RunResult, write_result
from resnet_dist.storage.base import TEMPORARY
from resnet_dist.storage.folder import FolderStorage
from resnet_dist.training.checkpoint import STATE, CheckpointMetadata, Identity, checkpoint_name, write_checkpoint


def checkpoint(run_dir: Path, step: int) -> Path:
    directory = run_dir / checkpoint_name(step // 10, step)
    directory.mkdir(parents=True)
    metadata = CheckpointMetadata(step // 10, step, Identity("a" * 16, "d"), {}, {"val/top1": 97.25}, files={})
    write_checkpoint(directory, state={"net": {"w": torch.zeros(3)}}, metadata=metadata)
    return directory


def test_what_is_found_removed_and_left(tmp_path: Path) -> None:
    old, complete, broken = (checkpoint(tmp_path, step) for step in (10, 20, 30))
    (broken / STATE).write_bytes(b"rot")
    unfinished = tmp_path / f".epoch=004-step=00000040.abc{TEMPORARY}"
    unfinished.mkdir()
    (tmp_path / "checkpoint_manager_snapshot.json").write_text('{"half')
    (tmp_path / "mlflow_run.json").write_text('{"run_id": "r"}')
    findings = examine(FolderStorage(tmp_path))
    assert [(f.name, f.state) for f in findings] == [
        (broken.name, "damaged"),
        (complete.name, "ok"),
        (old.name, "ok"),
        (unfinished.name, "leftover"),
        ("checkpoint_manager_snapshot.json", "leftover"),
        ("mlflow_run.json", "ok"),
    ]
    assert "top-1 97.25 %" in findings[1].what
    assert verdict(findings) == f"the run resumes from {complete.name}"
    assert len(repair(FolderStorage(tmp_path), findings)) == 3
    assert {p.name for p in tmp_path.iterdir()} == {old.name, complete.name, "mlflow_run.json"}
    assert all(f.state == "ok" for f in examine(FolderStorage(tmp_path)))


def test_verdicts(tmp_path: Path) -> None:
    (tmp_path / "mlflow_run.json").write_text("{}")
    assert verdict(examine(FolderStorage(tmp_path))) == "the run would start at its first step"
    write_result(FolderStorage(tmp_path), RunResult("n", "d", "r", "t", "m", "c", 22, {}))
    assert verdict(examine(FolderStorage(tmp_path))) == "the run is complete"


@pytest.mark.parametrize("folder", ["none", ""])
def test_no_run_is_a_mistake(tmp_path: Path, folder: str) -> None:
    with pytest.raises(UserError, match="give the folder of a run"):
        examine(FolderStorage(tmp_path / folder))
