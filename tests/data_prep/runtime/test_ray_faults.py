"""Every error of Ray gets a kind and a sentence; servers that are not a Ray cluster are recognised."""

from __future__ import annotations

import inspect
import json
import os
import platform
import socket
import threading
from collections.abc import Iterator
from concurrent import futures
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
import ray.exceptions
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
from ray.exceptions import ActorDiedError, NodeDiedError, OutOfMemoryError, RayError, RayTaskError, WorkerCrashedError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from data_prep.errors import Fault, UserError
from data_prep.runtime import ray_connection as connection
from data_prep.runtime.environment import private_folder
from data_prep.runtime.exit_codes import ending
from data_prep.runtime.ray_connection import connect, session_folder, why_not_started
from data_prep.runtime.ray_errors import as_raised, explain, is_lost_process

OUT_OF_MEMORY = """1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.7, \
ID: 601c06) was 22.70GB used / 23.54GB limit (0.964)
OOM kill reason: Memory usage 24373796864B exceeded threshold of 24012677120B (95.0% of 25276502016B limit)
Object store memory usage: [- objects spillable: 0
]
Selected to kill: (Task: job ID=01000000, task name=eat, pid=13877, actual memory used=3.12GB, worker ID=0b4d)
Top 10 memory users: PID	MEM(GB)	COMMAND
13877	3.12	ray::eat
Refer to the documentation on how to address the out of memory issue: https://docs.ray.io/x"""
KILLED = """The actor died unexpectedly before finishing this task.
	class_name: A
	actor_id: f0ccf26fce8c09bd2259f20501000000
	pid: 14412
	ip: 10.0.0.7
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker \
unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was killed \
by the OOM killer due to high memory usage, (2) ray stop --force was called"""
MEMORY_SENTENCE = "node 10.0.0.7 ran out of memory (22.7 of 23.5 GB, 3.1 GB of it in the process that was ended); fewer"
KILLED_SENTENCE = "a process on node 10.0.0.7 was killed or crashed (out of memory? `dmesg` on the node shows it)"


def classes() -> list[type[RayError]]:
    members = inspect.getmembers(ray.exceptions, inspect.isclass)
    found = [member for _, member in members if issubclass(member, RayError)]
    assert len(found) > 30
    return found


def instance(some: type[RayError], text: str = "why\nhow") -> RayError:
    """One with every attribute that one of them has, made without its own constructor."""
    error = some.__new__(some, text)
    names = "message error_msg error_message client_exc reason_message _original_stack_trace function_name proctitle"
    for name in names.split():
        error.__dict__[name] = text
    error.__dict__ |= {"object_ref_hex": "ab", "call_site": "", "owner_address": None, "task_id": None, "reason": None}
    error.__dict__ |= {"traceback_str": text, "pid": 1, "ip": "1.2.3.4", "actor_repr": None}
    if issubclass(some, RayTaskError):
        error.__dict__["cause"] = KeyError("x")
    return error


def died(text: str) -> ActorDiedError:
    error = ActorDiedError()
    error.error_msg = text
    return error


def wrapped_by_tune(cause: Exception) -> RuntimeError:
    """As Ray Tune raises an error that it does not know."""
    error = RuntimeError("Caught unexpected exception: ...")
    error.__cause__ = cause
    return error


def failed_task(cause: Exception) -> RayTaskError:
    return RayTaskError("f", f"Traceback (most recent call last):\n  File x\n{cause!r}", cause, "p", 1, "1.2.3.4")


@pytest.mark.parametrize("some", classes(), ids=lambda some: some.__name__)
def test_no_exception_of_ray_is_unexpected(some: type[RayError]) -> None:
    plain = instance(some)
    for error in (plain, failed_task(plain), WorkerGroupError("x", {0: plain}), ControllerError(plain)):
        told = explain(error)
        assert told.sentence == " ".join(told.sentence.split())
        assert 0 < len(told.sentence) < 500
        assert "Traceback" not in told.sentence
        assert "unexpected" not in told.sentence
        assert "None" not in told.sentence
    assert is_lost_process(plain) == (not issubclass(some, RayTaskError))
    code, message = ending(plain, {})
    assert code in (1, 2)
    assert message


