"""What a cluster's doctor found out, and what it means for a run: facts in, lines out. Pure."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from resnet_dist.config.profile import Profile
from resnet_dist.gpus.device import TorchBuild, architecture_problem, this_build
from resnet_dist.gpus.nccl import Transports, describe
from resnet_dist.gpus.nvml import Gpu, InstalledGpus
from resnet_dist.launch.cluster import ClusterNode
from resnet_dist.planner.hardware import GPUS, NET_EFFICIENCY

State = Literal["ok", "warning", "bad"]

_CLOCK_LIMIT_S = 5.0
_LOW_BYTES = {"/dev/shm": 1 << 30, "/tmp": 5 << 30}
_LOW_STORAGE_BYTES = 10 << 30
_GRADIENT_BYTES = 4 * 60_192_808
"""ResNet-152's, in float32."""
_SLOW = 0.5
"""A link that gives less than this share of what it should is reported: half is more than any measurement is off."""
_PCIE_GB_S = {3: 5.0, 4: 10.0, 5: 20.0, 6: 40.0}
"""Bus bandwidth of an all-reduce over 16 lanes, by generation: PCIe 4's as in `planner.hardware`, doubled with each."""
_BRIDGED = {"pcie", "nvl"}
"""In the names of GPUs whose NVLink joins pairs or fours only, if there is a bridge at all."""


@dataclass(frozen=True)
class Check:
    """One line of the output."""

    where: str
    """A node's address, or `cluster`."""
    state: State
    what: str


@dataclass(frozen=True)
class NodeFacts:
    """One node, as a process on it sees it. `data`, `storage`, `tracking`: what is wrong with them, or ""."""

    address: str
    versions: Mapping[str, str]
    code: str
    """Digest of this project's Python files there."""
    cpu: str
    free_bytes: Mapping[str, int] = field(default_factory=dict)
    """Folder -> free space where it is or would be."""
    data: str = ""
    storage: str = ""
    tracking: str = ""
    gpus: InstalledGpus = field(default_factory=InstalledGpus)
    """All of the node, though the process was given one; none for a profile without GPUs."""
    gpu_problem: str = ""
    """Why PyTorch cannot compute on that one."""
    build: TorchBuild = field(default_factory=this_build)
    rdma_gbit_s: Mapping[str, float] = field(default_factory=dict)
    """Network adapter -> line rate of its active ports."""


@dataclass(frozen=True)
class Speed:
    """All-reduces over some processes: seconds for 4 bytes, and for `num_bytes`."""

    num_workers: int
    small_s: float
    large_s: float
    num_bytes: int
    transports: Transports = field(default_factory=Transports)

    @property
    def bus_bytes_s(self) -> float:
        """As nccl-tests define it: what each link of a ring carries, whatever the number of workers."""
        return self.num_bytes * 2 * (self.num_workers - 1) / self.num_workers / self.large_s


@dataclass(frozen=True)
class Answer:
    """A node's facts, or why there are none."""

    node: ClusterNode
    facts: NodeFacts | None = None
    clock_ahead_s: float = 0.0
    """How much its clock is ahead of the driver's."""
    clock_error_s: float = 0.0
    """Half of the round trip of the question: the difference is known to this only."""
    problem: str = ""


