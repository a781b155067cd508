"""Classifies Ray's errors: `explain` returns a kind and a sentence for every exception that Ray can raise."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from ray.exceptions import RayError, RayTaskError

from data_prep.errors import Fault, UserError
from data_prep.shown import one_line

FailureKind = Literal[
    "memory",  # a node had none left
    "killed",  # a process is gone: a signal, a crash
    "node",  # with its node
    "object",  # what a process or node held, with it
    "disk",  # a node's
    "capacity",  # nothing in the cluster fits what is asked for
    "environment",  # a node could not set up a process
    "timeout",
    "cancelled",
    "cluster",  # Ray itself, or its head
    "access",  # a token
    "mistake",  # the user's, which a process found
    "error",  # raised by the code that ran
]
_PASSING: frozenset[FailureKind] = frozenset({"memory", "killed", "node", "object", "timeout", "cancelled"})

# The first that fits: subclasses before their bases.
_KINDS: tuple[tuple[str, FailureKind], ...] = (
    ("OutOfMemoryError", "memory"),
    ("NodeDiedError", "node"),
    ("LocalRayletDiedError", "node"),
    ("OutOfDiskError", "disk"),
    ("ObjectStoreFullError", "memory"),
    ("RuntimeEnvSetupError", "environment"),
    ("TaskUnschedulableError", "capacity"),
    ("ActorUnschedulableError", "capacity"),
    ("TaskPlacementGroupRemoved", "cancelled"),
    ("ActorPlacementGroupRemoved", "cancelled"),
    ("TaskCancelledError", "cancelled"),
    ("AsyncioActorExit", "cancelled"),
    ("GetTimeoutError", "timeout"),
    ("PlasmaObjectNotAvailable", "timeout"),
    ("RayChannelTimeoutError", "timeout"),
    ("ObjectLostError", "object"),
    ("AuthenticationError", "access"),
    ("WorkerCrashedError", "killed"),
    ("ActorUnavailableError", "killed"),
    ("RayActorError", "killed"),
    ("RpcError", "cluster"),
    ("RaySystemError", "cluster"),
    ("UserCodeException", "error"),
    ("CrossLanguageError", "error"),
    ("UnserializableException", "error"),
    ("RayError", "cluster"),
)
_LESS_MEMORY = "fewer workers per node, a smaller micro-batch, fewer threads or nodes with more memory help"
_OUT_OF_MEMORY = re.compile(r"(?:low on|out of) memory|OOM kill(?!er)|NODE_OUT_OF_MEMORY")
_NODE_AND_MEMORY = re.compile(r"\(IP: ([^,\s]+), .*?\) was ([\d.]+)GB(?: used)? / ([\d.]+)GB", re.DOTALL)
_LARGEST = re.compile(r"actual memory used=([\d.]+)GB")
_PLACE = re.compile(r"^\s*(?:ip|Worker IP address): (\S+)", re.MULTILINE)
_NODE_GONE = re.compile(r"node (?:has died|died|is dead|was dead|is either dead)|its node (?:has )?died", re.IGNORECASE)
_KILLED = re.compile(r"unexpected(?:ly)? (?:exits|system error)|worker process has died|worker died", re.IGNORECASE)
_MAX_DETAIL = 300


@dataclass(frozen=True)
class Explained:
    kind: FailureKind
    sentence: str

    @property
    def is_transient(self) -> bool:
        """Whether the same work may succeed when it is repeated."""
        return self.kind in _PASSING


def explain(error: BaseException) -> Explained:
    """Explains any exception; the sentence is one line without Ray's own advice. Pure."""
    if failures := getattr(error, "worker_failures", None):
        return first_death(failures)[1]
    raised = _unwrapped(error)
    chain = [raised, *_causes(raised)]
    for cause in chain:
        if isinstance(cause, UserError | Fault):
            return Explained("mistake" if isinstance(cause, UserError) else "error", " ".join(str(cause).split()))
    of_ray = next((cause for cause in chain if is_lost_process(cause)), None)
    return Explained("error", _describe(raised)) if of_ray is None else explain_text(_text(of_ray), _kind(of_ray))


def first_death(failures: Mapping[int, BaseException]) -> tuple[int, Explained]:
    """The root failure of a worker group: that of a process that died, before the failures that its death caused; else
    the lowest rank's. Returns the rank, and what happened. Pure."""
    explained = {rank: explain(failure) for rank, failure in sorted(failures.items())}
    dead = [rank for rank, why in explained.items() if why.kind in ("memory", "node", "killed")]
    rank = next(iter(dead or explained))
    return rank, explained[rank]


