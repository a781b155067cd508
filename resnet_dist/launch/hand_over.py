"""After training: the last and the best weights become models in MLflow, and the better one a candidate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from data_prep.redaction import redacted
from resnet_dist.config.loading import to_yaml
from resnet_dist.config.profile import Profile
from resnet_dist.config.recipe import Recipe
from resnet_dist.errors import Fault
from resnet_dist.launch.describe import data_inputs
from resnet_dist.launch.preflight import Prepared
from resnet_dist.launch.record import Record
from resnet_dist.launch.result import RunResult
from resnet_dist.tracking.history import read_history
from resnet_dist.tracking.models import log_classifier, log_model_metrics
from resnet_dist.tracking.registry import Registration, Score, register
from resnet_dist.training.assemble import build_classifier
from resnet_dist.training.best import open_best
from resnet_dist.training.checkpoint import load_state, newest_whole
from resnet_dist.training.job import WorkerResult
from resnet_dist.training.state import evaluated_weights


def hand_over(recipe: Recipe, profile: Profile, name: str, record: Record, result: WorkerResult) -> RunResult:
    """Logs the last weights as `model`, better ones of an earlier step as `model-best`, registers the better of them
    if the profile says so, and says where everything is. Raises Fault; a second call does what is missing.
    """
    prepared = record.prepared
    storage = prepared.storage
    with newest_whole(storage) as found:
        if found is None or found.card.step != result.step:
            raise Fault(f"{storage.location}: the checkpoint of step {result.step} is missing or damaged")
        checkpoint = f"{storage.location}/{found.name}"
        last_uri = _log(recipe, record, "model", found.directory, result.step, result.metrics)
    best_uri, metrics = last_uri, result.metrics
    with open_best(storage, prepared.identity) as best:
        if best is not None and best.card.metrics["val/top1"] > metrics["val/top1"]:
            metrics = best.card.metrics
            best_uri = _log(recipe, record, "model-best", best.directory, best.card.step, metrics)
    if profile.register_models:
        registered = _register(recipe, record, best_uri, metrics)
        record.say(
            f"registered {registered.name} version {registered.version} as candidate"
            + (" and champion" if registered.is_champion else "; the champion stays" + _why(registered))
        )
    return RunResult(
        name=name,
        run_dir=storage.location,
        run_id=record.handle.run_id,
        tracking_uri=redacted(profile.tracking_uri),
        model_uri=last_uri,
        checkpoint=checkpoint,
        step=result.step,
        metrics=dict(result.metrics),
    )


def model_card(recipe: Recipe, prepared: Prepared, metrics: Mapping[str, float]) -> dict[str, str]:
    """What travels with a logged model: how it was made, and what to feed it."""
    return {
        "recipe": to_yaml(recipe),
        "recipe_hash": prepared.identity.recipe_hash,
        "data_digest": prepared.identity.data_digest,
        **{key: f"{value:.6g}" for key, value in metrics.items() if key.startswith("val/")},
    }


def _log(
    recipe: Recipe, record: Record, model_name: str, weights: Path, step: int, metrics: Mapping[str, float]
) -> str:
    model = build_classifier(recipe)
    model.net.load_state_dict(evaluated_weights(load_state(weights, torch.device("cpu"))))
    crop, prepared = recipe.data.eval, record.prepared
    uri = log_classifier(
        record.handle,
        model.eval(),
        name=model_name,
        input_example=np.zeros((2, crop.size, crop.size, 3), dtype=np.uint8),
        resize=crop.resize,
        class_names=prepared.val.class_names,
        metadata=model_card(recipe, prepared, metrics),
        step=step,
    )
    validation = data_inputs(recipe, prepared)[1]
    history = read_history(prepared.run_dir, record.handle.run_id)
    values = {key: value for key, value in metrics.items() if key.startswith("val/")}
    log_model_metrics(record.handle, uri, values, step, history, validation)
    return uri


def _register(recipe: Recipe, record: Record, model_uri: str, metrics: Mapping[str, float]) -> Registration:
    prepared = record.prepared
    return register(
        record.handle,
        f"{recipe.data.dataset}-{recipe.model.name}",
        model_uri,
        Score(prepared.val.digest, metrics["val/top1"]),
        {"recipe_hash": prepared.identity.recipe_hash, "data_digest": prepared.identity.data_digest},
        prepared.val.class_names,
    )


def _why(registered: Registration) -> str:
    if registered.other_classes is None:
        return ""
    return (
        f", for it is of other classes: {registered.other_classes}; move the alias yourself to replace it, or train "
        "under another data.dataset to keep both"
    )
