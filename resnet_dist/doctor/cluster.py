"""`resnet-dist doctor --on PROFILE`: is the cluster fit for a run? Examines every node, and times all-reduces between
their GPUs and between nodes; `verdicts.py` says what the answers mean.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

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
from resnet_dist.doctor.verdicts import (
    Answer,
    Check,
    NodeFacts,
    Speed,
    check_local_speed,
    check_network_speed,
    check_node,
    check_speed,
    compare_nodes,
)
from resnet_dist.errors import Fault, UserError
from resnet_dist.gpus import nccl
from resnet_dist.gpus.device import gpu_problem, this_build
from resnet_dist.gpus.nvml import InstalledGpus, read_gpus
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
_PROBE_FILE = "from-the-driver"
_PROBE_NUMBERS = {"gloo": 1 << 22, "nccl": 1 << 26}
"""In float32: 16 MB, and 268 MB, with which NVLink reaches its full speed."""
_WARM_UP, _REPEATS = 2, 5
_NODES_AT_ONCE = 32
_NAME_THE_NETWORK = "name the network in the profile's env: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME; open its ports"


# --- on a node --------------------------------------------------------------------------------------------------------


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
            free_bytes={folder: _free_bytes(Path(folder)) for folder in folders if folder},
            data=_data_problem(self._profile.data_root),
            storage=self._storage_problem(),
            tracking=_tracking_problem(self._profile.tracking_uri),
            gpus=read_gpus() if self._profile.gpus_per_worker else InstalledGpus(),
            gpu_problem=gpu_problem() if self._profile.gpus_per_worker else "",
            build=this_build(),
            rdma_gbit_s=rdma_gbit_s(Path("/sys/class/infiniband")),
        )

    def clock(self) -> float:
        return time.time()

    def free_port(self) -> int:
        with socket.socket() as listener:
            listener.bind(("", 0))
            return int(listener.getsockname()[1])

    def all_reduce_speed(self, rank: int, world_size: int, address: str, port: int, backend: str) -> Speed:
        """All processes call it together; rank 0 listens at `address`. Raises RuntimeError."""
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
        if rank == 0 and backend == "nccl":
            os.environ.update(nccl.log_settings(os.environ))  # nothing, once they are set
        dist.init_process_group(
            backend,
            init_method=f"tcp://{address}:{port}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=_SPEED_LIMIT_S),
        )
        try:
            device = torch.device("cuda" if backend == "nccl" else "cpu")
            small, large = torch.zeros(1, device=device), torch.zeros(_PROBE_NUMBERS[backend], device=device)
            small_s, large_s = _all_reduce_s(small), _all_reduce_s(large)
            transports = nccl.parse_log(nccl.read_log(os.environ))
            return Speed(world_size, small_s, large_s, large.numel() * large.element_size(), transports)
        finally:
            dist.destroy_process_group()

    def remove_log(self) -> None:
        nccl.remove_log(os.environ)

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


def rdma_gbit_s(folder: Path) -> dict[str, float]:
    """RDMA adapter -> line rate of its active ports, from a folder like /sys/class/infiniband."""
    rates: dict[str, float] = {}
    for port in sorted(folder.glob("*/ports/*")):
        try:
            if "ACTIVE" in (port / "state").read_text():  # "4: ACTIVE"
                adapter, rate = port.parts[-3], (port / "rate").read_text()  # "400 Gb/sec (4X NDR)"
                rates[adapter] = rates.get(adapter, 0.0) + float(rate.split()[0])
        except (OSError, ValueError, IndexError):
            continue
    return rates


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
    found = (
        f"{len(nodes)} node{'s' * (len(nodes) != 1)} with room for {capacity} worker{'s' * (capacity != 1)}; "
        f"the profile asks for {profile.workers}"
    )
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
    responding = [answer for answer in answers if answer.facts]
    if len(responding) > 1:
        measured = _measure([examiners[answer.node.node_id] for answer in responding], responding[0].node, "gloo")
        if isinstance(measured, str):
            yield Check("cluster", "bad", f"gloo: the nodes cannot communicate ({measured}); {_NAME_THE_NETWORK}")
        else:
            yield Check("cluster", *check_speed(measured, f"gloo over {len(responding)} nodes"))
    if profile.gpus_per_worker:
        usable = [answer for answer in responding if answer.facts and not answer.facts.gpu_problem]
        if usable:
            yield from _measure_gpus(usable, examiners, profile, storage, token)


def _measure_gpus(
    answers: Sequence[Answer],
    examiners: Mapping[str, Any],
    profile: Profile,
    storage: RunStorage,
    token: str,
    backend: str = "nccl",
) -> Iterator[Check]:
    """NCCL within each node, then between all of them, with one process on every GPU that is free. `backend`: tests
    measure gloo instead."""
    groups = {answer.node.node_id: [examiners[answer.node.node_id]] for answer in answers}
    peers = [
        (answer.node.node_id, _examiner(answer.node, profile, storage, token))
        for answer in answers
        for _ in range(int(answer.node.gpus) - 1)
    ]
    pings = {peer.clock.remote(): (node_id, peer) for node_id, peer in peers}
    ready, busy = ray.wait(list(pings), num_returns=len(pings), timeout=_NODE_LIMIT_S) if pings else ([], [])
    for ping in ready:
        node_id, peer = pings[ping]
        groups[node_id].append(peer)
    for ping in busy:
        ray.kill(pings[ping][1])
    if busy:
        yield Check(
            "cluster", "warning", f"{len(busy)} GPUs are in use by other jobs and are left out of the measurement"
        )
    several = [answer for answer in answers if len(groups[answer.node.node_id]) > 1]
    with ThreadPoolExecutor(_NODES_AT_ONCE) as pool:
        of_nodes = pool.map(lambda answer: _measure(groups[answer.node.node_id], answer.node, backend), several)
        for answer, measured in zip(several, of_nodes, strict=True):
            where, gpus = answer.node.address, answer.facts.gpus.gpus if answer.facts else ()
            if isinstance(measured, str):
                yield Check(where, "bad", f"NCCL: the node's GPUs cannot communicate ({measured})")
                continue
            yield from (Check(where, *line) for line in check_local_speed(measured, gpus))
    if len(answers) > 1:
        measured = _measure([process for group in groups.values() for process in group], answers[0].node, backend)
        facts = [answer.facts for answer in answers if answer.facts]
        if isinstance(measured, str):
            yield Check("cluster", "bad", f"NCCL: the nodes cannot communicate ({measured}); {_NAME_THE_NETWORK}")
        else:
            yield from (Check("cluster", *line) for line in check_network_speed(measured, facts))
    closing = [group[0].remove_log.remote() for group in groups.values()]
    ray.wait(closing, num_returns=len(closing), timeout=_SPEED_LIMIT_S)


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
        return Answer(
            node, problem=f"gave no answer within {_NODE_LIMIT_S:g} s: overloaded, or its GPUs are in use by other jobs"
        )
    except RayError as error:
        return Answer(node, problem=f"could not run a process: {explain(error).sentence}")
    return Answer(node, known, there_s - (before_s + after_s) / 2, (after_s - before_s) / 2)


def _measure(processes: Sequence[Any], first: ClusterNode, backend: str) -> Speed | str:
    """The slowest process's all-reduce, with the first one's transports; or why there is none. `first`: its node."""
    try:
        port = ray.get(processes[0].free_port.remote(), timeout=_NODE_LIMIT_S)
        meeting = (len(processes), first.address, port, backend)
        calls = [process.all_reduce_speed.remote(rank, *meeting) for rank, process in enumerate(processes)]
        speeds: list[Speed] = ray.get(calls, timeout=2 * _SPEED_LIMIT_S)
    except RayError as error:
        return explain(error).sentence
    slowest = max(speeds, key=lambda speed: speed.large_s)
    return replace(slowest, transports=speeds[0].transports)


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
