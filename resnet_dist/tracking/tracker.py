"""What a training worker knows of tracking: five methods, none of which waits for a network."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from data_prep.redaction import redacted, redacted_values
from resnet_dist.errors import Fault
from resnet_dist.storage.base import RunStorage
from resnet_dist.storage.folder import as_storage
from resnet_dist.tracking.spool import Spool, artifact_path, sendable, spool_folder
from resnet_dist.tracking.sync import Delivery, MlflowTransport, Superseded, Unavailable, backoff_s, publish_rejected

_log = logging.getLogger(__name__)
_HURRIED_BACKOFF_S = 1.0
CONFUSION = "evaluation/confusion.json"
"""The text that holds the last evaluation's confusion matrix: {"num_classes": C, "counts": [[true class, answer,
samples], ...]}, only where there are samples."""


class Tracker(Protocol):
    """Rank 0 holds a `SpoolTracker`, every other rank a `NullTracker`."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Points of curves; `step` counts optimizer steps. A (key, step) that was logged before is left out."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Tags of the run; a later value replaces an earlier one."""

    def text(self, artifact_path: str, content: str) -> None:
        """A small text artifact, for example `recipe.yaml`; a later one replaces an earlier one of the same path."""

    def flush(self, timeout_s: float) -> bool:
        """Waits until everything has arrived at the server, at most `timeout_s`. True when it has."""

    def close(self) -> None:
        """Ends the tracker. What has not arrived by then stays in storage for `resnet-dist tracking sync`."""


class NullTracker:
    """Keeps nothing: the tracker of every rank but 0."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        pass

    def tags(self, values: Mapping[str, str]) -> None:
        pass

    def text(self, artifact_path: str, content: str) -> None:
        pass

    def flush(self, timeout_s: float) -> bool:
        return True

    def close(self) -> None:
        pass


class Sender:
    """The thread that brings a growing spool to the server; training never waits for it or fails because of it."""

    def __init__(
        self,
        spool: Spool,
        delivery: Delivery,
        *,
        max_backoff_s: float = 30.0,
        warn: Callable[[str], object] = _log.warning,
    ) -> None:
        """`warn` is called when an outage begins and when it is over."""
        self._spool = spool
        self._delivery = delivery
        self._max_backoff_s = max_backoff_s
        self._warn = warn
        self._changed = threading.Condition()
        self._sent_bytes = 0
        """Everything up to this byte of the spool's file is at the server."""
        self._num_waiting = 0
        self._stopping = False
        self._ended = False
        spool.on_durable = self._wake
        self._thread = threading.Thread(target=self._run, name="mlflow-sender", daemon=True)
        self._thread.start()

    def drain(self, timeout_s: float) -> bool:
        """Waits until the server has everything that is in storage. False on timeout or if the sender has ended."""
        with self._changed:
            num_bytes = self._spool.durable_bytes
            self._num_waiting += 1
            self._changed.notify_all()
            try:
                self._changed.wait_for(lambda: self._sent_bytes >= num_bytes or self._ended, timeout_s)
            finally:
                self._num_waiting -= 1
            return self._sent_bytes >= num_bytes

    def close(self, timeout_s: float) -> None:
        """Stops the thread; a request under way is given up after `timeout_s` (the thread ends with the process)."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join(timeout_s)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            self._send_until_stopped()
        except Superseded:
            _log.warning("%s: another process has taken over this run; this one sends no more", self._spool.path)
        except Exception:  # noqa: BLE001 - training continues whatever happens here, and the spool has the events
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
                        f"MLflow does not take metrics ({error}); training continues and keeps them until it does"
                    )
                num_failures += 1
                continue
            if num_failures:
                self._warn("MLflow takes metrics again; all that was kept has arrived")
            num_failures = 0
            with self._changed:
                self._sent_bytes = self._sent_bytes if self._stopping else num_bytes
                self._changed.notify_all()

    def _wait_for_work(self, num_failures: int) -> bool:
        """Returns when there may be something to send; False when the thread shall end."""
        with self._changed:
            if num_failures:
                # Woken early only by someone who waits for the end; then it tries about once a second.
                pause_s = backoff_s(num_failures, random.random(), self._max_backoff_s)
                if not self._num_waiting:
                    self._changed.wait_for(lambda: self._stopping or self._num_waiting, pause_s)
                if self._num_waiting:
                    self._changed.wait_for(lambda: self._stopping, min(pause_s, _HURRIED_BACKOFF_S))
            else:
                self._changed.wait_for(lambda: self._stopping or self._spool.durable_bytes > self._sent_bytes)
            return not self._stopping


class SpoolTracker:
    """Implements `Tracker`. `metrics`, `tags` and `text` cost some ten microseconds: no disk, no network, no fault.

    Thread-safe. Replayed steps are left out as `resnet_dist.tracking.spool.unseen` says.
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
        """Args:
            storage: the run's, the same for every attempt (a path: that folder).
            run_id: from `open_run`.
            lease: number of the driver's lease: whoever works for an older one can neither open the spool nor send.
                None: that of whoever opened it last.
            writer: as in `spool_folder`, for whoever logs besides rank 0.
            close_limit_s: the longest time that `close` waits for the server.
            warn: called when an outage begins and when it is over.

        Raises Fault if storage cannot be written, or if a driver with a newer lease has taken over.
        """
        self._storage = as_storage(storage)
        self._folder = folder = spool_folder(self._storage.folder, run_id, writer)
        try:
            self._spool = Spool(folder, self._storage, lease=lease)
        except OSError as error:
            raise Fault(f"{folder}: the metrics of this run cannot be kept there: {error}") from error
        self._close_limit_s = close_limit_s
        delivery = Delivery(folder, MlflowTransport(tracking_uri, run_id), may_send=self._spool.is_newest)
        self._sender = Sender(self._spool, delivery, max_backoff_s=max_backoff_s, warn=warn)

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
        return self._spool.persist(timeout_s) and self._sender.drain(timeout_s)

    def close(self) -> None:
        """Waits at most some seconds for storage and `close_limit_s` for the server; safe to call twice."""
        if self._spool.close(timeout_s=10.0):
            self._sender.drain(self._close_limit_s)
        self._sender.close(timeout_s=1.0)
        with suppress(OSError):  # `sync` then finds out again what MLflow refuses
            publish_rejected(self._storage, self._folder)
