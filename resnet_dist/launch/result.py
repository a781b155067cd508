"""`result.json`: written last of all into the run's folder; its presence means that the run is complete."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from resnet_dist.errors import Fault
from resnet_dist.tracking.small_files import write_json

_FILE = "result.json"


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


def read_result(run_dir: Path) -> RunResult | None:
    path = run_dir / _FILE
    if not path.is_file():
        return None
    try:
        return RunResult(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise Fault(f"{path}: is damaged ({error}); delete it and run the same command again") from None


def write_result(run_dir: Path, result: RunResult) -> None:
    write_json(run_dir / _FILE, asdict(result))
