"""Training and validation error of runs as the paper draws them: read from run folders or from MLflow. Pure but for the
reading."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from resnet_dist.config.loading import read_model_name
from resnet_dist.errors import UserError
from resnet_dist.tracking.experiment import find_run, list_runs, metric_history
from resnet_dist.tracking.mlflow_run import recorded_run
from resnet_dist.tracking.spool import History, read_history

Points = list[tuple[int, float]]
TRAIN, VAL = "train/top1_error", "val/top1_error"


@dataclass(frozen=True)
class Curve:
    """One run: errors in percent over optimizer steps."""

    label: str
    net: str
    train: Points
    val: Points

    @property
    def is_plain(self) -> bool:
        return self.net.startswith("plain")

    @property
    def depth(self) -> int | None:
        """Layers, as the net's name says; None for nets without a number."""
        digits = re.search(r"\d+$", self.net)
        return int(digits.group()) if digits else None


def curve_of(history: History, label: str, net: str) -> Curve:
    """Training points are averaged over the steps between two evaluations: single ones are means over few images."""
    val = [point for point in history.points.get(VAL, []) if math.isfinite(point[1])]
    train = [point for point in history.points.get(TRAIN, []) if math.isfinite(point[1])]
    return Curve(label, net, averaged(train, [step for step, _ in val]), val)


def averaged(points: Points, ends: Sequence[int]) -> Points:
    """The mean of the points of each interval (ends[k-1], ends[k]], at its end; what comes after the last end is left
    as it is. Points are equally weighted: windows of a run have the same number of steps but for the last of an epoch.
    """
    means: Points = []
    start = 0
    for end in ends:
        inside = [value for step, value in points if start < step <= end]
        if inside:
            means.append((end, sum(inside) / len(inside)))
        start = end
    return means + [(step, value) for step, value in points if step > start]


def read_curves(runs: Sequence[str], tracking_uri: str | None) -> list[Curve]:
    """The curves of runs, each a run's folder, or an MLflow run by name or id.

    Raises UserError for one that is not there or has no curves, Fault if the server does not answer.
    """
    curves = [
        _from_folder(Path(run)) if (Path(run) / "mlflow_run.json").is_file() else _from_mlflow(run, tracking_uri)
        for run in runs
    ]
    for run, curve in zip(runs, curves, strict=True):
        if not curve.train and not curve.val:
            raise UserError(f"{run}: has no training curves yet")
    return curves


def _from_folder(folder: Path) -> Curve:
    handle = recorded_run(folder, "")
    if handle is None:
        raise UserError(f"{folder}: has no MLflow run yet")
    recipe = folder / "recipe.yaml"
    net = read_model_name(recipe) if recipe.is_file() else folder.name
    return curve_of(read_history(folder, handle.run_id), folder.resolve().name, net)


def _from_mlflow(run: str, tracking_uri: str | None) -> Curve:
    if tracking_uri is None:
        raise UserError(f"{run}: is no run's folder; give --tracking-uri to look it up in MLflow")
    row = find_run(list_runs(tracking_uri), run)
    history = History({key: metric_history(tracking_uri, row.run_id, key) for key in (TRAIN, VAL)})
    return curve_of(history, row.name, row.params.get("model.name", row.name))
