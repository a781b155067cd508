"""`resnet-dist doctor --on PROFILE`: is the cluster fit for a run? Examines every node, and times their network."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import ray
import torch
import torch.distributed as dist
import xxhash
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from data_prep.beton.files import write_text_atomically
from data_prep.runtime.ray_errors import explain
from resnet_dist.code_version import library_versions
from resnet_dist.config.profile import Profile
from resnet_dist.errors import Fault, UserError
from resnet_dist.launch.cluster import (
    ClusterNode,
    alive_nodes,
    ray_session,
    remedy,
    worker_capacity,
    worker_environment,
)
from resnet_dist.storage.base import RunStorage
from resnet_dist.storage.locations import beside, open_storage
from resnet_dist.tracking.connection import require_server

_NODE_LIMIT_S = 120.0
"""For a node to start a process and to answer; torch's import from a slow disk takes most of it."""
_SPEED_LIMIT_S = 60.0
_CLOCK_LIMIT_S = 5.0
_LOW_BYTES = {"/dev/shm": 1 << 30, "/tmp": 5 << 30}
_LOW_STORAGE_BYTES = 10 << 30
_GRADIENT_BYTES = 4 * 60_192_808
"""ResNet-152's, in float32."""
_PROBE_FILE = "from-the-driver"
_PROBE_NUMBERS = 1 << 22
"""16 MB in float32."""
_WARM_UP, _REPEATS = 2, 5


@dataclass(frozen=True)
class Check:
    """One line of the output."""

    where: str
    """A node's address, or `cluster`."""
    state: Literal["ok", "warning", "bad"]
    what: str


# --- on a node --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NodeFacts:
    """One node, as a process on it sees it. `data`, `storage`, `tracking`: what is wrong with them, or ""."""

    address: str
    versions: Mapping[str, str]
    code: str
    """Digest of this project's Python files there."""
    cpu: str
    gpus: int
    """What PyTorch sees, which may differ from Ray's count."""
    free_bytes: Mapping[str, int] = field(default_factory=dict)
    """Folder -> free space where it is or would be."""
    data: str = ""
    storage: str = ""
    tracking: str = ""


@dataclass(frozen=True)
class Speed:
    """All-reduces over all nodes, one process each: seconds for 4 bytes, and for `num_bytes`."""

    small_s: float
    large_s: float
    num_bytes: int


class Examiner:
    """Runs on a node as a Ray actor.

    Args:
        profile: of the run that the cluster is examined for.
        storage: a folder beside the runs, into which the driver has written `token`.
        address: of the node.
    """

    def __init__(self, profile: Profile, storage: str, token: str, address: str) -> None:
        self._profile, self._storage, self._token, self._address = profile, storage, token, address

    def facts(self) -> NodeFacts:
        folders = [self._profile.cache, None if "://" in self._storage else self._storage, "/dev/shm", "/tmp"]
        return NodeFacts(
            address=self._address,
            versions=library_versions(),
            code=code_digest(Path(__file__).parents[2]),
            cpu=_cpu(),
            gpus=torch.cuda.device_count(),
            free_bytes={folder: _free_bytes(Path(folder)) for folder in folders if folder},
            data=_data_problem(self._profile.data_root),
            storage=self._storage_problem(),
            tracking=_tracking_problem(self._profile.tracking_uri),
        )

    def clock(self) -> float:
        return time.time()

    def free_port(self) -> int:
        with socket.socket() as listener:
            listener.bind(("", 0))
            return int(listener.getsockname()[1])

    def all_reduce_speed(self, rank: int, world_size: int, address: str, port: int, backend: str) -> Speed:
        """All nodes call it together; rank 0 listens at `address`. Raises RuntimeError."""
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
        dist.init_process_group(
            backend,
            init_method=f"tcp://{address}:{port}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=_SPEED_LIMIT_S),
        )
        try:
            device = torch.device("cuda" if backend == "nccl" else "cpu")
            small, large = torch.zeros(1, device=device), torch.zeros(_PROBE_NUMBERS, device=device)
            return Speed(_all_reduce_s(small), _all_reduce_s(large), large.numel() * large.element_size())
        finally:
            dist.destroy_process_group()

    def _storage_problem(self) -> str:
        """Reads what the driver wrote, and writes a file for it."""
        storage = open_storage(self._storage)
        try:
            if storage.read(_PROBE_FILE) != self._token.encode():
                return "does not show what the driver wrote: is it shared by all nodes?"
            _write(storage, f"from-{self._address}", self._token)
        except (OSError, Fault, UserError) as error:
            return str(error)
        return ""


