"""A training worker's tracking: it logs to a spool, and a thread sends the spool to MLflow."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from data_prep.redaction import redacted, redacted_values
from resnet_dist.errors import Fault
from resnet_dist.storage.base import RunStorage
from resnet_dist.storage.folder import as_storage
from resnet_dist.tracking.spool import Spool, artifact_path, sendable, spool_folder
from resnet_dist.tracking.sync import (
    Delivery,
    MlflowTransport,
    Superseded,
    Unavailable,
    backoff_s,
    upload_rejected,
)

CONFUSION = "evaluation/confusion.json"
"""The text that holds the last evaluation's confusion matrix: {"num_classes": C, "counts": [[true class, predicted
class, samples], ...]}, only where there are samples."""
_STORAGE_LIMIT_S = 10.0
_HURRIED_BACKOFF_S = 1.0
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


class SpoolTracker(Tracker):
    """`metrics`, `tags` and `text` put a line in memory (0.1 ms): no disk, no network, no fault. Thread-safe.

    Replayed steps are left out as `resnet_dist.tracking.spool.unseen` says.
    """

    def __init__(
        self,
        storage: RunStorage | Path,
        run_id: str,
        tracking_uri: str,
        *,
        lease: int | None = None,
        writer: str = "",
        close_limit_s: float = 10.0,
        max_backoff_s: float = 30.0,
        warn: Callable[[str], object] = _log.warning,
    ) -> None:
        """Opens the run's spool and starts the thread.

        Args:
            storage: the run's, the same for every attempt (a path: that folder).
            run_id: from `open_run`.
            lease: number of the driver's lease. A worker of an older one can neither open the spool nor send. None: the
            lease under which it was last opened.
            writer: as in `spool_folder`, for workers other than rank 0.
            close_limit_s: the longest time that `close` waits for the server.
            max_backoff_s: the longest pause between two attempts to reach an unreachable server.
            warn: called when an outage begins and when it is over.

        Raises Fault if storage cannot be written, or if a driver with a newer lease has resumed the run.
        """
        self._changed = threading.Condition()
        self._storage = as_storage(storage)
        self._folder = folder = spool_folder(self._storage.folder, run_id, writer)
        try:
            self._spool = Spool(folder, self._storage, lease=lease, on_durable=self._wake)
        except OSError as error:
            raise Fault(f"{folder}: the metrics of this run cannot be kept there: {error}") from error
        self._delivery = Delivery(folder, MlflowTransport(tracking_uri, run_id), may_send=self._spool.is_newest)
        self._close_limit_s = close_limit_s
        self._max_backoff_s = max_backoff_s
        self._warn = warn
        self._sent_bytes = 0
        """Everything up to this byte of the spool's file is at the server."""
        self._num_waiting = 0
        """Calls of `flush` in progress."""
        self._stopping = False
        self._ended = False
        self._thread = threading.Thread(target=self._send, name="mlflow-sender", daemon=True)
        self._thread.start()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self._spool.append_metrics({key: float(value) for key, value in values.items()}, int(step))

    def tags(self, values: Mapping[str, str]) -> None:
        if values:
            self._spool.append_tags({sendable(k): sendable(v) for k, v in redacted_values(values).items()})

    def text(self, path: str, content: str) -> None:
        """Raises ValueError for a path that is not inside the run's artifacts: MLflow would never accept it."""
        self._spool.append_text(sendable(artifact_path(path)), sendable(redacted(content)))

    def persist(self, timeout_s: float) -> bool:
        """Waits until everything logged so far is in storage. False if that took longer."""
        return self._spool.persist(timeout_s)

    def flush(self, timeout_s: float) -> bool:
        return self._spool.persist(timeout_s) and self._drain(timeout_s)

    def close(self) -> None:
        """Waits at most some seconds for storage and `close_limit_s` for the server; safe to call twice."""
        if self._spool.close(_STORAGE_LIMIT_S):
            self._drain(self._close_limit_s)
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join(1.0)  # a request under way ends with the process
        with suppress(OSError):  # `sync` then finds what MLflow refuses again
            upload_rejected(self._storage, self._folder)

    def _drain(self, timeout_s: float) -> bool:
        """Waits until the server has everything that is in storage. False on timeout or if the thread has ended."""
        with self._changed:
            num_bytes = self._spool.durable_bytes
            self._num_waiting += 1
            self._changed.notify_all()
            try:
                self._changed.wait_for(lambda: self._sent_bytes >= num_bytes or self._ended, timeout_s)
            finally:
                self._num_waiting -= 1
            return self._sent_bytes >= num_bytes

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _send(self) -> None:
        """The thread. Training continues whatever happens here, and the spool has the events."""
        try:
            self._send_until_stopped()
        except Superseded:
            _log.warning("%s: another process has taken over this run; this one sends no more", self._spool.path)
        except Exception:  # noqa: BLE001 - see above
            _log.exception(
                "%s: the sender has ended; send the rest with `resnet-dist tracking sync RUN --tracking-uri URI`",
                self._spool.path,
            )
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _send_until_stopped(self) -> None:
        num_failures = 0
        while self._wait_for_work(num_failures):
            num_bytes = self._spool.durable_bytes
            try:
                self._delivery.send_all(num_bytes, proceed=lambda: not self._stopping)
            except (Unavailable, OSError) as error:
                if not num_failures:
                    self._warn(
                        f"MLflow does not accept metrics ({error}); training continues and keeps them until it does"
                    )
                num_failures += 1
                continue
            if num_failures:
                self._warn("MLflow accepts metrics again; all that was kept has arrived")
            num_failures = 0
            with self._changed:
                self._sent_bytes = self._sent_bytes if self._stopping else num_bytes
                self._changed.notify_all()

    def _wait_for_work(self, num_failures: int) -> bool:
        """Returns when there may be something to send; False when the thread shall end."""
        with self._changed:
            if not num_failures:
                self._changed.wait_for(lambda: self._stopping or self._spool.durable_bytes > self._sent_bytes)
                return not self._stopping
            # Only a caller that waits for the end cuts the pause short; then it tries about once a second.
            pause_s = backoff_s(num_failures, random.random(), self._max_backoff_s)
            if not self._num_waiting:
                self._changed.wait_for(lambda: self._stopping or self._num_waiting, pause_s)
            if self._num_waiting:
                self._changed.wait_for(lambda: self._stopping, min(pause_s, _HURRIED_BACKOFF_S))
            return not self._stopping
