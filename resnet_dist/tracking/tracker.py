"""What a training logs to. Rank 0's tracker appends to a spool; one thread writes it, another sends it to MLflow."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from data_prep.redaction import redacted, redacted_values
from resnet_dist.errors import Fault
from resnet_dist.storage.base import RunStorage
from resnet_dist.storage.folder import FolderStorage, as_storage
from resnet_dist.tracking.spool import (
    Event,
    Metrics,
    Opened,
    Tags,
    Text,
    artifact_path,
    encode,
    file_number,
    sendable,
    spool_files,
    spool_folder,
)
from resnet_dist.tracking.sync import Delivery, MlflowTransport, Unavailable, backoff_s, upload_rejected

CONFUSION = "evaluation/confusion.json"
"""The text that holds the last evaluation's confusion matrix: {"num_classes": C, "counts": [[true class, predicted
class, samples], ...]}, only where there are samples."""
_RETRY_WRITE_S = 1.0
# How long `close` waits for each.
_STORAGE_LIMIT_S = 10.0
_SERVER_LIMIT_S = 10.0
_log = logging.getLogger(__name__)


class Tracker:
    """Five methods, none of which waits for the network. This class keeps nothing: it is the tracker of every rank but
    0, which has a `SpoolTracker`.
    """

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Points of curves; `step` counts optimizer steps. A (key, step) that was logged before is left out."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Tags of the run; a later value replaces an earlier one."""

    def text(self, path: str, content: str) -> None:
        """A small text artifact, for example `recipe.yaml`; a later one replaces an earlier one of the same path."""

    def flush(self, timeout_s: float) -> bool:
        """Waits until everything has arrived at the server, at most `timeout_s`. True when it has."""
        return True

    def close(self) -> None:
        """Ends the tracker. What has not arrived by then stays in storage for `resnet-dist tracking sync`."""


