"""`result.json`: written last of all into the run's folder; its presence means that the run is complete."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from resnet_dist.errors import Fault

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
    path = run_dir / _FILE
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(asdict(result), indent=2, sort_keys=True))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
