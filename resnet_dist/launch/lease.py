"""One driver at a time: a lease with a heartbeat, whose number fences off earlier drivers.

`driver/00003.lease` is created by exactly one process; the creator of the highest number holds the run. A process that
works for a lower number (a driver that was cut off and came back, or its workers) may not commit any more.
`driver/00003.json` says where the holder runs and counts up as long as it is alive.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from data_prep.beton.files import make_folder, write_text_atomically
from resnet_dist.config.records import read_record
from resnet_dist.errors import Fault, UserError
from resnet_dist.storage.base import RunStorage
from resnet_dist.tracking.spool import newest_lease

_GROUP = "driver"
_BEATS_IN_TIMEOUT = 6
_LOOK_EVERY_S = 1.0
_RETRY_S = 2.0


@dataclass(frozen=True)
class Holder:
    """Who holds a run, and its heartbeat."""

    host: str
    pid: int
    process: str
    """The machine's boot and the process's start, which differ for a later process with the same pid."""
    beat: int = 0
    released: bool = False
    request: str = ""
    """What its Ray trainer requested from Ray (`Reservation.request`): the successor of a dead driver cancels it."""
    namespace: str = ""
    """The pid namespace in which its pid is valid."""


@dataclass(frozen=True)
class Lease:
    """The number by which a run is held. Workers have it too."""

    storage: RunStorage
    number: int

    def require_held(self) -> None:
        """Raises Fault if another driver has taken the run over, UserError if this is not the driver's storage."""
        newest = _newest(self.storage)
        if newest < self.number:
            raise UserError(
                f"{self.storage.location}: {socket.gethostname()} does not see what the driver wrote; storage "
                "must be a folder that all nodes share, mounted on each, or s3://"
            )
        if newest > self.number:
            holder = _holder(self.storage, newest)
            who = f"pid {holder.pid} on {holder.host}" if holder else "unknown"
            raise Fault(f"another driver ({who}) has taken over {self.storage.location}; this one ends")


class HeldLease:
    """The driver's side: a thread sends the heartbeat until `release`."""

    def __init__(self, lease: Lease, timeout_s: float, left_request: str = "") -> None:
        self.token = lease
        self.left_request = left_request
        """The resource request that the previous driver left, if it died before it could release it."""
        self.lost: Fault | None = None
        """Set once another driver has the run."""
        self._me = this_process()
        self._changing = threading.Lock()
        self._done = threading.Event()
        self._write()
        self._thread = threading.Thread(
            target=self._send_heartbeats, args=(timeout_s / _BEATS_IN_TIMEOUT,), name="driver-lease", daemon=True
        )
        self._thread.start()

    def require_ours(self) -> None:
        """Raises Fault once another driver has the run; if storage cannot be read, the run counts as ours."""
        if self.lost is not None:
            raise self.lost
        with suppress(OSError, UserError):
            self.token.require_held()

    def is_ours(self) -> bool:
        try:
            self.require_ours()
        except Fault:
            return False
        return True

    def note_request(self, request: str) -> None:
        """Stored with the next heartbeat."""
        with self._changing:
            self._me = replace(self._me, request=request)

    def release(self) -> None:
        """The next driver need not wait. Never raises."""
        self._done.set()
        self._thread.join()
        if self.lost is None:
            self._me = replace(self._me, released=True)
            with suppress(OSError, Fault):  # a full disk: the next driver waits a little
                self._write()

    def _send_heartbeats(self, every_s: float) -> None:
        while not self._done.wait(every_s):
            with self._changing:
                self._me = replace(self._me, beat=self._me.beat + 1)
            try:
                self.token.require_held()  # UserError: missing, although it existed when the lease was taken
            except (OSError, UserError):
                continue  # storage does not respond; a driver that takes over meanwhile has a higher number
            except Fault as fault:
                self.lost = fault
                return
            with suppress(OSError, Fault):  # a full disk does not end the run here: the checkpoints' own limit does
                self._write()

    def _write(self) -> None:
        storage, number = self.token.storage, self.token.number
        path = _path(storage, number, ".json")
        write_text_atomically(path, json.dumps(asdict(self._me)))
        storage.upload(path)


@contextmanager
def held(storage: RunStorage, timeout_s: float, log: Callable[[str], None]) -> Iterator[HeldLease]:
    """`take`, released at the end."""
    lease = take(storage, timeout_s, log)
    try:
        yield lease
    finally:
        lease.release()


def take(storage: RunStorage, timeout_s: float, log: Callable[[str], None] = lambda line: None) -> HeldLease:
    """Makes this process the run's driver.

    A driver that released the run or is known to be dead is replaced at once; any other is watched for `timeout_s`.
    Raises UserError if it is alive.
    """
    storage.pull()
    make_folder(storage.folder / _GROUP)
    while True:
        number = _newest(storage)
        holder = _holder(storage, number)
        if number and not _is_over(holder):
            _watch(storage, number, holder, timeout_s, log)
        taken = max(number, newest_lease(storage.folder)) + 1  # also if the folder `driver` was removed
        if storage.create_exclusive(_path(storage, taken, ".lease")):
            break
    for old in range(1, number):
        for suffix in (".lease", ".json"):
            storage.remove(f"{_GROUP}/{_name(old, suffix)}")
    left = "" if holder is None or holder.released else holder.request
    return HeldLease(Lease(storage, taken), timeout_s, left)


def driver_of(storage: RunStorage) -> Holder | None:
    """The holder of the run, unless it was released or its driver is known to be dead."""
    holder = _holder(storage, _newest(storage))
    return None if _is_over(holder) else holder


