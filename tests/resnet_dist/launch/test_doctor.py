"""A run's folder after bad days: what the doctor finds, what it removes, what it leaves alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from resnet_dist.config.profile import Profile, Workers
from resnet_dist.errors import UserError
from resnet_dist.launch.cluster import Node
from resnet_dist.launch.doctor import (
    PROBE_FILE,
    Answer,
    Check,
    NodeFacts,
    Question,
    Speed,
    code_digest,
    examine,
    examine_node,
    judge_node,
    judge_speed,
    judge_together,
    repair,
    verdict,
)
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
    old, whole, broken = (checkpoint(tmp_path, step) for step in (10, 20, 30))
    (broken / STATE).write_bytes(b"rot")
    unfinished = tmp_path / f".epoch=004-step=00000040.abc{TEMPORARY}"
    unfinished.mkdir()
    (tmp_path / "checkpoint_manager_snapshot.json").write_text('{"half')
    (tmp_path / "mlflow_run.json").write_text('{"run_id": "r"}')
    findings = examine(FolderStorage(tmp_path))
    assert [(f.name, f.state) for f in findings] == [
        (broken.name, "damaged"),
        (whole.name, "ok"),
        (old.name, "ok"),
        (unfinished.name, "leftover"),
        ("checkpoint_manager_snapshot.json", "leftover"),
        ("mlflow_run.json", "ok"),
    ]
    assert "top-1 97.25 %" in findings[1].what
    assert verdict(findings) == f"the run resumes from {whole.name}"
    assert len(repair(FolderStorage(tmp_path), findings)) == 3
    assert {p.name for p in tmp_path.iterdir()} == {old.name, whole.name, "mlflow_run.json"}
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


# What the cluster's doctor makes of what nodes say: pure functions, and one node asked in this process.


PROFILE = Profile(
    workers=Workers(min=2, max=2), cpus_per_worker=1, data_root="/d", storage="/s", tracking_uri="sqlite:////m.db"
)
FACTS = NodeFacts("10.0.0.1", {"torch": "2.14.1", "python": "3.11.7"}, "c0de", "EPYC", 0, {"/s": 50 << 30})
NODE = Node("10.0.0.1", 8, 0)


def bad(checks: list[Check]) -> list[str]:
    return [check.what for check in checks if check.state != "ok"]


def judged(answer: Answer, profile: Profile = PROFILE, *, has_written: bool = True) -> list[str]:
    return bad(list(judge_node(answer, profile, has_written=has_written)))


def test_a_sound_node_has_nothing_bad() -> None:
    assert judged(Answer(NODE, FACTS, 0.2, 0.1)) == []


def test_each_thing_that_is_wrong_is_told() -> None:
    assert judged(Answer(NODE, problem="could not run a process: x")) == ["could not run a process: x"]
    assert "clock +65.0 s" in judged(Answer(NODE, FACTS, 65.0, 0.1))[0]
    assert judged(Answer(NODE, FACTS, 65.0, 64.0)) == []  # a slow answer says little about the clock
    assert judged(Answer(NODE, replace(FACTS, free_bytes={"/s": 1 << 30}))) == ["/s: 1.1 GB free, little"]
    assert judged(Answer(NODE, FACTS), has_written=False) == ["storage /s: what this node wrote did not arrive"]
    wrong = replace(FACTS, data="/d: no such folder", storage="not shared", tracking="no answer")
    assert judged(Answer(NODE, wrong)) == ["/d: no such folder", "storage /s: not shared", "no answer"]
    gpus = PROFILE.model_copy(update={"gpus_per_worker": 1})
    assert "PyTorch sees 0 GPUs, Ray 8" in judged(Answer(Node("10.0.0.1", 8, 8), FACTS), gpus)[0]


def test_differences_between_nodes_name_the_odd_one() -> None:
    odd = replace(FACTS, address="10.0.0.3", versions={"torch": "2.13.0", "python": "3.11.7"}, cpu="Xeon")
    checks = list(judge_together([FACTS, replace(FACTS, address="10.0.0.2"), odd]))
    assert [check.state for check in checks] == ["bad", "warning", "ok"]
    assert checks[0].what == "torch: 2.14.1, but 10.0.0.3: 2.13.0"
    assert checks[1].what.startswith("processor: EPYC, but 10.0.0.3: Xeon; bit-identical")
    assert bad(list(judge_together([FACTS]))) == []


def test_the_time_of_a_step_follows_from_the_measured_one() -> None:
    speed = Speed(small_s=0.001, large_s=0.101, num_bytes=10_000_000)
    assert speed.seconds_for(20_000_000) == 0.201
    assert "gloo over 2 nodes: 99 MB/s a node, 1.00 ms for 4 B" in judge_speed(speed, "gloo", 2).what


def test_a_node_looks_and_writes_where_it_is_told(tmp_path: Path) -> None:
    (tmp_path / "data" / "digits").mkdir(parents=True)
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe" / PROBE_FILE).write_text("token")
    question = Question(str(tmp_path / "data"), None, str(tmp_path / "probe"), "sqlite:////m.db", "token")
    facts = examine_node(question, "10.0.0.9")
    assert (facts.data, facts.storage, facts.tracking) == ("", "", "")
    assert (tmp_path / "probe" / "from-10.0.0.9").read_text() == "token"
    assert facts.free_bytes[str(tmp_path / "probe")] > 0
    other = examine_node(replace(question, token="another", data_root=str(tmp_path / "none")), "10.0.0.9")
    assert "is it shared by all nodes?" in other.storage
    assert "No such file" in other.data


def test_the_code_of_a_node_is_told_from_another(tmp_path: Path) -> None:
    (tmp_path / "resnet_dist").mkdir()
    (tmp_path / "resnet_dist" / "a.py").write_text("x = 1\n")
    before = code_digest(tmp_path)
    assert code_digest(tmp_path) == before
    (tmp_path / "resnet_dist" / "a.py").write_text("x = 2\n")
    assert code_digest(tmp_path) != before
