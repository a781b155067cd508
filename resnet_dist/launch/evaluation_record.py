"""What an evaluation leaves: files in a folder, and the same as a run of an MLflow experiment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.beton.files import make_folder, read_small, write_text_atomically
from data_prep.strict_json import parse
from resnet_dist.config.loading import flatten
from resnet_dist.errors import UserError
from resnet_dist.evaluation.plots import draw_calibration, draw_classes
from resnet_dist.evaluation.report import as_csv, as_json, class_lines
from resnet_dist.launch.evaluate import Evaluated
from resnet_dist.tracking.details import DataInput, log_details, log_folder
from resnet_dist.tracking.mlflow_run import EndStatus, end_run, open_run, run_file
from resnet_dist.tracking.mlflow_tracker import SpoolTracker
from resnet_dist.tracking.plots import draw_confusion
from resnet_dist.training.evaluate import sparse_json

MAX_RESULT_BYTES = 16 << 20
_FILES = "evaluation"


@dataclass(frozen=True)
class Place:
    """Which MLflow experiment gets the evaluation."""

    tracking_uri: str
    experiment: str


def facts_of(evaluated: Evaluated) -> dict[str, Any]:
    """What was evaluated, how, on which data."""
    job, manifest = evaluated.job, evaluated.manifest
    protocol = job.protocol
    views: dict[str, Any] = {"scales": list(protocol.scales)}
    if not protocol.fully_convolutional:
        crops = [protocol.crop(model.recipe.data.eval) for model in job.models]
        views = {"size": [crop.size for crop in crops], "resize": [crop.resize for crop in crops]}
    return {
        "models": [model.name for model in job.models],
        "nets": [model.recipe.model.name for model in job.models],
        "recipe_hashes": [model.recipe_hash for model in job.models],
        "protocol": protocol.kind,
        **views,
        "data": str(job.beton),
        "data_digest": manifest.digest,
        "num_samples": manifest.num_samples,
    }


def write_files(evaluated: Evaluated, folder: Path) -> None:
    """`result.json`, `per_class.csv`, `confusion.json` and their figures, in the folder `evaluation` of `folder`."""
    facts = facts_of(evaluated)
    require_same_evaluation(facts, folder)
    folder = folder / _FILES
    result, names = evaluated.result, evaluated.manifest.class_names
    assert result.confusion is not None
    assert result.calibration is not None
    make_folder(folder)
    lines = class_lines(result.confusion, names, evaluated.manifest.class_counts)
    texts = {
        "result.json": as_json(facts, evaluated.metrics(), result.calibration),
        "per_class.csv": as_csv(lines),
        "confusion.json": sparse_json(result.confusion),
    }
    for name, text in texts.items():
        write_text_atomically(folder / name, text)
    draw_classes(lines, folder / "per_class.png")
    draw_calibration(result.calibration, folder / "calibration.png")
    draw_confusion(result.confusion, names, folder / "confusion.png")


def require_same_evaluation(facts: dict[str, Any], folder: Path) -> None:
    """UserError if the folder's MLflow run is of another evaluation: it would keep that one's numbers."""
    before = folder / _FILES / "result.json"
    if not run_file(folder).exists() or not before.exists():
        return
    try:
        found = parse(read_small(before, MAX_RESULT_BYTES), max_bytes=MAX_RESULT_BYTES, allow_nan=True)
    except (OSError, ValueError):
        return
    if not isinstance(found, dict):
        return
    other = [key for key, value in facts.items() if key != "data" and found.get(key, value) != value]
    if other:
        raise UserError(
            f"--output {folder}: holds the MLflow run of another evaluation (other {', '.join(other)}); "
            "name another folder"
        )


def log_evaluation(evaluated: Evaluated, folder: Path, place: Place) -> str:
    """A run of the experiment with the numbers and the files that `write_files` wrote; returns its id.

    The folder holds its run's record from then on: the same folder again goes on with that run. Raises UserError,
    Fault.
    """
    facts, manifest = facts_of(evaluated), evaluated.manifest
    tags = {"kind": "evaluation", "data_digest": manifest.digest, "models": ", ".join(facts["models"])}
    name = f"{'+'.join(_short(facts['nets']))} {facts['protocol']}"
    handle = open_run(
        place.tracking_uri, place.experiment, name, folder, tags, {**_recipe_params(evaluated), **_params(facts)}
    )
    status: EndStatus = "FAILED"
    try:
        data = DataInput(
            name=f"{evaluated.job.beton.parent.name}/{evaluated.job.beton.stem}",
            digest=manifest.digest.partition(":")[2],
            context="evaluation",
            location=str(evaluated.job.beton),
            facts={"num_samples": manifest.num_samples, "num_classes": manifest.num_classes},
        )
        log_details(handle, texts={}, inputs=[data])
        tracker = SpoolTracker(folder, handle.run_id, place.tracking_uri)
        tracker.metrics(evaluated.metrics(), step=0)
        tracker.flush(timeout_s=60.0)
        tracker.close()
        log_folder(handle, folder / _FILES, _FILES)
        status = "FINISHED"
    finally:
        end_run(handle, status)
    return handle.run_id


def _params(facts: dict[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in facts.items() if key not in ("models", "data_digest")}


def _recipe_params(evaluated: Evaluated) -> dict[str, str]:
    """The recipe of a net alone, under the keys that its training has in MLflow: both are found by the same words."""
    models = evaluated.job.models
    return flatten(models[0].recipe) if len(models) == 1 else {}


def _short(nets: Sequence[str]) -> list[str]:
    return [f"{nets.count(net)}x{net}" if nets.count(net) > 1 else net for net in dict.fromkeys(nets)]
