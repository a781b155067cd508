"""Trained weights and models: published ones by name, files, checkpoints, runs' folders, `s3://`, MLflow model URIs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from resnet_dist.config.loading import load_recipe, recipe_from_yaml, recipe_of
from resnet_dist.config.recipe import Recipe, recipe_hash
from resnet_dist.data.checks import known_pictures
from resnet_dist.errors import Fault, UserError
from resnet_dist.models.classifier import ImageClassifier
from resnet_dist.storage.locations import open_storage, split
from resnet_dist.tracking.registry import load_weights
from resnet_dist.training.checkpoint import load_state, step_of
from resnet_dist.training.checkpoint_manager import newest_complete, open_checkpoint
from resnet_dist.training.model import Precision, build_classifier
from resnet_dist.training.state import evaluated_weights
from resnet_dist.weights.files import digest_of, is_file, read_file
from resnet_dist.weights.keys import head_of, match_keys
from resnet_dist.weights.published import Published, is_published, published, published_file

_NET = "net."
"""Before the names of the bare net's tensors in a logged model."""
_MAX_REASON = 200


@dataclass(frozen=True)
class TrainedModel:
    name: str
    """As the user gave it."""
    recipe: Recipe
    classifier: ImageClassifier
    """On the CPU, in evaluation mode."""
    class_names: tuple[str, ...] | None
    """By label; None if the source does not have them: a checkpoint of an earlier version."""
    data_digest: str = ""
    """Digest of the data that it was trained on, as in a run's identity; empty if the source does not have it."""
    pictures: Mapping[str, Any] | None = None
    """How its data's pictures became pixels (`checks.picture_settings`); None if the source does not know."""
    weights_digest: str = ""
    """`Weights.digest` of weights that were not trained by a run of this project; empty for others."""
    published: Published | None = None
    unexpected: tuple[str, ...] = ()
    """Tensors of the source that the net has no place for."""
    notes: tuple[str, ...] = ()
    """What was assumed about the source: `Matched.notes`."""

    @property
    def recipe_hash(self) -> str:
        return recipe_hash(self.recipe)


@dataclass(frozen=True)
class Weights:
    """Trained weights, and what their source knows about them."""

    name: str
    """The source, as the user gave it."""
    state: dict[str, torch.Tensor]
    """By the source's own names, on the CPU; the moving average where there is one. `keys.match_keys` finds a net's."""
    published: Published | None = None
    """How the weights of a published name are used, and what accuracy they have."""
    recipe: Recipe | None = None
    """Of the run that trained them here."""
    class_names: tuple[str, ...] | None = None
    """By label; None if the source does not have them."""

    @cached_property
    def digest(self) -> str:
        """Hex digits; equal for the same tensors in any format of file."""
        return digest_of(self.state)


def read_weights(source: str, tracking_uri: str | None = None, file: Path | None = None) -> Weights:
    """The weights of `source`: `torchvision:NAME.ENTRY`, `timm:NAME.TAG`, a file (.pth, .pt, .th, .safetensors), or
    what `load_model` takes.

    `file` has the weights of a published name, which are otherwise in the library's cache or downloaded. Raises
    UserError if there are no such weights, Fault if storage or MLflow does not respond.
    """
    if is_published(source):
        known = published(source)  # first, because it refuses nets that cannot be built before anything is downloaded
        return Weights(source, read_file(file or published_file(source)), published=known)
    if is_file(source):
        return Weights(source, read_file(Path(source).expanduser()))
    model = load_model(source, tracking_uri)
    return Weights(source, dict(model.classifier.net.state_dict()), recipe=model.recipe, class_names=model.class_names)


def load_model(
    source: str,
    tracking_uri: str | None = None,
    *,
    recipe: str | Path | None = None,
    overrides: Sequence[str] = (),
    weights: str | Path | None = None,
) -> TrainedModel:
    """A checkpoint or a run (its newest complete checkpoint), from a path or `s3://`; an MLflow model URI; published
    weights, `torchvision:NAME.ENTRY` or `timm:NAME.TAG`; or a file of weights (.pth, .pt, .th, .safetensors).

    Args:
        tracking_uri: of a model URI; None: mlflow's own setting.
        recipe: of a file, which does not say what net its weights are of and how pictures are prepared.
        overrides: `key=value` for the recipe of a file or of published weights.
        weights: the file of published weights, if it is not in the library's cache.

    Raises UserError if there is no such model, Fault if storage or MLflow does not respond.
    """
    named, file = is_published(source), is_file(source)
    if weights is not None and not named:
        raise UserError(
            f"{source}: --weights is the file of published weights, such as torchvision:resnet50.IMAGENET1K_V2"
        )
    if (overrides and not (named or file)) or (recipe is not None and not file):
        given = "--set" if recipe is None else "--recipe"
        raise UserError(f"{source}: brings its own net and transform; {given} is for files of weights")
    if named or file:
        return _from_weights(read_weights(source, file=None if weights is None else Path(weights)), recipe, overrides)
    if ":/" in source and not source.startswith("s3://"):
        return _from_mlflow(source, tracking_uri)
    return _from_checkpoint(source)


