"""`resnet-dist evaluate`: one process, no cluster; the same exact evaluation that training does."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import nn

from data_prep.beton.manifest import load_manifest
from resnet_dist.config.loading import recipe_from_yaml
from resnet_dist.config.recipe import Recipe
from resnet_dist.data.loader import BetonLoader
from resnet_dist.errors import UserError
from resnet_dist.launch.preflight import require_fitting_data
from resnet_dist.storage.location import open_storage, split
from resnet_dist.tracking.models import load_classifier
from resnet_dist.training.assemble import build_classifier
from resnet_dist.training.checkpoint import load_state, newest_whole, opened, step_of
from resnet_dist.training.evaluate import evaluate
from resnet_dist.training.precision import Precision
from resnet_dist.training.state import evaluated_weights


def evaluate_on(model: str, beton: Path, tracking_uri: str | None, num_threads: int) -> dict[str, float]:
    """Evaluates a checkpoint, a run (its newest whole checkpoint) or an MLflow model URI on `beton`.

    Checkpoint and run as paths, or under `s3://`.

    Raises UserError if there is no such model, or the beton is missing or of other classes.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(num_threads)
    manifest = load_manifest(beton)
    recipe, module = _from_mlflow(model, tracking_uri) if _is_model(model) else _from_checkpoint(model)
    require_fitting_data(recipe, manifest, beton)
    module.to(device)
    loader = BetonLoader(
        beton,
        manifest,
        recipe.data.eval,
        decoder=recipe.data.decoder,
        batch_size=recipe.eval.batch_size,
        seed=recipe.seed,
        num_threads=num_threads,
        device=device,
    )
    try:
        result = evaluate(
            module,
            partial(loader.epoch, 0),
            num_samples=manifest.num_samples,
            batch_size=recipe.eval.batch_size,
            rank=0,
            world_size=1,
            device=device,
            precision=Precision(recipe.train.precision),
        )
    finally:
        loader.close()
    return result.metrics()


def _is_model(model: str) -> bool:
    return ":/" in model and not model.startswith("s3://")


def _from_checkpoint(location: str) -> tuple[Recipe, nn.Module]:
    run, name = split(location)
    if step_of(name) is None:
        checkpoint = newest_whole(open_storage(location))
    elif open_storage(location).names():
        checkpoint = opened(open_storage(run), name)
    else:
        raise UserError(f"{location}: there is no such checkpoint")
    with checkpoint as found:
        if found is None:
            raise UserError(
                f"{location}: is neither a checkpoint's folder (epoch=...-step=...) nor a run's folder with one"
            )
        recipe = Recipe.model_validate(found.card.recipe)
        module = build_classifier(recipe).to(Precision(recipe.train.precision).weights)
        module.net.load_state_dict(evaluated_weights(load_state(found.directory, torch.device("cpu"))))
    return recipe, module


def _from_mlflow(uri: str, tracking_uri: str | None) -> tuple[Recipe, nn.Module]:
    module, metadata = load_classifier(uri, tracking_uri=tracking_uri)
    return recipe_from_yaml(metadata["recipe"]), module