class Spool(Tracker):
    """Keeps everything in storage, and sends nothing.

    `metrics`, `tags` and `text` put a line in memory (0.1 ms): no disk, no network, no fault. Thread-safe. A thread
    puts the lines in storage every `sync_every_s`: no more than those of the last second (five in an object store) are
    lost with the process or the machine. While storage is full or unreachable, lines stay in memory.
    """

    def __init__(self, folder: Path, storage: RunStorage | None = None, *, lease: int | None = None) -> None:
        """Opens a new file of the spool.

        Args:
            folder: the spool, inside `storage.folder`; without `storage`, it is the storage.
            lease: number of the driver's lease. None: that of the newest file.

        Raises Fault if a driver with a newer lease has opened the spool, OSError if storage cannot be written.
        """
        self._folder = folder
        self._storage = storage or FolderStorage(folder)
        self._group = str(folder.relative_to(self._storage.folder))
        folder.mkdir(parents=True, exist_ok=True)
        # Create first, then measure: lines that an older writer appends after its successor exists do not count.
        self.path = self._create_file(lease)
        self._storage.pull(self._group)  # only this: each of a thousand nodes opens a spool of its own
        kept = {path.stem: path.stat().st_size if size is None else size for path, size in spool_files(folder)}
        self._changed = threading.Condition()
        self._lines = [encode(Opened(_now_ms(), socket.gethostname(), os.getpid(), kept))]
        self._num_bytes = len(self._lines[0])
        """Of all lines so far."""
        self._wanted_bytes = 0
        """Somebody waits until so many are in storage."""
        self.durable_bytes = 0
        """So many are in storage."""
        self._closing = False
        self._unwritten = bytearray()
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        self._write()
        self._writer = threading.Thread(target=self._write_until_closed, name="spool-writer", daemon=True)
        self._writer.start()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self._append(Metrics(_now_ms(), int(step), {key: float(value) for key, value in values.items()}))

    def tags(self, values: Mapping[str, str]) -> None:
        self._append(Tags(_now_ms(), {sendable(k): sendable(v) for k, v in redacted_values(values).items()}))

    def text(self, path: str, content: str) -> None:
        """Raises ValueError for a path that is not inside the run's artifacts: MLflow would never accept it."""
        self._append(Text(_now_ms(), sendable(artifact_path(path)), sendable(redacted(content))))

    def persist(self, timeout_s: float) -> bool:
        """Waits until everything logged so far is in storage. False if that took longer than `timeout_s`."""
        num_bytes = self._wanted_bytes = self._num_bytes
        self._wake()
        return self._wait(lambda: self.durable_bytes >= num_bytes, timeout_s)

    def flush(self, timeout_s: float) -> bool:
        return self.persist(timeout_s)

    def is_newest(self) -> bool:
        """False once another writer has opened the spool: from then on this one must send nothing."""
        return self._newest_number() == file_number(self.path.name)

    def close(self) -> None:
        """Waits at most some seconds until everything is in storage; safe to call twice."""
        is_kept = self.persist(_STORAGE_LIMIT_S)
        self._closing = True
        self._wake()
        self._writer.join(_STORAGE_LIMIT_S if is_kept else 0.0)
        if not is_kept:
            _log.error("%s: storage did not accept the last lines within %.0f s", self.path, _STORAGE_LIMIT_S)

    def _append(self, event: Event) -> None:
        line = encode(event)
        with self._changed:
            if self._closing:
                raise RuntimeError(f"{self.path}: the spool is closed")
            self._lines.append(line)
            self._num_bytes += len(line)

    def _create_file(self, lease: int | None) -> Path:
        """A new file after all others, created exclusively by this process."""
        while True:
            newest_lease, newest = self._newest_number()
            if lease is not None and lease < newest_lease:
                raise Fault(f"{self._folder}: another driver has taken over this run; this one ends")
            number = newest + 1 if lease in (None, newest_lease) else 1
            path = self._folder / f"{newest_lease if lease is None else lease:05d}-{number:05d}.jsonl"
            if self._storage.create_exclusive(path):
                return path

    def _newest_number(self) -> tuple[int, int]:
        """Of all files in storage, including those of other machines."""
        names = self._storage.names(self._group)
        return max((number for name in names if (number := file_number(name)) is not None), default=(0, 0))

    def _write_until_closed(self) -> None:
        """What the first thread does; storage that fails is tried again every second."""
        failing = closing = False
        while not closing:
            if failing:
                self._wait(lambda: self._closing, _RETRY_WRITE_S)
            else:
                self._wait(self._is_awaited, self._storage.sync_every_s)
            closing = self._closing  # read before writing: what was logged before `close` is written
            try:
                self._write()
                if failing:
                    _log.warning("%s: can be written again", self.path)
                failing = False
            except OSError as error:
                if not failing:
                    _log.warning("%s: cannot be written (%s); lines wait in memory", self.path, error)
                failing = True
        os.close(self._file)

    def _write(self) -> None:
        """Puts all lines in storage. Raises OSError; the rest waits for the next call."""
        with self._changed:
            self._unwritten += b"".join(self._lines)
            self._lines.clear()
            num_bytes = self._num_bytes
        while self._unwritten:
            del self._unwritten[: os.write(self._file, self._unwritten)]
        if num_bytes > self.durable_bytes:
            self._storage.extended(self.path, num_bytes)
            self.durable_bytes = num_bytes
            self._wake()

    def _is_awaited(self) -> bool:
        return self._closing or self._wanted_bytes > self.durable_bytes

    def _wait(self, condition: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Until `condition` is true; it is evaluated at every `_wake`. False on timeout."""
        with self._changed:
            return self._changed.wait_for(condition, timeout_s)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()


class SpoolTracker(Spool):
    """A spool whose content a second thread sends to MLflow, at once or when the server responds again."""

    def __init__(
        self,
        storage: RunStorage | Path,
        run_id: str,
        tracking_uri: str,
        *,
        lease: int | None = None,
        writer: str = "",
        warn: Callable[[str], object] = _log.warning,
    ) -> None:
        """Opens the run's spool and starts the threads.

        Args:
            storage: the run's, the same for every attempt (a path: that folder).
            run_id: from `open_run`.
            lease: number of the driver's lease. A worker of an older one can neither open the spool nor send. None: the
            lease under which it was last opened.
            writer: as in `spool_folder`, for workers other than rank 0.
            warn: called when an outage begins and when it is over.

        Raises Fault if storage cannot be written, or if a driver with a newer lease has resumed the run.
        """
        storage = as_storage(storage)
        folder = spool_folder(storage.folder, run_id, writer)
        try:
            super().__init__(folder, storage, lease=lease)
        except OSError as error:
            raise Fault(f"{folder}: the metrics of this run cannot be kept there: {error}") from error
        self._delivery = Delivery(folder, MlflowTransport(tracking_uri, run_id), lambda: self.durable_bytes)
        self._warn = warn
        self._sent_bytes = 0
        """Everything up to this byte of this writer's file is at the server."""
        self._stopping = False
        self._sender = threading.Thread(target=self._send, name="mlflow-sender", daemon=True)
        self._sender.start()

    def flush(self, timeout_s: float) -> bool:
        return self.persist(timeout_s) and self._wait_until_sent(timeout_s)

    def close(self) -> None:
        """Waits at most some seconds for storage and for the server; safe to call twice."""
        super().close()
        self._wait_until_sent(_SERVER_LIMIT_S)
        self._stop()
        self._sender.join(1.0)  # a request under way ends with the process
        with suppress(OSError):  # `sync` then finds what MLflow refuses again
            upload_rejected(self._storage, self._folder)

    def _wait_until_sent(self, timeout_s: float) -> bool:
        """Waits until the server has everything that is in storage. False on timeout or if the sender has stopped."""
        num_bytes = self.durable_bytes
        self._wait(lambda: self._stopping or self._sent_bytes >= num_bytes, timeout_s)
        return self._sent_bytes >= num_bytes

    def _stop(self) -> None:
        self._stopping = True
        self._wake()

    def _send(self) -> None:
        """What the second thread does. Training continues whatever happens here, and the spool has the events."""
        try:
            self._send_until_stopped()
        except Exception:  # noqa: BLE001 - see above
            _log.exception(
                "%s: the sender has ended; send the rest with `resnet-dist tracking sync RUN --tracking-uri URI`",
                self.path,
            )
        self._stop()

    def _send_until_stopped(self) -> None:
        num_failures = 0
        while True:
            if num_failures:
                self._wait(lambda: self._stopping, backoff_s(num_failures))
            else:
                self._wait(lambda: self._stopping or self.durable_bytes > self._sent_bytes)
            if self._stopping:
                return
            num_bytes = self.durable_bytes
            try:
                is_all = self._delivery.send_all(proceed=lambda: not self._stopping and self.is_newest())
            except (Unavailable, OSError) as error:
                if not num_failures:
                    self._warn(
                        f"MLflow does not accept metrics ({error}); training continues and keeps them until it does"
                    )
                num_failures += 1
                continue
            if not is_all:
                if not self._stopping:
                    _log.warning("%s: another process has taken over this run; this one sends no more", self.path)
                return
            if num_failures:
                self._warn("MLflow accepts metrics again; all that was kept has arrived")
            num_failures = 0
            self._sent_bytes = num_bytes
            self._wake()


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
