"""Connects to a Ray cluster, or starts a local Ray; each kind of failure has its own message."""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Mapping
from pathlib import Path

import grpc
import ray
from ray._private import services
from ray._private.grpc_utils import init_grpc_channel
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray._private.utils import check_version_info
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
from ray.job_config import JobConfig

from data_prep.errors import Fault, UserError
from data_prep.runtime.environment import private_folder, unusable
from data_prep.runtime.import_path import CODE_ROOT, is_for_packages
from data_prep.runtime.ray_errors import as_raised
from data_prep.shown import one_line

_CONNECT_LIMIT_S = 10.0
_ANSWER_LIMIT_S = 30.0
_NODE_LIMIT_S = 20.0
"""Limit for a node's processes on this machine to start; Ray itself waits for a minute."""
_MOST_FOLDER_BYTES = 107 - len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
"""Longest session folder: the path of a Unix socket has 107 bytes at most."""


class _CodePath(JobConfig):
    """Tells workers where our code is: Ray's default puts the folder in which the command was started first."""

    def __init__(self) -> None:
        has_code = is_for_packages(CODE_ROOT) or RAY_JOB_CONFIG_JSON_ENV_VAR in os.environ  # a job's upload
        super().__init__(_py_driver_sys_path=[] if has_code else [CODE_ROOT])

    def _runtime_env_has_working_dir(self) -> bool:
        return True


def connect(address: str, *, source: str, namespace: str | None = None) -> None:
    """Connects this process to the cluster at `address`, as `environment.cluster_address` returns it. `source`: where
    that comes from. Raises UserError, Fault.
    """
    at = f"no Ray cluster at {address} ({source})"
    if address != "auto":
        _require_listening(address, at)
    if address != "auto" and "://" not in address:
        _require_same_versions(_metadata(address, at), address)
        _require_node_here(address)
    try:
        _init(address=address, namespace=namespace)
    except (ConnectionError, TimeoutError) as error:
        found = "no Ray is running on this machine" if address == "auto" else one_line(error)
        raise UserError(f"{at}: {found}; start one, or correct {source}") from None
    except (RuntimeError, ValueError) as error:
        if "Version mismatch" in str(error):
            raise UserError(_other_versions(str(error), address)) from None
        if "No node info found" in str(error):  # there are nodes of another cluster
            raise UserError(_no_node_here(address)) from None
        raise as_raised(error, at) from error
    except Exception as error:
        raise as_raised(error, at) from error


def start_local(*, num_cpus: int | None, dashboard: bool, namespace: str | None = None) -> None:
    """A Ray for this process alone, in a folder that no other user can enter. Raises UserError, Fault."""
    folder = session_folder(os.environ)
    os.environ["RAY_TMPDIR"] = str(folder.parent)  # for what Ray's processes keep outside their session
    if "RAY_AUTH_MODE" not in os.environ:
        # Ray listens on all interfaces and turns token authentication on by itself. A token of this process alone
        # keeps others out, and leaves no file behind that would change how later Rays of this user start.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # An address left in the environment would be asked for the state of another cluster.
    os.environ.pop("RAY_REDIS_ADDRESS", None)
    try:
        _init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=dashboard,
            namespace=namespace,
            _temp_dir=str(folder),
        )
    except Exception as error:
        logs = folder / "session_latest" / "logs"
        load = os.getloadavg()[0] / (os.cpu_count() or 1)
        raise Fault(f"Ray did not start on this machine: {why_not_started(error, logs, load)}") from error


def session_folder(environment: Mapping[str, str]) -> Path:
    """The folder for sessions of a local Ray: RAY_TMPDIR if set, else the first usable of TMPDIR, /tmp, /var/tmp.

    Raises UserError.
    """
    given = environment.get("RAY_TMPDIR")
    candidates = [given] if given else [environment.get("TMPDIR", "/tmp"), "/tmp", "/var/tmp", "/dev/shm"]
    candidates = [str(Path(base).expanduser().absolute()) for base in candidates]
    problems = []
    for base in dict.fromkeys(candidates):
        why = unusable(base)
        parent = private_folder(base) if not why else None
        folder = parent / "ray" if parent else None
        if folder is not None and len(os.fsencode(folder)) <= _MOST_FOLDER_BYTES:
            return folder
        problems.append(f"{base} {why or ('is too long a name' if folder else 'cannot be written to')}")
    where = f"RAY_TMPDIR={given}" if given else "no folder for Ray's sessions"
    longest = _MOST_FOLDER_BYTES - len(f"/ray-{os.getuid()}/ray")
    raise UserError(
        f"{where}: {'; '.join(problems)}; set RAY_TMPDIR to a folder that can be written to, of {longest} bytes at most"
    )


