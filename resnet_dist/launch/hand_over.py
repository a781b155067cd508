"""After training: the last and the best weights become models in MLflow, and the better one a candidate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from data_prep.redaction import redacted
from resnet_dist.config.loading import to_yaml
from resnet_dist.errors import Fault
from resnet_dist.launch.result import RunResult
from resnet_dist.launch.trained import Trained
from resnet_dist.storage.base import RunStorage
from resnet_dist.tracking.history import read_history
from resnet_dist.tracking.mlflow_run import RunHandle
from resnet_dist.tracking.models import log_classifier, log_model_metrics
from resnet_dist.tracking.registry import Registration, Score, register
from resnet_dist.training.assemble import build_classifier
from resnet_dist.training.best import open_best
from resnet_dist.training.checkpoint import load_state, newest_whole
from resnet_dist.training.state import evaluated_weights


def hand_over(trained: Trained, storage: RunStorage, handle: RunHandle, say: Callable[[str], object]) -> RunResult:
    """Logs the last weights as `model`, better ones of an earlier step as `model-best`, registers the better of them
    if the profile said so, and says where everything is. Raises Fault; a second call does what is missing.
    """
    with newest_whole(storage) as found:
        if found is None or found.card.step != trained.step:
            raise Fault(f"{storage.location}: the checkpoint of step {trained.step} is missing or damaged")
        checkpoint = f"{storage.location}/{found.name}"
        last_uri = _log(trained, handle, "model", found.directory, trained.step, trained.metrics)
    best_uri, metrics = last_uri, trained.metrics
    with open_best(storage, trained.identity) as best:
        if best is not None and best.card.metrics["val/top1"] > metrics["val/top1"]:
            metrics = best.card.metrics
            best_uri = _log(trained, handle, "model-best", best.directory, best.card.step, metrics)
    if trained.register_models:
        registered = _register(trained, handle, best_uri, metrics)
        say(
            f"registered {registered.name} version {registered.version} as candidate"
            + (" and champion" if registered.is_champion else "; the champion stays" + _why(registered))
        )
    return RunResult(
        name=trained.name,
        run_dir=storage.location,
        run_id=handle.run_id,
        tracking_uri=redacted(handle.tracking_uri),
        model_uri=last_uri,
        checkpoint=checkpoint,
        step=trained.step,
        metrics=dict(trained.metrics),
    )


def model_card(trained: Trained, metrics: Mapping[str, float]) -> dict[str, str]:
    """What travels with a logged model: how it was made, and what to feed it."""
    return {
        "recipe": to_yaml(trained.recipe),
        "recipe_hash": trained.identity.recipe_hash,
        "data_digest": trained.identity.data_digest,
        **{key: f"{value:.6g}" for key, value in metrics.items() if key.startswith("val/")},
    }


def _log(
    trained: Trained, handle: RunHandle, model_name: str, weights: Path, step: int, metrics: Mapping[str, float]
) -> str:
    model = build_classifier(trained.recipe)
    model.net.load_state_dict(evaluated_weights(load_state(weights, torch.device("cpu"))))
    crop = trained.recipe.data.eval
    uri = log_classifier(
        handle,
        model.eval(),
        name=model_name,
        input_example=np.zeros((2, crop.size, crop.size, 3), dtype=np.uint8),
        resize=crop.resize,
        class_names=trained.identity.class_names,
        pictures=trained.pictures,
        metadata=model_card(trained, metrics),
        step=step,
    )
    history = read_history(handle.run_dir, handle.run_id)
    values = {key: value for key, value in metrics.items() if key.startswith("val/")}
    log_model_metrics(handle, uri, values, step, history, trained.validation)
    return uri


def _register(trained: Trained, handle: RunHandle, model_uri: str, metrics: Mapping[str, float]) -> Registration:
    recipe, identity = trained.recipe, trained.identity
    return register(
        handle,
        f"{recipe.data.dataset}-{recipe.model.name}",
        model_uri,
        Score(trained.validation_digest, metrics["val/top1"]),
        {"recipe_hash": identity.recipe_hash, "data_digest": identity.data_digest},
        identity.class_names,
    )


def _why(registered: Registration) -> str:
    if registered.other_classes is None:
        return ""
    return (
        f", for it is of other classes: {registered.other_classes}; move the alias yourself to replace it, or train "
        "under another data.dataset to keep both"
    )
