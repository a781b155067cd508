"""What one node says of itself, and what nodes measure together: the part of the doctor that runs on them."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import xxhash

from data_prep.beton.files import write_text_atomically
from resnet_dist.errors import Fault, UserError
from resnet_dist.launch.code_version import library_versions
from resnet_dist.storage.location import open_storage
from resnet_dist.tracking.server import require_answer

_PROBE_NUMBERS = 1 << 22
"""16 MB in float32."""
_WARM_UP, _REPEATS = 2, 5


@dataclass(frozen=True)
class NodeFacts:
    """One node, as its own process sees it. Answers of the kind `str` are what went wrong, "" if nothing."""

    address: str
    versions: Mapping[str, str]
    code: str
    """Digest of this project's Python files there."""
    cpu: str
    gpus: int
    """What PyTorch sees, whatever Ray says."""
    free_bytes: Mapping[str, int] = field(default_factory=dict)
    """Folder -> free space where it lies or would lie."""
    data: str = ""
    storage: str = ""
    tracking: str = ""


@dataclass(frozen=True)
class Question:
    """What every node is asked to look at."""

    data_root: str
    cache: str | None
    storage: str
    """Of a run that serves for this examination."""
    tracking_uri: str
    token: str
    """What the driver wrote into that storage."""


PROBE_FILE = "from-the-driver"


def examine_node(question: Question, address: str) -> NodeFacts:
    folders = [question.cache, None if "://" in question.storage else question.storage, "/dev/shm", "/tmp"]
    return NodeFacts(
        address=address,
        versions=library_versions(),
        code=code_digest(Path(__file__).parents[2]),
        cpu=_cpu(),
        gpus=torch.cuda.device_count(),
        free_bytes={folder: _free_bytes(Path(folder)) for folder in folders if folder},
        data=_look_at_data(question.data_root),
        storage=_try_storage(question, address),
        tracking=_try_tracking(question.tracking_uri),
    )


def code_digest(root: Path) -> str:
    """Of every Python file of both packages, by name and content."""
    hasher = xxhash.xxh3_64()
    for path in sorted(p for package in ("data_prep", "resnet_dist") for p in (root / package).rglob("*.py")):
        hasher.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return hasher.hexdigest()


def _cpu() -> str:
    """The processor's name: a kernel's sums depend on it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return "unknown"


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _look_at_data(data_root: str) -> str:
    if "://" in data_root:
        return ""  # read by `data-prep stage`, which has its own checks
    try:
        found = [path for path in Path(data_root).iterdir() if path.is_dir()]
    except OSError as error:
        return f"{data_root}: {error.strerror}"
    return "" if found else f"{data_root}: holds no data set"


def _try_storage(question: Question, address: str) -> str:
    """Reads what the driver wrote, and writes something for it."""
    storage = open_storage(question.storage)
    try:
        found = storage.read(PROBE_FILE)
        if found != question.token.encode():
            return "does not show what the driver wrote: is it shared by all nodes?"
        storage.pull()
        path = storage.folder / f"from-{address}"
        write_text_atomically(path, question.token)
        storage.publish(path)
    except (OSError, Fault, UserError) as error:
        return str(error)
    return ""


def _try_tracking(tracking_uri: str) -> str:
    try:
        require_answer(tracking_uri, limit_s=5.0)
    except (Fault, UserError) as error:
        return str(error)
    return ""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def measure_all_reduce(rank: int, world_size: int, address: str, port: int, backend: str, limit_s: float) -> Speed:
    """All nodes call it together: one group over them, the first one listening at `address`. Raises RuntimeError."""
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    dist.init_process_group(
        backend,
        init_method=f"tcp://{address}:{port}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=limit_s),
    )
    try:
        device = torch.device("cuda" if backend == "nccl" else "cpu")
        small, large = torch.zeros(1, device=device), torch.zeros(_PROBE_NUMBERS, device=device)
        return Speed(_seconds(small), _seconds(large), large.numel() * large.element_size())
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Speed:
    """Of all-reduces over all nodes, one process each."""

    small_s: float
    """Of four bytes."""
    large_s: float
    num_bytes: int

    def seconds_for(self, num_bytes: int) -> float:
        """An all-reduce of this size, if time grows with the size."""
        return self.small_s + (self.large_s - self.small_s) * num_bytes / self.num_bytes


def _seconds(values: torch.Tensor) -> float:
    """The median of some all-reduces."""
    times = []
    for repeat in range(_WARM_UP + _REPEATS):
        began_s = time.perf_counter()
        dist.all_reduce(values)
        if values.is_cuda:
            torch.cuda.synchronize()
        if repeat >= _WARM_UP:
            times.append(time.perf_counter() - began_s)
    return sorted(times)[len(times) // 2]