def this_process() -> Holder:
    return Holder(socket.gethostname(), os.getpid(), _start_of(os.getpid()), namespace=_namespace())


def _watch(
    storage: RunStorage, number: int, before: Holder | None, timeout_s: float, log: Callable[[str], None]
) -> None:
    """Returns when the holder has been silent for `timeout_s`. Raises UserError at its first heartbeat."""
    who = f" (pid {before.pid} on {before.host})" if before else ""
    log(
        f"{storage.location}: another process{who} may still be using this run; waiting up to {timeout_s:g} s for its "
        "heartbeat"
    )
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        time.sleep(min(_LOOK_EVERY_S, timeout_s / _BEATS_IN_TIMEOUT))
        now = _holder(storage, number)
        if _newest(storage) > number or _is_over(now):
            return
        if now is not None and now != before:
            raise UserError(
                f"{storage.location}: another driver is working on this run (pid {now.pid} on {now.host}); "
                "wait for it, stop it, or use another --name"
            )


def _is_over(holder: Holder | None) -> bool:
    """Whether the holder released the run, or was a process of this machine that is gone."""
    if holder is None:
        return False
    here = this_process()
    # Containers of one machine may have its name and its boot id, but their own pids.
    same_boot = holder.process.partition(" ")[0] == here.process.partition(" ")[0] != ""
    same_place = holder.host == here.host and same_boot and holder.namespace == here.namespace != ""
    return holder.released or (same_place and _start_of(holder.pid) != holder.process)


def _start_of(pid: int) -> str:
    """Boot and start time of a process of this namespace; "" if there is none."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else f"{boot} {fields[19]}"


def _namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _holder(storage: RunStorage, number: int) -> Holder | None:
    content = storage.read(f"{_GROUP}/{_name(number, '.json')}")
    try:
        return None if content is None else read_record(Holder, content)
    except ValueError:
        return None


def _newest(storage: RunStorage) -> int:
    stems = [name.removesuffix(".lease") for name in storage.names(_GROUP) if name.endswith(".lease")]
    return max((int(stem) for stem in stems if stem.isascii() and stem.isdecimal()), default=0)


def _path(storage: RunStorage, number: int, suffix: str) -> Path:
    return storage.folder / _GROUP / _name(number, suffix)


def _name(number: int, suffix: str) -> str:
    return f"{number:05d}{suffix}"


@dataclass(frozen=True)
class FencedStorage:
    """A run's storage as its workers write to it. `commit` and `remove` refuse workers whose driver was replaced, and
    `commit` retries while storage is full or unreachable. Everything else is `inner`'s.
    """

    inner: RunStorage
    lease: Lease
    limit_s: float
    """Longest time to try."""
    warn: Callable[[str], object]
    give_up: Callable[[str], object] = lambda why: None
    """Called with the reason why a checkpoint will never be written: a restart of the workers would not help."""
    heartbeat: Callable[[], object] = lambda: None
    """Called before every new try: waiting for storage is no hang."""

    def commit(self, name: str, write: Callable[[Path], None], last: str) -> None:
        """Raises Fault after the limit, or if another driver has the run."""
        what, began_s, warned = f"{self.inner.location}/{name}", time.monotonic(), False
        while True:
            try:
                self._commit_once(name, write, last)
                break
            except OSError as error:  # a full disk, a quota, a store that does not respond
                reason = error.strerror or str(error)
            except Fault as fault:
                self.give_up(str(fault))
                raise
            if time.monotonic() - began_s + _RETRY_S > self.limit_s:
                why = (
                    f"{what} could not be written for {self.limit_s:g} s (failure.storage_timeout_s): {reason}; free "
                    "some space or repair it, and run the same command again: it resumes from the checkpoint before"
                )
                self.give_up(why)
                raise Fault(why)
            if not warned:
                limit = f"tried again for up to {self.limit_s:g} s, training continues"
                self.warn(f"{what} cannot be written: {reason}; {limit}")
                warned = True
            self.heartbeat()
            time.sleep(_RETRY_S)
        if warned:
            self.warn(f"{what} has been written")

    def _commit_once(self, name: str, write: Callable[[Path], None], last: str) -> None:
        try:
            self.lease.require_held()
        except UserError as error:  # it existed when the worker began: perhaps it is being mounted again
            raise OSError(str(error)) from None
        self.inner.commit(name, write, last)

    def remove(self, name: str) -> None:
        """Raises Fault if another driver has the run; if storage does not respond, the run counts as ours."""
        with suppress(OSError, UserError):
            self.lease.require_held()
        self.inner.remove(name)

    # Not fenced: what reads, and the small files that a worker writes, whose names no other worker uses. One by one
    # instead of by `__getattr__`, so that a new method of `RunStorage` is a type error until it is decided here.

    @property
    def location(self) -> str:
        return self.inner.location

    @property
    def folder(self) -> Path:
        return self.inner.folder

    @property
    def sync_every_s(self) -> float:
        return self.inner.sync_every_s

    def names(self, group: str = "") -> list[str]:
        return self.inner.names(group)

    def fetched(self, name: str) -> AbstractContextManager[Path]:
        return self.inner.fetched(name)

    def read(self, name: str) -> bytes | None:
        return self.inner.read(name)

    def pull(self, group: str = "") -> None:
        self.inner.pull(group)

    def require_writable(self) -> None:
        self.inner.require_writable()

    def upload(self, path: Path) -> None:
        self.inner.upload(path)

    def create_exclusive(self, path: Path) -> bool:
        return self.inner.create_exclusive(path)

    def extended(self, path: Path, num_bytes: int) -> None:
        self.inner.extended(path, num_bytes)