def check_node(answer: Answer, profile: Profile, *, has_written: bool) -> Iterator[Check]:
    """What one node's answer means for a run with `profile`."""
    where, facts = answer.node.address, answer.facts
    if facts is None:
        yield Check(where, "bad", answer.problem)
        return
    shown = f"clock {answer.clock_ahead_s:+.1f} s from the driver's (± {answer.clock_error_s:.1f} s)"
    if abs(answer.clock_ahead_s) - answer.clock_error_s > _CLOCK_LIMIT_S:
        yield Check(where, "warning", f"{shown}: logs and TLS will disagree; run an NTP client there")
    else:
        yield Check(where, "ok", shown)
    for folder, free in facts.free_bytes.items():
        low = free < _LOW_BYTES.get(folder, _LOW_STORAGE_BYTES)
        yield Check(where, "warning" if low else "ok", f"{folder}: {free / 1e9:.1f} GB free{', little' if low else ''}")
    yield Check(where, "bad" if facts.data else "ok", facts.data or f"data_root {profile.data_root} can be read")
    problem = facts.storage or ("" if has_written else "what this node wrote did not arrive")
    text = f"storage {profile.storage}: {problem}" if problem else f"storage {profile.storage} is shared"
    yield Check(where, "bad" if problem else "ok", text)
    yield Check(where, "bad" if facts.tracking else "ok", facts.tracking or "MLflow can be reached")
    if profile.gpus_per_worker:
        checks = [*check_gpu_count(facts.gpus, answer.node.gpus), *check_build(facts), *check_health(facts.gpus)]
        yield from (Check(where, state, what) for state, what in checks)


# --- GPUs -------------------------------------------------------------------------------------------------------------


def check_gpu_count(found: InstalledGpus, declared: float) -> Iterator[tuple[State, str]]:
    """NVML's GPUs against those that Ray gives to workers."""
    if found.num_lost:
        lost = f"{found.num_lost} of {len(found.gpus) + found.num_lost} GPUs no longer respond"
        yield "bad", f"{lost} (`dmesg` says why): reset them, or reboot the node"
    if not found.gpus:
        return  # `check_build` says whether there is a GPU at all
    number = found.num_devices
    kinds = ", ".join(f"{count} x {name}" for name, count in Counter(gpu.name for gpu in found.gpus).items())
    differs = f"GPUs: Ray declares {declared:g}, NVML sees {number} ({kinds})"
    if declared > number:
        yield "bad", f"{differs}: start Ray with --num-gpus={number}"
    elif declared < number:
        yield "warning", f"{differs}: the others stay idle"
    else:
        yield "ok", f"GPUs: {kinds}, as Ray declares"


def check_build(facts: NodeFacts) -> Iterator[tuple[State, str]]:
    """The driver and the GPUs' architectures against the PyTorch build."""
    if facts.gpu_problem:
        yield "bad", facts.gpu_problem
        return
    kinds = {(gpu.name, gpu.capability) for gpu in facts.gpus.gpus if gpu.capability is not None}
    problems = [problem for kind in sorted(kinds) if (problem := architecture_problem(*kind, facts.build))]
    yield from (("bad", problem) for problem in problems)
    if not problems:
        driver = f"driver {facts.gpus.driver}" if facts.gpus.driver else "the driver (NVML does not report which)"
        yield "ok", f"{driver} and the GPUs fit PyTorch {facts.build.version} with CUDA {facts.build.cuda}"


def check_health(found: InstalledGpus) -> Iterator[tuple[State, str]]:
    """What NVML reports of GPUs at rest. One line for all GPUs with the same problem, one if there is none."""
    most_nvlinks = max((gpu.num_nvlinks or 0 for gpu in found.gpus), default=0)
    indices: dict[tuple[State, str], list[int]] = defaultdict(list)
    for index, gpu in enumerate(found.gpus):
        for problem in _problems(gpu, most_nvlinks):
            indices[problem].append(index)
    for (state, what), where in indices.items():
        yield state, f"GPU {', '.join(map(str, where))}: {what}"
    temperatures = [gpu.temperature_c for gpu in found.gpus if gpu.temperature_c is not None]
    if found.gpus and not indices:
        at = f", {max(temperatures)} °C at most" if temperatures else ""
        yield "ok", f"NVML reports nothing wrong with the GPUs{at}"