def explain_text(text: str, kind: FailureKind = "cluster") -> Explained:
    """As `explain`, for an exception's text. `kind`: by its class, used if the text has nothing more specific."""
    if _OUT_OF_MEMORY.search(text):
        return Explained("memory", _memory(text))
    if kind == "memory":
        return Explained(kind, "Ray's object store is full; more space in /dev/shm or fewer tasks at a time help")
    where = f" on node {found.group(1)}" if (found := _PLACE.search(text)) else ""
    if kind in ("killed", "cluster") and _NODE_GONE.search(text):
        kind = "node"
    if kind == "killed" or (kind == "cluster" and _KILLED.search(text)):
        return Explained("killed", _killed(text, where))
    sentence = f"the node {found.group(1)} is gone" if kind == "node" and found else _SENTENCES[kind]
    detail = _detail(text)
    return Explained(kind, f"{sentence}: {detail}" if detail else sentence)


_SENTENCES: dict[FailureKind, str] = {
    "node": "a node is gone",
    "object": "what a process held was lost with it or its node",
    "disk": "a node's disk is full (Ray spills to its session folder, /tmp/ray by default)",
    "capacity": "no node of the cluster can run this",
    "environment": "a node could not set up the job's environment",
    "timeout": "Ray did not respond in time",
    "cancelled": "Ray cancelled the work",
    "cluster": "Ray failed",
    "access": "the cluster refuses this user's token",
    "killed": "a process is gone",
    "memory": "out of memory",
    "mistake": "",
    "error": "",
}


def as_raised(error: BaseException, doing: str) -> UserError | Fault:
    """The exception to raise instead of one of Ray's. `doing`: what failed."""
    explained = explain(error)
    if explained.kind == "mistake":
        return UserError(explained.sentence)
    if explained.kind == "access":
        return UserError(f"{doing}: {explained.sentence}; export RAY_AUTH_MODE=token and the cluster's token")
    return Fault(f"{doing}: {explained.sentence}")


def is_lost_process(error: BaseException) -> bool:
    """Whether Ray lost the process, rather than its work failing."""
    return isinstance(error, RayError) and not isinstance(error, RayTaskError)


def _unwrapped(error: BaseException) -> BaseException:
    """The original exception, without the wrappers of Ray, Ray Train and Ray Tune."""
    for _ in range(_MOST_WRAPPINGS):
        wrapped = (getattr(error, name, None) for name in _WRAPPED)
        inner = next((found for found in wrapped if isinstance(found, BaseException)), None)
        if inner is None or inner is error:
            break
        error = inner
    return error


_WRAPPED = ("cause", "controller_failure", "_base_exc", "client_exc")
_MOST_WRAPPINGS = 20


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The chain of causes given by `raise ... from`."""
    for _ in range(_MOST_WRAPPINGS):
        if error.__cause__ is None:
            return
        error = _unwrapped(error.__cause__)
        yield error


def _kind(error: BaseException) -> FailureKind:
    names = {base.__name__ for base in type(error).__mro__}
    return next((kind for name, kind in _KINDS if name in names), "cluster")


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - str() of some needs attributes that may not be set
        return ""


def _memory(text: str) -> str:
    found = _NODE_AND_MEMORY.search(text)
    if found is None:
        return f"a node ran out of memory; {_LESS_MEMORY}"
    ip, used, limit = found.groups()
    largest = max(map(float, _LARGEST.findall(text)), default=0.0)
    whose = f", {largest:.1f} GB of it in the process that was ended" if largest else ""
    return f"node {ip} ran out of memory ({float(used):.1f} of {float(limit):.1f} GB{whose}); {_LESS_MEMORY}"


def _killed(text: str, where: str) -> str:
    if "unavailable" in text:
        return f"a process{where} did not respond"
    if "creation task" in text or "ray.kill" in text or "out of scope" in text:
        return f"a process{where} was ended: {_detail(text)}"
    if "INTENDED" in text:
        return f"a process{where} ended itself"
    return f"a process{where} was killed or crashed (out of memory? `dmesg` on the node shows it)"


def _detail(text: str) -> str:
    """The line with the reason, without addresses and advice."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if not re.match(r"(class_name|actor_id|pid|name|namespace|ip|Tip|To see)\b", line)]
    if not lines:
        return ""
    # In a traceback the exception is last, in Ray's own messages first.
    line = lines[-1] if any(line.startswith(("Traceback", "File ")) for line in lines) else lines[0]
    return one_line(line, _MAX_DETAIL)


def _describe(error: BaseException) -> str:
    text = _text(error)
    if isinstance(error, RayTaskError):
        return _detail(text) or "a task failed"
    if isinstance(error, OSError) and text:
        return one_line(text, _MAX_DETAIL)
    return one_line(f"{type(error).__name__}: {text}" if text else type(error).__name__, _MAX_DETAIL)