def code_digest(root: Path) -> str:
    """Digest of every Python file of both packages, by name and content."""
    hasher = xxhash.xxh3_64()
    for path in sorted(p for package in ("data_prep", "resnet_dist") for p in (root / package).rglob("*.py")):
        hasher.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return hasher.hexdigest()


def _cpu() -> str:
    """The processor's name. The order in which its kernels add decides about the last bits of a result."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return "unknown"


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _data_problem(data_root: str) -> str:
    if "://" in data_root:
        return ""  # `data-prep stage` reads it, and has its own checks
    try:
        found = any(path.is_dir() for path in Path(data_root).iterdir())
    except OSError as error:
        return f"{data_root}: {error.strerror}"
    return "" if found else f"{data_root}: holds no data set"


def _tracking_problem(tracking_uri: str) -> str:
    try:
        require_server(tracking_uri, limit_s=5.0)
    except (Fault, UserError) as error:
        return str(error)
    return ""


def _all_reduce_s(values: torch.Tensor) -> float:
    """The median of some all-reduces."""
    times = []
    for _ in range(_WARM_UP + _REPEATS):
        started_s = time.perf_counter()
        dist.all_reduce(values)
        if values.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started_s)
    return sorted(times[_WARM_UP:])[_REPEATS // 2]


# --- in the driver ----------------------------------------------------------------------------------------------------


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


def examine_cluster(profile: Profile, report: Callable[[Check], None]) -> bool:
    """Reports every finding as soon as it is known. Returns whether a run can start. UserError without a cluster."""
    bad = False
    storage = open_storage(beside(profile.storage, f".doctor-{secrets.token_hex(4)}"))
    storage.require_writable()
    token = secrets.token_hex(16)
    with ray_session(profile):
        try:
            _write(storage, _PROBE_FILE, token)
        except OSError as error:
            raise UserError(f"storage {storage.location} is not writable: {error}") from None
        try:
            for check in _checks(profile, storage, token):
                report(check)
                bad = bad or check.state == "bad"
        finally:
            _clear(storage)
    return not bad


def _checks(profile: Profile, storage: RunStorage, token: str) -> Iterator[Check]:
    nodes = alive_nodes()
    capacity = worker_capacity(nodes, profile)
    found = f"{len(nodes)} nodes with room for {capacity} workers; the profile asks for {profile.workers}"
    if capacity >= profile.workers.min:
        yield Check("cluster", "ok", found)
    else:
        yield Check("cluster", "bad", f"{found}: {remedy(nodes, profile, os.environ)}")
    useful = [node for node in nodes if worker_capacity([node], profile)]
    examiners = {node.node_id: _examiner(node, profile, storage, token) for node in useful}
    facts = [(node, examiners[node.node_id].facts.remote()) for node in useful]  # all nodes at once
    answers = [_answer(node, examiners[node.node_id], reference) for node, reference in facts]
    written = set(storage.names())
    for answer in answers:
        yield from check_node(answer, profile, has_written=f"from-{answer.node.address}" in written)
    yield from compare_nodes([answer.facts for answer in answers if answer.facts])
    responding = [answer.node for answer in answers if answer.facts]
    if len(responding) > 1:
        for backend in ["gloo", *(["nccl"] if profile.gpus_per_worker else [])]:
            yield _speed([examiners[node.node_id] for node in responding], responding, backend)


def _examiner(node: ClusterNode, profile: Profile, storage: RunStorage, token: str) -> Any:
    options = {
        "num_cpus": 0,
        "num_gpus": 1 if profile.gpus_per_worker else 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node.node_id, soft=False),
        "runtime_env": worker_environment(profile),
    }
    return ray.remote(Examiner).options(**options).remote(profile, storage.location, token, node.address)


def _answer(node: ClusterNode, examiner: Any, facts: Any) -> Answer:
    try:
        known: NodeFacts = ray.get(facts, timeout=_NODE_LIMIT_S)
        before_s = time.time()
        there_s: float = ray.get(examiner.clock.remote(), timeout=_NODE_LIMIT_S)
        after_s = time.time()
    except ray.exceptions.GetTimeoutError:
        return Answer(node, problem=f"gave no answer within {_NODE_LIMIT_S:g} s: overloaded, or its GPUs are taken")
    except RayError as error:
        return Answer(node, problem=f"could not run a process: {explain(error).sentence}")
    return Answer(node, known, there_s - (before_s + after_s) / 2, (after_s - before_s) / 2)


def _speed(examiners: Sequence[Any], nodes: Sequence[ClusterNode], backend: str) -> Check:
    try:
        port = ray.get(examiners[0].free_port.remote(), timeout=_NODE_LIMIT_S)
        meeting = (len(nodes), nodes[0].address, port, backend)
        calls = [examiner.all_reduce_speed.remote(rank, *meeting) for rank, examiner in enumerate(examiners)]
        speeds: list[Speed] = ray.get(calls, timeout=2 * _SPEED_LIMIT_S)
    except RayError as error:
        fix = "name the network in the profile's env: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME; open its ports"
        return Check("cluster", "bad", f"{backend}: the nodes cannot talk ({explain(error).sentence}); {fix}")
    return describe_speed(max(speeds, key=lambda speed: speed.large_s), backend, len(nodes))


def _write(storage: RunStorage, name: str, text: str) -> None:
    storage.pull()
    path = storage.folder / name
    write_text_atomically(path, text)
    storage.upload(path)


def _clear(storage: RunStorage) -> None:
    try:
        for name in storage.names():
            storage.remove(name)
        if "://" not in storage.location:
            storage.folder.rmdir()
    except (OSError, Fault):
        return  # a node still writes, or storage is away: a folder whose name begins with a dot stays


# --- what the answers mean; pure --------------------------------------------------------------------------------------


def check_node(answer: Answer, profile: Profile, *, has_written: bool) -> Iterator[Check]:
    """What one node's answer means for a run with `profile`."""
    where, facts = answer.node.address, answer.facts
    if facts is None:
        yield Check(where, "bad", answer.problem)
        return
    shown = f"clock {answer.clock_ahead_s:+.1f} s from the driver's (known to {answer.clock_error_s:.1f} s)"
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
    if profile.gpus_per_worker and facts.gpus < answer.node.gpus:
        yield Check(where, "bad", f"PyTorch sees {facts.gpus} GPUs, Ray {answer.node.gpus:g}: driver or PyTorch build?")


