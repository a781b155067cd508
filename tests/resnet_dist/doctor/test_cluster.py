"""How the cluster's doctor judges nodes' reports: pure functions, and one node examined in this process."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from resnet_dist.config.profile import Profile, Workers
from resnet_dist.doctor.cluster import (
    Answer,
    Check,
    Examiner,
    NodeFacts,
    Speed,
    check_node,
    code_digest,
    compare_nodes,
    describe_speed,
)
from resnet_dist.launch.cluster import ClusterNode

PROFILE = Profile(
    workers=Workers(min=2, max=2), cpus_per_worker=1, data_root="/d", storage="/s", tracking_uri="sqlite:////m.db"
)
FACTS = NodeFacts("10.0.0.1", {"torch": "2.14.1", "python": "3.11.7"}, "c0de", "EPYC", 0, {"/s": 50 << 30})
NODE = ClusterNode("10.0.0.1", 8, 0)


def problems(checks: Iterable[Check]) -> list[str]:
    return [check.what for check in checks if check.state != "ok"]


def judged(answer: Answer, profile: Profile = PROFILE, *, has_written: bool = True) -> list[str]:
    return problems(check_node(answer, profile, has_written=has_written))


def test_a_sound_node_has_nothing_bad() -> None:
    assert judged(Answer(NODE, FACTS, clock_ahead_s=0.2, clock_error_s=0.1)) == []


def test_each_problem_is_reported() -> None:
    assert judged(Answer(NODE, problem="could not run a process: x")) == ["could not run a process: x"]
    assert "clock +65.0 s" in judged(Answer(NODE, FACTS, clock_ahead_s=65.0, clock_error_s=0.1))[0]
    assert judged(Answer(NODE, FACTS, clock_ahead_s=65.0, clock_error_s=64.0)) == []  # a slow answer says little
    assert judged(Answer(NODE, replace(FACTS, free_bytes={"/s": 1 << 30}))) == ["/s: 1.1 GB free, little"]
    assert judged(Answer(NODE, FACTS), has_written=False) == ["storage /s: what this node wrote did not arrive"]
    wrong = replace(FACTS, data="/d: no such folder", storage="not shared", tracking="no answer")
    assert judged(Answer(NODE, wrong)) == ["/d: no such folder", "storage /s: not shared", "no answer"]
    gpus = PROFILE.model_copy(update={"gpus_per_worker": 1})
    assert "PyTorch sees 0 GPUs, Ray 8" in judged(Answer(ClusterNode("10.0.0.1", 8, 8), FACTS), gpus)[0]


def test_differences_between_nodes_name_the_odd_one() -> None:
    odd = replace(FACTS, address="10.0.0.3", versions={"torch": "2.13.0", "python": "3.11.7"}, cpu="Xeon")
    checks = list(compare_nodes([FACTS, replace(FACTS, address="10.0.0.2"), odd]))
    assert [check.state for check in checks] == ["bad", "warning", "ok"]
    assert checks[0].what == "torch: 2.14.1, but 10.0.0.3: 2.13.0"
    assert checks[1].what.startswith("processor: EPYC, but 10.0.0.3: Xeon; bit-identical")
    assert problems(compare_nodes([FACTS])) == []


def test_the_time_of_a_step_follows_from_the_measured_one() -> None:
    speed = Speed(small_s=0.001, large_s=0.101, num_bytes=10_000_000)
    assert describe_speed(speed, "gloo", 2).what == (
        "gloo over 2 nodes: 99 MB/s a node, 1.00 ms for 4 B; ResNet-152's gradients would take 2.41 s a step"
    )


def test_a_node_reads_and_writes_in_the_given_folders(tmp_path: Path) -> None:
    (tmp_path / "data" / "digits").mkdir(parents=True)
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe" / "from-the-driver").write_text("token")
    probe = str(tmp_path / "probe")
    profile = PROFILE.model_copy(update={"data_root": str(tmp_path / "data")})
    facts = Examiner(profile, probe, "token", "10.0.0.9").facts()
    assert (facts.data, facts.storage, facts.tracking) == ("", "", "")
    assert (tmp_path / "probe" / "from-10.0.0.9").read_text() == "token"
    assert facts.free_bytes[probe] > 0
    profile = PROFILE.model_copy(update={"data_root": str(tmp_path / "none")})
    other = Examiner(profile, probe, "another token", "10.0.0.9").facts()
    assert "is it shared by all nodes?" in other.storage
    assert "No such file" in other.data


def test_the_code_of_two_nodes_is_compared(tmp_path: Path) -> None:
    (tmp_path / "resnet_dist").mkdir()
    (tmp_path / "resnet_dist" / "a.py").write_text("x = 1\n")
    before = code_digest(tmp_path)
    assert code_digest(tmp_path) == before
    (tmp_path / "resnet_dist" / "a.py").write_text("x = 2\n")
    assert code_digest(tmp_path) != before
