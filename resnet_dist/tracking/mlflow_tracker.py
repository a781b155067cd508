"""The tracker of rank 0: a spool in the run's folder and the sender that empties it into MLflow."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from data_prep.redaction import redacted, redacted_values
from resnet_dist.errors import Fault
from resnet_dist.storage.base import RunStorage
from resnet_dist.storage.folder import FolderStorage
from resnet_dist.tracking.delivery import LANES, Delivery, publish_lanes
from resnet_dist.tracking.events import artifact_path, sendable
from resnet_dist.tracking.segments import spool_folder
from resnet_dist.tracking.sender import Sender
from resnet_dist.tracking.spool import Spool
from resnet_dist.tracking.transport import MlflowTransport, Transport



class SpoolTracker:
    """Implements `Tracker`. `metrics`, `tags` and `text` cost some ten microseconds: no disk, no network, no fault.

    Thread-safe. Replayed steps are left out as `resnet_dist.tracking.events.unseen` says.
    """

    def __init__(
        self,
        storage: RunStorage | Path,
        run_id: str,
        tracking_uri: str,
        *,
        writer: str = "",
        close_limit_s: float = 10.0,
        max_backoff_s: float = 30.0,
        warn: Callable[[str], object] = _log.warning,
    ) -> None:
        """`storage`: the run's, the same for every attempt (a path: that folder); `run_id`: from `open_run`; `writer`:
        as in `spool_folder`, for whoever logs besides rank 0.

        `close_limit_s`: the longest that `close` waits for the server. `warn` hears of its outages.

        Raises Fault if storage cannot be written.
        """
        self._storage = FolderStorage(storage) if isinstance(storage, Path) else storage
        self._folder = folder = spool_folder(self._storage.folder, run_id, writer)
        try:
            self._spool = Spool(folder, self._storage)
        except OSError as error:
            raise Fault(f"{folder}: the metrics of this run cannot be kept there: {error}") from error
        self._close_limit_s = close_limit_s
        transport: Transport = MlflowTransport(tracking_uri, run_id)
        deliveries = [Delivery(folder, lane, transport, may_send=self._spool.is_newest) for lane in LANES]
        self._sender = Sender(self._spool, deliveries, max_backoff_s=max_backoff_s, warn=warn)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self._spool.append_metrics({key: float(value) for key, value in values.items()}, int(step))

    def tags(self, values: Mapping[str, str]) -> None:
        if values:
            self._spool.append_tags({sendable(k): sendable(v) for k, v in redacted_values(values).items()})

    def text(self, path: str, content: str) -> None:
        """Raises ValueError for a path that is not inside the run's artifacts: MLflow would refuse it for ever."""
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
        with suppress(OSError):  # then everything is sent again, which changes nothing
            publish_lanes(self._storage, self._folder)