def _problems(gpu: Gpu, most_nvlinks: int) -> Iterator[tuple[State, str]]:
    if gpu.repair_failed:
        yield "bad", "a bad row of memory could not be replaced: the GPU must be exchanged"
    if gpu.repair_pending:
        yield "warning", "bad memory is replaced at the next reset: drain the node, then `nvidia-smi --gpu-reset`"
    if gpu.uncorrected_errors:
        errors = f"{gpu.uncorrected_errors} uncorrected ECC errors since the driver was loaded"
        yield "warning", f"{errors}: reset the GPU; exchange it if they come back"
    if gpu.slowed_by:
        yield "warning", f"clock throttled ({', '.join(gpu.slowed_by)}): cooling or power supply"
    if gpu.temperature_c is not None and gpu.slowdown_c is not None and gpu.temperature_c >= gpu.slowdown_c:
        yield "warning", f"{gpu.temperature_c} °C, and its clock falls from {gpu.slowdown_c} °C on: cooling"
    if gpu.pcie_width is not None and gpu.max_pcie_width is not None and gpu.pcie_width < gpu.max_pcie_width:
        yield "warning", f"PCIe with {gpu.pcie_width} of {gpu.max_pcie_width} lanes: reseat it, or check the riser"
    if gpu.num_nvlinks is not None and gpu.num_nvlinks < most_nvlinks:
        yield "warning", f"{gpu.num_nvlinks} active NVLinks, others have {most_nvlinks}: see `nvidia-smi nvlink -s`"


# --- speed ------------------------------------------------------------------------------------------------------------


def check_speed(speed: Speed, over: str, *, link: str = "", expected_bytes_s: float | None = None) -> tuple[State, str]:
    """An all-reduce's speed, and what a step's would take if its time grows with the bytes.

    Args:
        over: what it went over, "gloo over 2 nodes".
        link, expected_bytes_s: the link's name, and its bus bandwidth by the data sheet; None: not known.
    """
    step_s = speed.small_s + (speed.large_s - speed.small_s) * _GRADIENT_BYTES / speed.num_bytes
    what = (
        f"{over}: {_rate(speed.bus_bytes_s)}, {1e3 * speed.small_s:.2f} ms for 4 B; "
        f"ResNet-152's gradients would take {_duration(step_s)} a step"
    )
    if expected_bytes_s is None:
        return "ok", what
    if speed.bus_bytes_s >= _SLOW * expected_bytes_s:
        return "ok", f"{what}; {link} gives about {_rate(expected_bytes_s)}"
    return "warning", f"{what}; slow: {link} should give about {_rate(expected_bytes_s)}"


def check_local_speed(speed: Speed, gpus: Sequence[Gpu]) -> Iterator[tuple[State, str]]:
    """Between the GPUs of a node."""
    link, expected_gb_s = local_link(gpus, speed.num_workers)
    over = f"NCCL over {speed.num_workers} GPUs of the node"
    yield check_speed(speed, over, link=link, expected_bytes_s=None if expected_gb_s is None else expected_gb_s * 1e9)
    if line := describe(speed.transports, between_nodes=False):
        yield "ok", line


def check_network_speed(speed: Speed, facts: Sequence[NodeFacts]) -> Iterator[tuple[State, str]]:
    """Between nodes, over all their GPUs. A ring crosses each node's adapters once, so its bus bandwidth is theirs.

    Args:
        facts: of the nodes.
    """
    rates = min((node.rdma_gbit_s.values() for node in facts), key=sum)  # of the node with the least
    gbit_s = sum(rates)
    adapters = f"{len(rates)} RDMA adapters of {gbit_s:g} Gb/s together"
    locals_gb_s = [local_link(node.gpus.gpus, len(node.gpus.gpus))[1] for node in facts if len(node.gpus.gpus) > 1]
    limits = [gbit_s / 8 * 1e9 * NET_EFFICIENCY, *(gb_s * 1e9 for gb_s in locals_gb_s if gb_s is not None)]
    over = f"NCCL over {speed.num_workers} GPUs of {len(facts)} nodes"
    yield check_speed(speed, over, link=adapters, expected_bytes_s=min(limits) if gbit_s else None)
    if line := describe(speed.transports, between_nodes=True):
        unused = f", though each node has {adapters}" if speed.transports.is_tcp and gbit_s else ""
        yield ("warning" if speed.transports.is_tcp else "ok"), f"{line}{unused}"