def compare_nodes(facts: Sequence[NodeFacts]) -> Iterator[Check]:
    """Where nodes differ that have to be the same."""
    if not facts:
        return
    libraries = sorted({library for f in facts for library in f.versions})
    compared = {library: [f.versions.get(library, "none") for f in facts] for library in libraries}
    compared["this project's code"] = [f.code for f in facts]
    compared["processor"] = [f.cpu for f in facts]
    for kind, values in compared.items():
        usual, number = Counter(values).most_common(1)[0]
        if number == len(facts):
            continue
        others = ", ".join(f"{f.address}: {value}" for f, value in zip(facts, values, strict=True) if value != usual)
        if kind == "processor":
            others += "; bit-identical results are promised on equal processors only"
        yield Check("cluster", "warning" if kind == "processor" else "bad", f"{kind}: {usual}, but {others}")
    versions = ", ".join(f"{library} {facts[0].versions.get(library)}" for library in ("python", "torch", "ray"))
    yield Check("cluster", "ok", f"compared versions ({versions}, ...), code and processors of {len(facts)} nodes")


def describe_speed(speed: Speed, backend: str, num_nodes: int) -> Check:
    """What a step's all-reduce will take, if its time grows with the bytes."""
    bandwidth = speed.num_bytes * 2 * (num_nodes - 1) / num_nodes / speed.large_s
    step_s = speed.small_s + (speed.large_s - speed.small_s) * _GRADIENT_BYTES / speed.num_bytes
    return Check(
        "cluster",
        "ok",
        f"{backend} over {num_nodes} nodes: {bandwidth / 1e6:.0f} MB/s a node, {1e3 * speed.small_s:.2f} ms for 4 B; "
        f"ResNet-152's gradients would take {step_s:.2f} s a step",
    )
