"""The ready view of an experiment in MLflow's pages: columns and charts that suit a training, kept by MLflow itself.

MLflow 3.17 keeps a saved view in a tag of the experiment, `mlflow.sharedViewState.<id>`: a JSON envelope {name,
createdAt, state}, whose `state` is the page's own state as JSON (deflated or not), read back from
`#/experiments/<experiment>/runs?viewStateShareKey=<id>`. There is no public way to write one, and no way to make one
the default: the experiment's description links it. Older pages that read the tag otherwise show their own defaults.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from typing import Any

VIEW_ID = "resnet-dist"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW_ID}"
NOTE_TAG = "mlflow.note.content"
_NAME = "Training"

_COLUMNS = (
    "attributes.`Duration`",
    "attributes.`Dataset`",
    "metrics.`val/top1`",
    "metrics.`val/top5`",
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
"""Sections that MLflow fills by itself, one chart a metric: there, but folded."""


def view_tags(experiment_id: str, created_ms: int) -> dict[str, str]:
    """The tags of an experiment that give it the view and a description which links it."""
    page = f"#/experiments/{experiment_id}/runs?viewStateShareKey={VIEW_ID}"
    note = (
        f"Open it as **[a table of results]({page}&compareRunsMode=TABLE)** or as "
        f"**[curves]({page}&compareRunsMode=CHART)**; "
        f"both are the saved view *{_NAME}* of the list of runs.\n\n"
        "A run's own page says what it trains, how to go on with it and how to evaluate it. `resumed` counts how often "
        "a driver went on with a run, `restarts` how often its workers began anew, and `ended` says in words why it "
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
