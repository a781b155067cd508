"""What facts about a cluster mean for a run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest

from resnet_dist.config.profile import Profile, Workers
from resnet_dist.doctor.verdicts import (
    Answer,
    Check,
    NodeFacts,
    Speed,
    State,
    check_build,
    check_gpu_count,
    check_health,
    check_local_speed,
    check_network_speed,
    check_node,
    check_speed,
    compare_nodes,
    local_link,
)
from resnet_dist.gpus.device import TorchBuild
from resnet_dist.gpus.nccl import Transports
from resnet_dist.gpus.nvml import Gpu, InstalledGpus
from resnet_dist.launch.cluster import ClusterNode

PROFILE = Profile(
    workers=Workers(min=2, max=2), cpus_per_worker=1, data_root="/d", storage="/s", tracking_uri="sqlite:////m.db"
)
ON_GPUS = PROFILE.model_copy(update={"gpus_per_worker": 1})
NODE = ClusterNode("10.0.0.1", 8, 0)
H100 = Gpu(
    "NVIDIA H100 80GB HBM3",
    (9, 0),
    num_nvlinks=18,
    pcie_generation=5,
    pcie_width=16,
    max_pcie_width=16,
    temperature_c=34,
    slowdown_c=90,
    uncorrected_errors=0,
    repair_pending=False,
    repair_failed=False,
)
EIGHT = InstalledGpus("580.65.06", (H100,) * 8)
FACTS = NodeFacts(
    "10.0.0.1",
    {"torch": "2.14.1", "python": "3.11.7"},
    "c0de",
    "EPYC",
    {"/s": 50 << 30},
    build=TorchBuild("2.14.1+cu130", "13.0", ("sm_80", "sm_90")),
)
GPU_FACTS = replace(FACTS, gpus=EIGHT, rdma_gbit_s={f"mlx5_{k}": 400.0 for k in range(8)})


def problems(checks: Iterable[Check]) -> list[str]:
    return [check.what for check in checks if check.state != "ok"]


def judged(answer: Answer, profile: Profile = PROFILE, *, has_written: bool = True) -> list[str]:
    return problems(check_node(answer, profile, has_written=has_written))


def only(lines: Iterable[tuple[State, str]]) -> tuple[State, str]:
    (line,) = lines
    return line


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


def test_differences_between_nodes_name_the_odd_one() -> None:
    odd = replace(FACTS, address="10.0.0.3", versions={"torch": "2.13.0", "python": "3.11.7"}, cpu="Xeon", gpus=EIGHT)
    checks = list(compare_nodes([FACTS, replace(FACTS, address="10.0.0.2"), odd]))
    assert [check.state for check in checks] == ["bad", "warning", "warning", "ok"]
    assert checks[0].what == "torch: 2.14.1, but 10.0.0.3: 2.13.0"
    assert checks[1].what.startswith("processor: EPYC, but 10.0.0.3: Xeon; bit-identical")
    assert checks[2].what.startswith("GPU: none, but 10.0.0.3: NVIDIA H100 80GB HBM3; bit-identical")
    assert problems(compare_nodes([FACTS])) == []


# --- GPUs -------------------------------------------------------------------------------------------------------------


def test_a_healthy_node_of_eight_gpus_is_ok() -> None:
    answer = Answer(ClusterNode("10.0.0.1", 96, 8), GPU_FACTS)
    checks = list(check_node(answer, ON_GPUS, has_written=True))
    assert {check.state for check in checks} == {"ok"}
    assert [check.what for check in checks[-3:]] == [
        "GPUs: 8 x NVIDIA H100 80GB HBM3, as Ray declares",
        "driver 580.65.06 and the GPUs fit PyTorch 2.14.1+cu130 with CUDA 13.0",
        "NVML reports nothing wrong with the GPUs, 34 °C at most",
    ]
    assert not any("GPU" in check.what for check in check_node(answer, PROFILE, has_written=True))


@pytest.mark.parametrize(
    ("declared", "state", "line"),
    [
        (8, "ok", "GPUs: 8 x NVIDIA H100 80GB HBM3, as Ray declares"),
        (9, "bad", "GPUs: Ray declares 9, NVML sees 8 (8 x NVIDIA H100 80GB HBM3): start Ray with --num-gpus=8"),
        (4, "warning", "GPUs: Ray declares 4, NVML sees 8 (8 x NVIDIA H100 80GB HBM3): the others stay idle"),
    ],
)
def test_rays_gpus_are_held_against_nvmls(declared: float, state: State, line: str) -> None:
    found = only(check_gpu_count(EIGHT, declared))
    assert found[0] == state
    assert found[1].startswith(line)


def test_mig_slices_count_as_gpus() -> None:
    sliced = InstalledGpus("580.65.06", (replace(H100, num_devices=7), H100))
    assert only(check_gpu_count(sliced, 8))[0] == "ok"


def test_lost_gpus_are_named() -> None:
    lines = list(check_gpu_count(InstalledGpus("580.65.06", (H100,) * 7, num_lost=1), 8))
    assert [state for state, _ in lines] == ["bad", "bad"]
    assert lines[0][1].startswith("1 of 8 GPUs no longer respond")


def test_an_nvml_that_tells_nothing_alarms_nobody() -> None:
    silent = replace(GPU_FACTS, gpus=InstalledGpus())
    assert list(check_gpu_count(silent.gpus, 8)) == []
    assert list(check_health(silent.gpus)) == []
    assert only(check_build(silent))[0] == "ok"
    assert only(check_health(InstalledGpus("580.65.06", (Gpu("a MIG slice"),))))[0] == "ok"


def test_a_gpu_that_pytorch_cannot_use_is_bad() -> None:
    too_old = replace(GPU_FACTS, gpu_problem="driver 550.54.14 is too old")
    assert only(check_build(too_old)) == ("bad", "driver 550.54.14 is too old")
    v100 = Gpu("Tesla V100-SXM2-32GB", (7, 0))
    mixed = replace(GPU_FACTS, gpus=InstalledGpus("580.65.06", (H100, v100, v100)))
    state, line = only(check_build(mixed))
    assert state == "bad"
    assert line.startswith("PyTorch 2.14.1+cu130 has no code for Tesla V100-SXM2-32GB (sm_70), only for sm_80, sm_90")


@pytest.mark.parametrize(
    ("ill", "state", "line"),
    [
        (replace(H100, repair_failed=True), "bad", "a bad row of memory could not be replaced"),
        (replace(H100, repair_pending=True), "warning", "bad memory is replaced at the next reset"),
        (replace(H100, uncorrected_errors=3), "warning", "3 uncorrected ECC errors since the driver was loaded"),
        (replace(H100, slowed_by=("HW slowdown",)), "warning", "clock throttled (HW slowdown)"),
        (replace(H100, temperature_c=91), "warning", "91 °C, and its clock falls from 90 °C on"),
        (replace(H100, pcie_width=8), "warning", "PCIe with 8 of 16 lanes"),
        (replace(H100, num_nvlinks=12), "warning", "12 active NVLinks, others have 18"),
    ],
)
def test_an_ill_gpu_is_named_with_its_illness(ill: Gpu, state: State, line: str) -> None:
    found = only(check_health(InstalledGpus("580.65.06", (H100, ill, H100, ill))))
    assert found[0] == state
    assert found[1].startswith(f"GPU 1, 3: {line}")


# --- speed ------------------------------------------------------------------------------------------------------------


def all_reduce(*, workers: int, bus_gb_s: float, transports: Transports = Transports()) -> Speed:  # noqa: B008 - frozen
    """That of 268 MB with this bus bandwidth."""
    num_bytes = 1 << 28
    return Speed(workers, 2e-5, num_bytes * 2 * (workers - 1) / workers / (bus_gb_s * 1e9), num_bytes, transports)


def test_the_time_of_a_step_follows_from_the_measured_one() -> None:
    speed = Speed(num_workers=2, small_s=0.001, large_s=0.101, num_bytes=10_000_000)
    assert check_speed(speed, "gloo over 2 nodes") == (
        "ok",
        "gloo over 2 nodes: 99 MB/s, 1.00 ms for 4 B; ResNet-152's gradients would take 2.4 s a step",
    )


@pytest.mark.parametrize(
    ("gpu", "link", "gb_s"),
    [
        (H100, "NVLink", 360),
        (replace(H100, name="NVIDIA A100-SXM4-40GB", num_nvlinks=12), "NVLink", 235),
        (replace(H100, num_nvlinks=None), "PCIe 5 with 16 lanes", 20),  # NVML does not report any: no alarm
        (replace(H100, name="NVIDIA H100 PCIe", num_nvlinks=0), "PCIe 5 with 16 lanes", 20),
        (replace(H100, name="NVIDIA H100 NVL"), "", None),  # bridges join some of the GPUs
        (Gpu("NVIDIA L4", pcie_generation=4, pcie_width=8), "PCIe 4 with 8 lanes", 5),
        (Gpu("NVIDIA GeForce RTX 3090", pcie_generation=4, pcie_width=16), "PCIe through the host's memory", 3.3),
        (Gpu("a GPU of the future"), "", None),
    ],
)
def test_the_link_within_a_node_and_what_it_should_give(gpu: Gpu, link: str, gb_s: float | None) -> None:
    assert local_link([gpu, gpu], 2) == (link, gb_s)


def test_a_link_within_a_node_is_held_against_its_data_sheet() -> None:
    state, line = next(check_local_speed(all_reduce(workers=8, bus_gb_s=340), EIGHT.gpus))
    assert (state, line) == (
        "ok",
        "NCCL over 8 GPUs of the node: 340 GB/s, 0.02 ms for 4 B; ResNet-152's gradients would take 1.2 ms a step; "
        "NVLink gives about 360 GB/s",
    )
    state, line = next(check_local_speed(all_reduce(workers=8, bus_gb_s=12), EIGHT.gpus))
    assert state == "warning"
    assert line.endswith("; slow: NVLink should give about 360 GB/s")
    assert next(check_local_speed(all_reduce(workers=8, bus_gb_s=1), [Gpu("unknown")] * 8))[0] == "ok"


def test_the_network_is_held_against_its_adapters() -> None:
    rdma = Transports("2.30.7", "IB", ("mlx5_0",), has_gpu_direct=True, local=("P2P",))
    fast = all_reduce(workers=16, bus_gb_s=310, transports=rdma)
    lines = list(check_network_speed(fast, [GPU_FACTS, GPU_FACTS]))
    assert [state for state, _ in lines] == ["ok", "ok"]
    assert lines[0][1].endswith("8 RDMA adapters of 3200 Gb/s together gives about 320 GB/s")
    assert lines[1][1] == "NCCL 2.30.7 uses P2P within a node, IB (mlx5_0) with GPUDirect RDMA between nodes"
    fewer = replace(GPU_FACTS, rdma_gbit_s={"mlx5_0": 400.0, "mlx5_1": 400.0})
    _, line = next(check_network_speed(fast, [GPU_FACTS, fewer]))
    assert line.endswith("2 RDMA adapters of 800 Gb/s together gives about 80 GB/s")


def test_tcp_between_nodes_is_a_warning() -> None:
    tcp = Transports("2.30.7", "Socket", ("eth0",), is_tcp=True)
    slow = all_reduce(workers=16, bus_gb_s=4, transports=tcp)
    lines = list(check_network_speed(slow, [GPU_FACTS, GPU_FACTS]))
    assert [state for state, _ in lines] == ["warning", "warning"]
    assert "slow: 8 RDMA adapters of 3200 Gb/s together should give about 320 GB/s" in lines[0][1]
    assert lines[1][1].endswith("for it, though each node has 8 RDMA adapters of 3200 Gb/s together")
    without = [replace(GPU_FACTS, rdma_gbit_s={})] * 2
    assert [state for state, _ in check_network_speed(slow, without)] == ["ok", "warning"]