def why_not_started(error: BaseException, logs: Path, load: float) -> str:
    """The reason, from Ray's exception or its logs, which have more. `load`: load average per CPU."""
    text = one_line(error)
    if isinstance(error, OSError) and error.errno is not None:
        return f"{text}; RAY_TMPDIR names another folder for its sessions"
    if "minimum allowed" in text and "object store" in text:
        return "this machine has less memory free than Ray's object store needs (75 MB)"
    for pattern, reason in _IN_LOGS:
        if pattern in text or _is_in_logs(pattern, logs):
            return f"{reason} (its logs: {logs})"
    if "timed out" in text and load > 1.5:
        return (
            f"it did not come up in time, and the machine is busy (load {load:.1f} for each CPU); the same command may "
            f"work when it is less busy (its logs: {logs})"
        )
    return f"{text} (its logs: {logs})"


_IN_LOGS = (
    ("Address already in use", "a port that it needs is taken; unset RAY_GCS_SERVER_PORT and the like"),
    ("No space left on device", "no space is left on the device of its session folder or in /dev/shm"),
    ("Too many open files", "too many open files: raise `ulimit -n`"),
    ("Resource temporarily unavailable", "this user may start no more processes: raise `ulimit -u`, or pids.max"),
    ("Cannot allocate memory", "there is no memory left"),
    ("Read-only file system", "its session folder is read-only; RAY_TMPDIR names another"),
)
_LOGS = ("gcs_server.err", "gcs_server.out", "raylet.err", "raylet.out")
_MOST_LOG_BYTES = 1 << 20


def _is_in_logs(words: str, logs: Path) -> bool:
    for name in _LOGS:
        try:
            with (logs / name).open("rb") as log:
                if words.encode() in log.read(_MOST_LOG_BYTES):
                    return True
        except OSError:
            continue
    return False


def _init(**arguments: object) -> None:
    ray.init(log_to_driver=False, logging_level=logging.ERROR, job_config=_CodePath(), **arguments)


def _require_listening(address: str, at: str) -> None:
    """UserError if nothing listens there: Ray itself would retry for minutes and print C++ warnings."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_LIMIT_S).close()
    except OSError as error:
        raise UserError(f"{at}: {error.strerror or error}; start one, or correct the address") from None


def _metadata(address: str, at: str) -> Mapping[str, str]:
    """The cluster's versions, from its head. Raises UserError if something else responds."""
    stub = gcs_service_pb2_grpc.InternalKVGcsServiceStub(init_grpc_channel(address))
    request = gcs_service_pb2.InternalKVGetRequest(namespace=b"cluster", key=b"CLUSTER_METADATA")
    try:
        answer = stub.InternalKVGet(request, timeout=_ANSWER_LIMIT_S)
        found = json.loads(answer.value or b"{}")
        return {key: str(found[key]) for key in ("ray_version", "python_version") if key in found}
    except grpc.RpcError as error:
        if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            raise UserError(
                f"the Ray cluster at {address} requires a token; export RAY_AUTH_MODE=token and "
                "RAY_AUTH_TOKEN_PATH=FILE with the cluster's"
            ) from None
        raise UserError(
            f"{at}: something listens there, but it is not a Ray head ({_why(error)}); give the port of "
            "`ray start --head` (6379), not that of the dashboard (8265)"
        ) from None
    except ValueError:
        return {}


def _why(error: grpc.RpcError) -> str:
    text = str(error.details())
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"no response for {_ANSWER_LIMIT_S:g} s"
    if "http1" in text:
        return "it speaks HTTP"
    return "it does not know the request" if error.code() is grpc.StatusCode.UNIMPLEMENTED else text.split(";")[-1]


def _require_same_versions(metadata: Mapping[str, str], address: str) -> None:
    if len(metadata) < 2:
        return
    try:
        check_version_info(metadata, address)
    except RuntimeError as error:
        raise UserError(_other_versions(str(error), address)) from None


def _other_versions(text: str, address: str) -> str:
    """Ray's own text, in one line."""
    found = re.findall(r"(Ray|Python): (\S+)", text)
    theirs, ours = [" and ".join(f"{name} {version}" for name, version in part) for part in (found[:2], found[2:4])]
    return (
        f"the Ray cluster at {address} runs {theirs}, this is {ours}; both must be the same: use the cluster's image "
        "or its versions here, or start the cluster with these"
    )


def _require_node_here(address: str) -> None:
    """UserError if this machine has no node, which a driver needs to talk to the cluster."""
    deadline = time.monotonic() + _NODE_LIMIT_S
    while not services.find_node_ids():
        if time.monotonic() > deadline:
            raise UserError(_no_node_here(address))
        time.sleep(0.5)


def _no_node_here(address: str) -> str:
    return (
        f"this machine is not a node of the Ray cluster at {address}: start one here by `ray start --address "
        f"{address}`, or send the command there as a job: resnet-dist submit"
    )