def local_link(gpus: Sequence[Gpu], num_workers: int) -> tuple[str, float | None]:
    """The link between a node's GPUs and its bus bandwidth in GB/s, the lowest of all; None if NVML reports too little.

    By `planner.hardware`, which has NVLink's published figures, and PCIe's by generation and lanes.
    """
    links = [_link(gpu, num_workers) for gpu in gpus]
    known = [(gb_s, name) for name, gb_s in links if gb_s is not None]
    if not known or len(known) < len(links):
        return "", None
    gb_s, name = min(known)
    return name, gb_s


def _link(gpu: Gpu, num_workers: int) -> tuple[str, float | None]:
    words = set(re.split(r"[\s-]+", gpu.name.lower()))
    sheets = [sheet for key, sheet in GPUS.items() if _words(key) <= words]
    if sheets and sheets[0].host_bus:
        return "PCIe through the host's memory", sheets[0].local_gb_s / num_workers
    if sheets and gpu.num_nvlinks and not words & _BRIDGED and sheets[0].local_gb_s > max(_PCIE_GB_S.values()):
        return "NVLink", sheets[0].local_gb_s
    if gpu.pcie_generation in _PCIE_GB_S and gpu.pcie_width is not None and not gpu.num_nvlinks:
        name = f"PCIe {gpu.pcie_generation} with {gpu.pcie_width} lanes"
        return name, _PCIE_GB_S[gpu.pcie_generation] * gpu.pcie_width / 16
    return "", None


def _words(key: str) -> set[str]:
    """The planner's name in the words of NVML's: rtx3090 -> {rtx, 3090}."""
    return set(key.replace("rtx", "rtx ").replace("-40", " 40gb").replace("-", " ").split())


def _rate(bytes_s: float) -> str:
    return f"{bytes_s / 1e9:.3g} GB/s" if bytes_s >= 1e9 else f"{bytes_s / 1e6:.0f} MB/s"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1.0 else f"{1e3 * seconds:.1f} ms"


# --- nodes together ---------------------------------------------------------------------------------------------------


def compare_nodes(facts: Sequence[NodeFacts]) -> Iterator[Check]:
    """Where nodes differ that have to be the same."""
    if not facts:
        return
    libraries = sorted({library for f in facts for library in f.versions})
    compared = {library: [f.versions.get(library, "none") for f in facts] for library in libraries}
    compared["this project's code"] = [f.code for f in facts]
    compared["processor"] = [f.cpu for f in facts]
    compared["GPU"] = [_kinds(f.gpus.gpus) for f in facts]
    may_differ = {
        "processor": "bit-identical results are promised on equal processors only",
        "GPU": "bit-identical results are promised on equal GPUs only, and the slowest sets the pace",
    }
    for kind, values in compared.items():
        usual, number = Counter(values).most_common(1)[0]
        if number == len(facts):
            continue
        others = ", ".join(f"{f.address}: {value}" for f, value in zip(facts, values, strict=True) if value != usual)
        if kind in may_differ:
            others += f"; {may_differ[kind]}"
        yield Check("cluster", "warning" if kind in may_differ else "bad", f"{kind}: {usual}, but {others}")
    versions = ", ".join(f"{library} {facts[0].versions.get(library)}" for library in ("python", "torch", "ray"))
    yield Check("cluster", "ok", f"compared versions ({versions}, ...), code and processors of {len(facts)} nodes")


def _kinds(gpus: Iterable[Gpu]) -> str:
    return ", ".join(sorted({gpu.name for gpu in gpus})) or "none"
