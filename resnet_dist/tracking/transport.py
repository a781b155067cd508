"""MLflow as the sender of a spool sees it: two calls, and two ways in which they fail."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from resnet_dist.tracking.batches import Batch
from resnet_dist.tracking.reasons import first_line, root_reason
from resnet_dist.tracking.store import connect
from resnet_dist.tracking.uris import sqlite_file

if TYPE_CHECKING:
    from mlflow import MlflowClient


class Unavailable(Exception):
    """The batch was not taken now; the same batch may be taken later."""


class Refused(Exception):
    """The server answered, the run is in order, and the content itself is not acceptable: it never will be."""


class Transport(Protocol):
    def newest_steps(self) -> dict[str, int]:
        """Newest step of every metric of the run at the server. Raises Unavailable."""

    def send(self, batch: Batch) -> None:
        """Returns once the server has the batch; sending it twice changes nothing. Raises Unavailable, Refused."""


class MlflowTransport:
    """Sends to one MLflow run. Imports mlflow (seconds) at the first call, not before."""

    def __init__(self, tracking_uri: str, run_id: str) -> None:
        self._tracking_uri = tracking_uri
        self._run_id = run_id
        self._client: MlflowClient | None = None

    def newest_steps(self) -> dict[str, int]:
        try:
            # RunData.metrics has values without steps; its protobuf form carries the latest point of each key whole.
            proto = self._connected().get_run(self._run_id).data.to_proto()
            return {metric.key: metric.step for metric in proto.metrics}
        except Exception as error:
            raise Unavailable(root_reason(error)) from error

    def send(self, batch: Batch) -> None:
        from mlflow.entities import Metric, RunTag
        from mlflow.exceptions import MlflowException

        try:
            client = self._connected()
            if batch.text is not None:
                client.log_text(self._run_id, batch.text.content, batch.text.path)
            else:
                client.log_batch(
                    self._run_id,
                    metrics=[Metric(p.key, p.value, p.time_ms, p.step) for p in batch.points],
                    tags=[RunTag(key, value) for key, value in batch.tags],
                    synchronous=True,
                )
        except MlflowException as error:
            if error.error_code == "INVALID_PARAMETER_VALUE" and self._run_is_active():
                raise Refused(first_line(error)) from error
            raise Unavailable(root_reason(error)) from error
        except Exception as error:
            if getattr(getattr(error, "response", None), "status_code", None) == 400:  # the artifact service
                raise Refused(first_line(error)) from error
            raise Unavailable(root_reason(error)) from error

    def _run_is_active(self) -> bool:
        """A deleted run answers with the code of invalid content; it can be restored, and then takes everything."""
        try:
            return self._connected().get_run(self._run_id).info.lifecycle_stage == "active"
        except Exception as error:
            raise Unavailable(root_reason(error)) from error

    def _connected(self) -> MlflowClient:
        if self._client is None:
            database = sqlite_file(self._tracking_uri)
            if database and not database.exists():  # mlflow would make a new, empty one
                raise Unavailable(f"{database} is not on this node")
            self._client = connect(self._tracking_uri)
        return self._client