def test_missing_memory_is_reported_as_such() -> None:
    end = "; give it more (a container's limit, ulimit -v), or stop others"
    assert ending(MemoryError(), {}) == (1, f"there is not enough memory{end}")
    assert ending(MemoryError("malloc of size 9 failed"), {})[1] == (
        f"there is not enough memory (malloc of size 9 failed){end}"
    )


def test_an_exception_that_cannot_be_shown_has_a_name() -> None:
    error = ray.exceptions.OutOfMemoryError.__new__(ray.exceptions.OutOfMemoryError)  # no message: str() raises
    assert explain(error).kind == "memory"


@pytest.mark.parametrize(
    ("error", "kind", "sentence"),
    [
        (OutOfMemoryError(OUT_OF_MEMORY), "memory", MEMORY_SENTENCE),
        (died(OUT_OF_MEMORY), "memory", MEMORY_SENTENCE),
        (failed_task(OutOfMemoryError(OUT_OF_MEMORY)), "memory", MEMORY_SENTENCE),
        (WorkerGroupError("", {1: OutOfMemoryError(OUT_OF_MEMORY)}), "memory", MEMORY_SENTENCE),
        (wrapped_by_tune(OutOfMemoryError(OUT_OF_MEMORY)), "memory", MEMORY_SENTENCE),
        (died(KILLED), "killed", KILLED_SENTENCE),
        (WorkerCrashedError(), "killed", "a process was killed or crashed"),
        (NodeDiedError("the node is dead"), "node", "a node is gone"),
        (WorkerGroupError("", {0: RuntimeError("peer closed"), 1: died(KILLED)}), "killed", KILLED_SENTENCE),
        (ray.exceptions.ObjectStoreFullError("x"), "memory", "Ray's object store is full"),
        (ray.exceptions.OutOfDiskError("x"), "disk", "a node's disk is full"),
        (ray.exceptions.ActorUnavailableError("rpc", None), "killed", "a process did not respond"),
        (ray.exceptions.RuntimeEnvSetupError("pip failed"), "environment", "a node could not set up the job's"),
        (ray.exceptions.ActorUnschedulableError("no GPU"), "capacity", "no node of the cluster can run this"),
        (ray.exceptions.GetTimeoutError("slow"), "timeout", "Ray did not respond in time"),
        (failed_task(KeyError("no such thing")), "error", "KeyError: 'no such thing'"),
        (failed_task(UserError("give --x")), "mistake", "give --x"),
        (failed_task(Fault("the disk broke")), "error", "the disk broke"),
        (ControllerError(OSError(28, "No space left on device")), "error", "[Errno 28] No space left on device"),
        (RuntimeError("x"), "error", "RuntimeError: x"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_each_kind_of_failure_is_reported(error: Exception, kind: str, sentence: str) -> None:
    told = explain(error)
    assert told.kind == kind
    assert told.sentence.startswith(sentence)


def test_the_error_raised_instead() -> None:
    assert isinstance(as_raised(failed_task(UserError("x")), "doing"), UserError)
    assert str(as_raised(NodeDiedError(""), "the conversion")) == "the conversion: a node is gone"
    assert isinstance(as_raised(ray.exceptions.AuthenticationError("x"), "doing"), UserError)


class _Dashboard(BaseHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def http_port() -> Iterator[int]:
    server = HTTPServer(("127.0.0.1", 0), _Dashboard)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def test_a_dashboard_is_not_taken_for_a_head(http_port: int) -> None:
    with pytest.raises(
        UserError, match=r"no Ray cluster at 127\.0\.0\.1:\d+ \(RAY_ADDRESS\): something listens .*8265"
    ):
        connect(f"127.0.0.1:{http_port}", source="RAY_ADDRESS")


class _Head(gcs_service_pb2_grpc.InternalKVGcsServiceServicer):
    """A head of Ray 1.2.3, as far as it is asked."""

    def InternalKVGet(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        versions = {"ray_version": "1.2.3", "python_version": "3.8.1"}
        return gcs_service_pb2.InternalKVGetReply(value=json.dumps(versions).encode())


def test_a_cluster_of_other_versions_is_reported_with_both() -> None:
    server = grpc.server(futures.ThreadPoolExecutor(1))
    gcs_service_pb2_grpc.add_InternalKVGcsServiceServicer_to_server(_Head(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.raises(UserError) as told:
            connect(f"127.0.0.1:{port}", source="RAY_ADDRESS")
    finally:
        server.stop(None)
    mine = f"this is Ray {ray.__version__} and Python {platform.python_version()}"
    assert f"127.0.0.1:{port} runs Ray 1.2.3 and Python 3.8.1, {mine}; both must be the same" in str(told.value)


def test_a_silent_server_is_not_taken_for_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_ANSWER_LIMIT_S", 0.2)
    told = r"something listens there, but it is not a Ray head"
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(UserError, match=told):
        connect(f"127.0.0.1:{silent.getsockname()[1]}", source="here")


def test_a_closed_port_and_an_unknown_host_are_reported() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(UserError, match=r"no Ray cluster at \S+ \(here\): Connection refused"):
            connect(f"127.0.0.1:{taken.getsockname()[1]}", source="here")
    with pytest.raises(UserError, match=r"no Ray cluster at no-such-host.invalid:6379 \(here\): "):
        connect("no-such-host.invalid:6379", source="here")


def test_sessions_are_private_and_where_a_socket_path_fits(tmp_path: Path) -> None:
    me = f"ray-{os.getuid()}"
    assert session_folder({"RAY_TMPDIR": "/tmp"}) == Path(f"/tmp/{me}/ray")
    assert session_folder({"RAY_TMPDIR": f"/tmp/{me}"}) == Path(f"/tmp/{me}/ray")
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    assert session_folder({"TMPDIR": str(deep)}) == Path(f"/tmp/{me}/ray")
    assert Path(f"/tmp/{me}").stat().st_mode & 0o777 == 0o700
    with pytest.raises(UserError, match=r"RAY_TMPDIR=\S+x: \S+ is too long a name; set RAY_TMPDIR to .* of \d+ bytes"):
        session_folder({"RAY_TMPDIR": str(deep)})
    with pytest.raises(UserError, match=r"RAY_TMPDIR=/nowhere: /nowhere does not exist"):
        session_folder({"RAY_TMPDIR": "/nowhere"})
    with pytest.raises(UserError, match=r"RAY_TMPDIR=/proc: /proc "):
        session_folder({"RAY_TMPDIR": "/proc"})
    assert private_folder("/tmp") == Path(f"/tmp/{me}")


@pytest.mark.parametrize(
    ("error", "log", "load", "told"),
    [
        (
            OSError(30, "Read-only file system", "/tmp/ray"),
            "",
            0,
            "Read-only file system: '/tmp/ray'; RAY_TMPDIR names",
        ),
        (Exception("timed out during startup"), "", 9.0, "the machine is busy (load 9.0 for each CPU)"),
        (Exception("timed out during startup"), "", 0.2, "timed out during startup (its logs: "),
        (Exception("timed out"), "bind: Address already in use", 9.0, "a port that it needs is taken"),
        (Exception("timed out"), "mmap: No space left on device", 9.0, "no space is left on the device"),
        (Exception("timed out"), "thread: Resource temporarily unavailable", 9.0, "may start no more processes"),
        (ValueError("the minimum allowed size of the object store"), "", 0, "less memory free than Ray's object store"),
    ],
)
def test_why_a_local_ray_did_not_start(tmp_path: Path, error: Exception, log: str, load: float, told: str) -> None:
    (tmp_path / "raylet.err").write_text(log)
    why = why_not_started(error, tmp_path, load)
    assert told in why
    assert ("less busy" in why) == (load > 1.5 and not log)
