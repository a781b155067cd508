"""An MLflow experiment: found or created, its runs as rows, and a saved view of them in MLflow's pages."""

from __future__ import annotations

import base64
import json
import re
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data_prep.shown import few
from resnet_dist.errors import UserError
from resnet_dist.tracking.connection import mlflow_client, sqlite_file
from resnet_dist.tracking.sqlite_store import ARTIFACTS

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

VIEW_ID = "resnet-dist"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW_ID}"
NOTE_TAG = "mlflow.note.content"
_NAME = "Training"
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""MLflow's pages for training, not those for agents."""
_MAX_RUNS = 1000
_MAX_NAMED = 20
_COMPARED_TAGS = ("data_digest", "hardware", "workers", "restarts", "resizes", "mlflow.source.git.commit", "git.dirty")


def viewed_experiment_id(client: MlflowClient, name: str, tracking_uri: str) -> str:
    """Id of the experiment, found or created, with the saved view."""
    experiment = find_or_create_experiment(client, name, tracking_uri)
    for key, value in view_tags(experiment.experiment_id, time.time_ns() // 1_000_000).items():
        if key not in experiment.tags:  # keeps what a person wrote there
            client.set_experiment_tag(experiment.experiment_id, key, value)
    return str(experiment.experiment_id)


def require_experiment_name(name: str) -> None:
    if name.strip().lower() in ("", "none", "null"):
        raise UserError(f"experiment: {name!r} is not a name; give one, or leave the option or key out")


def find_or_create_experiment(client: MlflowClient, name: str, tracking_uri: str) -> Experiment:
    """UserError if it was deleted, or `name` is not a valid name."""
    from mlflow.exceptions import MlflowException

    require_experiment_name(name)

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        database = sqlite_file(tracking_uri)
        # A server knows where artifacts go; without one mlflow would use ./mlruns of whichever process is first.
        location = database and (database.parent / ARTIFACTS / re.sub(r"[^A-Za-z0-9._-]", "_", name)).as_uri()
        try:
            client.create_experiment(name, artifact_location=location, tags=_EXPERIMENT_TAGS)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another driver was faster
                raise
        experiment = client.get_experiment_by_name(name)
    if experiment is None or experiment.lifecycle_stage != "active":
        raise UserError(
            f"experiment: {name} was deleted in MLflow; choose another name, or restore it with "
            f"`mlflow experiments restore --experiment-id {experiment.experiment_id if experiment else '...'}`"
        )
    return experiment


# The runs as rows, and two runs compared: what `resnet-dist runs` shows.


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


def list_runs(tracking_uri: str, experiment: str | None = None) -> list[RunRow]:
    """The newest 1,000 runs, newest first; without `experiment`, of all experiments.

    `tracking_uri` as `absolute_tracking_uri` returns it.

    Raises UserError if there is no such database or experiment, Fault if the server does not respond.
    """
    if experiment is not None:
        require_experiment_name(experiment)
    with mlflow_client(tracking_uri, "listing the runs") as client:
        names = {found.experiment_id: found.name for found in client.search_experiments()}
        wanted = [key for key, name in names.items() if experiment in (None, name)]
        if not wanted:
            listed = few(sorted(names.values()), most=_MAX_NAMED)
            raise UserError(f"--experiment {experiment}: no such experiment; there are {listed}")
        order = ["attributes.start_time DESC"]
        return [_row(run, names) for run in client.search_runs(wanted, order_by=order, max_results=_MAX_RUNS)]


def metric_history(tracking_uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    """(step, value) of a run's metric in the order of steps. Raises Fault."""
    with mlflow_client(tracking_uri, f"reading {key}") as client:
        points = client.get_metric_history(run_id, key)
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


# The view: columns and charts that suit a training.
#
# MLflow 3.17 keeps a saved view in a tag of the experiment, `mlflow.sharedViewState.<id>`: a JSON envelope {name,
# createdAt, state}, whose `state` is the page's own state as JSON (deflated or not), read back from
# `#/experiments/<experiment>/runs?viewStateShareKey=<id>`. There is no public way to write one, and no way to make one
# the default: the experiment's description links it. Older pages that read the tag differently show their defaults.


_COLUMNS = (
    "attributes.`Duration`",
    "attributes.`Dataset`",
    "metrics.`val/top1`",
    "metrics.`val/top5`",
    "metrics.`val/balanced_top1`",
    "metrics.`val/loss`",
    "metrics.`train/loss`",
    "metrics.`speed/images_per_s`",
    "params.`model.name`",
    "params.`optim.lr`",
    "params.`train.global_batch_size`",
    "tags.`workers`",
    "tags.`resumed`",
    "tags.`restarts`",
    "tags.`ended`",
    "attributes.`Models`",
)
_CHARTS = {
    "Results": (
        ("Error (%), train and validation", ("train/top1_error", "val/top1_error")),
        ("Loss, train and validation", ("train/loss", "val/loss")),
        ("Validation top-5 error (%)", ("val/top5_error",)),
        ("Learning rate", ("train/lr",)),
    ),
    "Speed and health": (
        ("Images per second, all workers", ("speed/images_per_s",)),
        ("Share of time spent waiting for images", ("speed/data_wait_share",)),
        ("Gradient norm", ("train/grad_norm",)),
    ),
}
_FOLDED = ("train", "val", "speed", "Model metrics", "System metrics")
"""Sections that MLflow fills automatically, one chart a metric; they are collapsed."""


def view_tags(experiment_id: str, created_ms: int) -> dict[str, str]:
    """The tags that give an experiment the view, and a description that links to it."""
    page = f"#/experiments/{experiment_id}/runs?viewStateShareKey={VIEW_ID}"
    note = (
        f"Open it as **[a table of results]({page}&compareRunsMode=TABLE)** or as "
        f"**[curves]({page}&compareRunsMode=CHART)**; "
        f"both are the saved view *{_NAME}* of the list of runs.\n\n"
        "A run's own page says what it trains, how to continue it and how to evaluate it. `resumed` counts how often "
        "a driver resumed a run, `restarts` how often its workers were restarted, and `ended` says in words why it "
        "ended. The x-axis of every curve is the number of optimizer steps.\n"
    )
    envelope = {"name": _NAME, "createdAt": created_ms, "state": _packed(_page_state())}
    return {VIEW_TAG: json.dumps(envelope), NOTE_TAG: note}


def _page_state() -> dict[str, Any]:
    charts = [_line_chart(section, title, keys) for section, cards in _CHARTS.items() for title, keys in cards]
    sections = [_section(name, display=True) for name in _CHARTS] + [_section(name, display=False) for name in _FOLDED]
    return {
        "selectedColumns": list(_COLUMNS),
        "columnOrder": [],
        "compareRunCharts": charts,
        "compareRunSections": sections,
        "isAccordionReordered": True,  # else MLflow sorts the sections
        "runsHiddenMode": "FIRST_20_RUNS",
        "hideEmptyCharts": True,
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
    }


def _section(name: str, *, display: bool) -> dict[str, Any]:
    return {"uuid": _id(name), "name": name, "display": display, "isReordered": False, "deleted": False,
            "isGenerated": False}  # fmt: skip


def _line_chart(section: str, title: str, keys: tuple[str, ...]) -> dict[str, Any]:
    return {
        "uuid": _id(f"{section} {title}"),
        "type": "LINE",
        "metricSectionId": _id(section),
        "displayName": title,
        "metricKey": keys[0],
        "selectedMetricKeys": list(keys),
        "runsCountToCompare": 20,
        "deleted": False,
        "isGenerated": False,
        "xAxisKey": "step",
        "xAxisScaleType": "linear",
        "scaleType": "linear",
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "selectedXAxisMetricKey": "",
        "lineSmoothness": 0,
        "range": {},
        "ignoreOutliers": False,
        "useGlobalXaxisKey": True,
        "useGlobalLineSmoothing": True,
    }


def _id(name: str) -> str:
    return "resnet-dist-" + name.lower().replace(" ", "-")


def _packed(state: Mapping[str, Any]) -> str:
    """As MLflow's page packs it: `deflate;` and zlib in base64."""
    return "deflate;" + base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
