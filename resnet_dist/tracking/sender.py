"""The background thread that brings a living spool to the server, and never makes training wait or fail."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Sequence

from resnet_dist.tracking.delivery import Delivery, Superseded, backoff_s
from resnet_dist.tracking.spool import Spool
from resnet_dist.tracking.transport import Unavailable

_log = logging.getLogger(__name__)
_HURRIED_BACKOFF_S = 1.0


class Sender:
    def __init__(
        self,
        spool: Spool,
        deliveries: Sequence[Delivery],
        *,
        max_backoff_s: float = 30.0,
        warn: Callable[[str], object] = _log.warning,
    ) -> None:
        """`warn` hears when an outage begins and when it is over."""
        self._warn = warn
        self._spool = spool
        self._deliveries = deliveries
        self._max_backoff_s = max_backoff_s
        self._changed = threading.Condition()
        self._acknowledged_seq = min(delivery.acknowledged_seq for delivery in deliveries)
        self._num_waiting = 0
        self._stopping = False
        self._ended = False
        spool.on_durable = self._wake
        self._thread = threading.Thread(target=self._run, name="mlflow-sender", daemon=True)
        self._thread.start()

    def drain(self, timeout_s: float) -> bool:
        """Waits until everything durable in the spool is acknowledged. False on timeout or if the sender has ended."""
        with self._changed:
            seq = self._spool.durable[0]
            self._num_waiting += 1
            self._changed.notify_all()
            try:
                self._changed.wait_for(lambda: self._acknowledged_seq >= seq or self._ended, timeout_s)
            finally:
                self._num_waiting -= 1
            return self._acknowledged_seq >= seq

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
        except Exception:  # noqa: BLE001 - training goes on whatever happens here, and the spool has the events
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
            errors = [error for delivery in self._deliveries if (error := self._send_waiting(delivery))]
            if errors and not num_failures:
                self._warn(
                    f"MLflow does not take metrics ({errors[0]}); training continues and keeps them until it does"
                )
            if num_failures and not errors:
                self._warn("MLflow takes metrics again; all that was kept has arrived")
            num_failures = num_failures + 1 if errors else 0

    def _send_waiting(self, delivery: Delivery) -> Exception | None:
        """Sends what waits in one lane; what stopped it, if anything did."""
        try:
            while not self._stopping and delivery.send_next(self._spool.durable[1]):
                self._note_progress()
            self._note_progress()
        except (Unavailable, OSError) as error:
            return error
        return None

    def _wait_for_work(self, num_failures: int) -> bool:
        """Returns when there may be something to send; False when the thread shall end."""
        with self._changed:
            if num_failures:
                # Woken early only by someone who waits for the end; then tried about once a second.
                pause_s = backoff_s(num_failures, random.random(), self._max_backoff_s)
                if not self._num_waiting:
                    self._changed.wait_for(lambda: self._stopping or self._num_waiting, pause_s)
                if self._num_waiting:
                    self._changed.wait_for(lambda: self._stopping, min(pause_s, _HURRIED_BACKOFF_S))
            else:
                self._changed.wait_for(lambda: self._stopping or self._num_unsent() > 0)
            return not self._stopping

    def _num_unsent(self) -> int:
        return self._spool.durable[0] - min(delivery.acknowledged_seq for delivery in self._deliveries)

    def _note_progress(self) -> None:
        with self._changed:
            self._acknowledged_seq = min(delivery.acknowledged_seq for delivery in self._deliveries)
            self._changed.notify_all()
