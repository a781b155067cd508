"""`result.json`: written last of all into the run's folder; its presence means that the run is complete."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from resnet_dist.config.records import read_record
from resnet_dist.errors import Fault
from resnet_dist.storage.base import RunStorage
from resnet_dist.tracking.small_files import write_json

_RESULT = "result.json"


@dataclass(frozen=True)
class RunResult:
    name: str
    run_dir: str
    run_id: str
    """MLflow's."""
    tracking_uri: str
    model_uri: str
    checkpoint: str
    step: int
    metrics: Mapping[str, float]


def read_result(storage: RunStorage) -> RunResult | None:
    """What the run's end wrote, with the places where the run's files are now: its folder may have been moved."""
    content = storage.read(_RESULT)
    if content is None:
        return None
    try:
        result = read_record(RunResult, content)
    except ValueError as error:
        raise Fault(f"{storage.location}/{_RESULT}: is damaged ({error}); delete it and run again") from None
    checkpoint = f"{storage.location}/{result.checkpoint.rpartition('/')[2]}"
    return replace(result, run_dir=storage.location, checkpoint=checkpoint)


def write_result(storage: RunStorage, result: RunResult) -> None:
    write_json(storage.folder / _RESULT, asdict(result))
    storage.publish(storage.folder / _RESULT)
