"""The runs of an experiment as rows, and two of them side by side: what `resnet-dist runs` shows."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data_prep.shown import shown
from resnet_dist.errors import UserError
from resnet_dist.tracking.experiment_view import view_tags
from resnet_dist.tracking.sqlite_store import ARTIFACTS
from resnet_dist.tracking.uris import sqlite_file
from resnet_dist.tracking.server import require_answer
from resnet_dist.tracking.store import connect, mlflow_faults

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # MLflow's pages for training, not for agents
_MAX_RUNS = 1000
_MAX_NAMED = 20
_COMPARED_TAGS = ("data_digest", "hardware", "workers", "restarts", "resizes", "mlflow.source.git.commit", "git.dirty")


def viewed_experiment_id(client: MlflowClient, name: str, tracking_uri: str) -> str:
    experiment = find_or_create_experiment(client, name, tracking_uri)
    for key, value in view_tags(experiment.experiment_id, time.time_ns() // 1_000_000).items():
        if key not in experiment.tags:  # what a person wrote there stays
            client.set_experiment_tag(experiment.experiment_id, key, value)
    return str(experiment.experiment_id)


def require_experiment_name(name: str) -> None:
    if name.strip().lower() in ("", "none", "null"):
        raise UserError(f"experiment: {name!r} is no name; give one, or leave the option or key out")


def find_or_create_experiment(client: MlflowClient, name: str, tracking_uri: str) -> Experiment:
    """UserError if it was deleted, or `name` means none."""
    from mlflow.exceptions import MlflowException

    require_experiment_name(name)

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        database = sqlite_file(tracking_uri)
        # A server knows where artifacts go; without one mlflow would take ./mlruns of whoever comes first.
        location = database and (database.parent / ARTIFACTS / re.sub(r"[^A-Za-z0-9._-]", "_", name)).as_uri()
        try:
            client.create_experiment(name, artifact_location=location, tags=_EXPERIMENT_TAGS)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another driver was faster
                raise
        experiment = client.get_experiment_by_name(name)
    if experiment is None or experiment.lifecycle_stage != "active":
        raise UserError(
            f"experiment: {name} was deleted in MLflow; choose another name, or bring it back with "
            f"`mlflow experiments restore --experiment-id {experiment.experiment_id if experiment else '...'}`"
        )
    return experiment


@dataclass(frozen=True)
class RunRow:
    name: str
    run_id: str
    experiment: str
    status: str
    start_ms: int
    """Unix time."""
    seconds: float | None
    """From start to end; None while it runs."""
    metrics: Mapping[str, float]
    """Last value of each."""
    params: Mapping[str, str]
    tags: Mapping[str, str]


@dataclass(frozen=True)
class Difference:
    key: str
    first: str | None
    second: str | None


def list_runs(tracking_uri: str, experiment: str | None = None, *, max_runs: int = _MAX_RUNS) -> list[RunRow]:
    """Newest first. `tracking_uri` as `absolute_tracking_uri` returns it; without `experiment`, of all of them.

    Raises UserError if there is no such database or experiment, Fault if the server does not answer.
    """
    if experiment is not None:
        require_experiment_name(experiment)
    require_answer(tracking_uri)
    with mlflow_faults(tracking_uri, "listing the runs"):
        client = connect(tracking_uri)
        names = {found.experiment_id: found.name for found in client.search_experiments()}
        wanted = [key for key, name in names.items() if experiment in (None, name)]
        if not wanted:
            raise UserError(f"--experiment {experiment}: not here; there are {_enumerated(names.values())}")
        order = ["attributes.start_time DESC"]
        return [
            _row(run, names) for run in client.search_runs(wanted, order_by=order, max_results=min(max_runs, _MAX_RUNS))
        ]


def _enumerated(names: Iterable[str]) -> str:
    ordered = sorted(map(shown, names))
    more = f" and {len(ordered) - _MAX_NAMED} more" if len(ordered) > _MAX_NAMED else ""
    return f"{', '.join(ordered[:_MAX_NAMED])}{more}"


def metric_history(tracking_uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    """(step, value) of a run's metric in the order of steps. Raises Fault."""
    require_answer(tracking_uri)
    with mlflow_faults(tracking_uri, f"reading {key}"):
        points = connect(tracking_uri).get_metric_history(run_id, key)
        return sorted((point.step, point.value) for point in points)


def find_run(rows: Sequence[RunRow], name: str) -> RunRow:
    """The run with this name or (a beginning of) this id. Raises UserError if there is none or more than one."""
    found = [row for row in rows if row.name == name] or [row for row in rows if row.run_id.startswith(name)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(f"{name}: no run of this name or id; `resnet-dist runs` lists them")
    raise UserError(f"{name}: {len(found)} runs; give an id: {', '.join(row.run_id for row in found)}")


def differences(first: RunRow, second: RunRow) -> list[Difference]:
    """Parameters and tags that differ, then every metric of either. Pure."""
    tags = [{key: row.tags[key] for key in _COMPARED_TAGS if key in row.tags} for row in (first, second)]
    found = _differing(first.params, second.params) + _differing(*tags)
    metrics = [{key: f"{value:.6g}" for key, value in row.metrics.items()} for row in (first, second)]
    keys = sorted({key for part in metrics for key in part if not key.startswith("system/")})
    return found + [Difference(key, metrics[0].get(key), metrics[1].get(key)) for key in keys]


def _differing(first: Mapping[str, str], second: Mapping[str, str]) -> list[Difference]:
    pairs = [Difference(key, first.get(key), second.get(key)) for key in sorted({*first, *second})]
    return [pair for pair in pairs if pair.first != pair.second]


def _row(run: Run, experiments: Mapping[str, str]) -> RunRow:
    info: Any = run.info
    return RunRow(
        name=info.run_name,
        run_id=info.run_id,
        experiment=experiments[info.experiment_id],
        status=info.status,
        start_ms=info.start_time,
        seconds=(info.end_time - info.start_time) / 1000 if info.end_time else None,
        metrics=dict(run.data.metrics),
        params=dict(run.data.params),
        tags=dict(run.data.tags),
    )