def _from_weights(weights: Weights, recipe: str | Path | None, overrides: Sequence[str]) -> TrainedModel:
    known = weights.published
    if known is not None:
        loaded = recipe_of(_published_recipe(known), weights.name, overrides)
    elif recipe is None:
        raise UserError(
            f"{weights.name}: a file does not say which net its weights are of and how pictures are prepared; give a "
            "recipe that does (--recipe FILE, and --set KEY=VALUE for what differs)"
        )
    else:
        loaded = load_recipe(recipe, overrides)
    classifier = _untrained(loaded)
    matched = match_keys(weights.state, classifier.net, weights.name)
    if matched.head_differs:
        head, theirs = head_of(classifier.net), [list(v.shape) for v in weights.state.values() if v.ndim == 2][-1:]
        have = f"its last linear layer is {theirs[0]}" if theirs else "it has no linear layer"
        raise UserError(
            f"{weights.name}: has no classifier of the net's {loaded.model.num_classes} classes ({head}.weight, "
            f"{head}.bias): {have}; set model.num_classes, or give weights with a classifier"
        )
    _load(classifier, matched.state, weights.name)
    return TrainedModel(
        weights.name,
        loaded,
        classifier,
        class_names=None,
        weights_digest=weights.digest,
        published=known,
        unexpected=matched.unexpected,
        notes=matched.notes,
    )


def _published_recipe(known: Published) -> dict[str, Any]:
    """A recipe, as plain data, for the net and the test transform. How the weights were trained is not known: the keys
    of training that a recipe must have mean nothing here."""
    return {
        "seed": 0,
        "model": dict(known.model),
        "data": {
            "dataset": "imagenet",
            "train": {"kind": "random_resized_crop", "size": known.size},
            "eval": {
                "kind": "center_crop",
                "size": known.size,
                "resize": known.resize,
                "interpolation": known.interpolation,
            },
            "mean": list(known.mean),
            "std": list(known.std),
        },
        "train": {"global_batch_size": 256, "micro_batch_size": 32, "total_epochs": 1},
        "optim": {"name": "sgd", "lr": 0.1, "weight_decay": 1e-4},
        "schedule": {"kind": "cosine"},
        "eval": {"batch_size": 100},
    }


def _from_checkpoint(location: str) -> TrainedModel:
    run, name = split(location)
    if step_of(name) is None:
        checkpoint = newest_complete(open_storage(location))
    elif open_storage(location).names():
        checkpoint = open_checkpoint(open_storage(run), name)
    else:
        raise UserError(f"{location}: there is no such checkpoint")
    with checkpoint as found:
        if found is None:
            raise UserError(
                f"{location}: is neither a checkpoint's folder (epoch=...-step=...) nor a run's folder that has one"
            )
        recipe = recipe_of(found.metadata.recipe, location)
        classifier = _untrained(recipe)
        weights = evaluated_weights(load_state(found.directory, torch.device("cpu"), classifier.net))
        identity, pictures = found.metadata.identity, known_pictures(found.metadata.pictures)
    _load(classifier, weights, location)
    return TrainedModel(location, recipe, classifier, identity.class_names or None, identity.data_digest, pictures)


def _from_mlflow(uri: str, tracking_uri: str | None) -> TrainedModel:
    """A logged model is a graph for one size of images; its weights are loaded into the net that its recipe builds."""
    weights, metadata = load_weights(uri, tracking_uri=tracking_uri)
    names = metadata.get("class_names")
    if "recipe" not in metadata or not isinstance(names, list):
        raise UserError(f"{uri}: was not logged by resnet-dist: it has no recipe, or no class names")
    recipe = recipe_from_yaml(str(metadata["recipe"]), f"{uri}: its recipe")
    net = {name.removeprefix(_NET): value for name, value in weights.items() if name.startswith(_NET)}
    trained_on, pictures = str(metadata.get("data_digest", "")), known_pictures(metadata.get("pictures"))
    classifier = _untrained(recipe)
    _load(classifier, net, uri)
    return TrainedModel(uri, recipe, classifier, tuple(map(str, names)), trained_on, pictures)


def _untrained(recipe: Recipe) -> ImageClassifier:
    return build_classifier(recipe).to(Precision(recipe.train.precision).weights).eval()


def _load(classifier: ImageClassifier, weights: Mapping[str, torch.Tensor], source: str) -> None:
    try:
        classifier.net.load_state_dict(weights)
    except RuntimeError as error:
        why = " ".join(str(error).split())
        raise Fault(f"{source}: its weights do not fit its recipe's net: {why[:_MAX_REASON]}") from None
