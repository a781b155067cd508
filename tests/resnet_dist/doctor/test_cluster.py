"""What the cluster's doctor asks a node, in this process."""

from __future__ import annotations

from pathlib import Path

from resnet_dist.config.profile import Profile, Workers
from resnet_dist.doctor.cluster import Examiner, code_digest, rdma_gbit_s

PROFILE = Profile(
    workers=Workers(min=2, max=2), cpus_per_worker=1, data_root="/d", storage="/s", tracking_uri="sqlite:////m.db"
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


def test_the_rates_of_active_rdma_ports_are_added(tmp_path: Path) -> None:
    """As Linux shows a DGX: adapters for the GPUs, one whose cable is not in, and one that tells no rate."""
    for adapter, port, state, rate in (
        ("mlx5_0", "1", "4: ACTIVE", "400 Gb/sec (4X NDR)"),
        ("mlx5_1", "1", "4: ACTIVE", "100 Gb/sec (4X EDR)"),
        ("mlx5_1", "2", "4: ACTIVE", "100 Gb/sec (4X EDR)"),
        ("mlx5_2", "1", "1: DOWN", "10 Gb/sec (4X SDR)"),
        ("rdmap0s6", "1", "4: ACTIVE", ""),
    ):
        folder = tmp_path / adapter / "ports" / port
        folder.mkdir(parents=True)
        (folder / "state").write_text(state)
        (folder / "rate").write_text(rate)
    assert rdma_gbit_s(tmp_path) == {"mlx5_0": 400.0, "mlx5_1": 200.0}
    assert rdma_gbit_s(tmp_path / "none") == {}


def test_an_all_reduce_is_timed(tmp_path: Path) -> None:
    examiner = Examiner(PROFILE, str(tmp_path), "token", "127.0.0.1")
    speed = examiner.all_reduce_speed(0, 1, "127.0.0.1", examiner.free_port(), "gloo")
    assert (speed.num_workers, speed.num_bytes) == (1, 16 << 20)
    assert min(speed.small_s, speed.large_s) > 0.0
    assert speed.transports.network == ""
