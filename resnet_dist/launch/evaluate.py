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
from resnet_dist.tracking.models import load_classifier
from resnet_dist.training.assemble import build_classifier
from resnet_dist.training.checkpoint import load_state, newest_whole, read_card, step_of
from resnet_dist.training.evaluate import evaluate
from resnet_dist.training.precision import Precision


def evaluate_on(model: str, beton: Path, tracking_uri: str | None, num_threads: int) -> dict[str, float]:
    """Evaluates a checkpoint folder, a run folder (its newest whole checkpoint) or an MLflow model URI on `beton`.

    Raises UserError if there is no such model, or the beton is missing or of other classes.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(num_threads)
    manifest = load_manifest(beton)
    recipe, module = _from_mlflow(model, tracking_uri) if ":/" in model else _from_checkpoint(Path(model))
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


def _from_checkpoint(path: Path) -> tuple[Recipe, nn.Module]:
    directory = path
    if step_of(path.resolve().name) is None:
        found = newest_whole(path)
        if found is None:
            raise UserError(
                f"{path}: is neither a checkpoint's folder (epoch=...-step=...) nor a run's folder with one"
            )
        directory = found[0]
    elif not path.is_dir():
        raise UserError(f"{path}: there is no such checkpoint")
    recipe = Recipe.model_validate(read_card(directory).recipe)
    module = build_classifier(recipe).to(Precision(recipe.train.precision).weights)
    module.net.load_state_dict(load_state(directory, torch.device("cpu"))["net"])
    return recipe, module


def _from_mlflow(uri: str, tracking_uri: str | None) -> tuple[Recipe, nn.Module]:
    module, metadata = load_classifier(uri, tracking_uri=tracking_uri)
    return recipe_from_yaml(metadata["recipe"]), module
