"""`trained.json`: written into the run's folder when its training is over. With the checkpoint it is all that bringing
the run to MLflow needs, so that any command and any machine that sees the storage can do it, without Ray and the data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from resnet_dist.config.loading import recipe_from_yaml, to_yaml
from resnet_dist.config.profile import Profile
from resnet_dist.config.recipe import Recipe
from resnet_dist.errors import UserError
from resnet_dist.launch.data_identity import known_pictures, picture_settings
from resnet_dist.launch.describe import data_inputs
from resnet_dist.launch.preflight import Prepared
from resnet_dist.storage.base import RunStorage
from resnet_dist.tracking.details import DataInput
from resnet_dist.tracking.small_files import write_json
from resnet_dist.training.checkpoint import Identity, newest_step
from resnet_dist.training.job import WorkerResult

_TRAINED = "trained.json"


@dataclass(frozen=True)
class Trained:
    """A finished training."""

    name: str
    """Of the run."""
    step: int
    """Its last; there is a checkpoint of it."""
    metrics: Mapping[str, float]
    recipe: Recipe
    identity: Identity
    validation: DataInput
    validation_digest: str
    """With the name of its algorithm."""
    register_models: bool
    pictures: Mapping[str, Any]
    """How the training data's pictures became pixels: `data_identity.picture_settings`."""

    @property
    def words(self) -> str:
        """What was reached."""
        top1 = self.metrics.get("val/top1")
        return f"training finished after step {self.step}" + ("" if top1 is None else f" at {top1:.2f} % top-1")


def trained_run(recipe: Recipe, profile: Profile, name: str, prepared: Prepared, result: WorkerResult) -> Trained:
    return Trained(
        name=name,
        step=result.step,
        metrics=dict(result.metrics),
        recipe=recipe,
        identity=prepared.identity,
        validation=data_inputs(recipe, prepared)[1],
        validation_digest=prepared.val.digest,
        register_models=profile.register_models,
        pictures=picture_settings(prepared.train),
    )


def write_trained(storage: RunStorage, trained: Trained) -> None:
    tree = {key: value for key, value in vars(trained).items() if key not in ("recipe", "identity", "validation")}
    tree |= {"recipe": to_yaml(trained.recipe)}
    tree |= {key: asdict(getattr(trained, key)) for key in ("identity", "validation")}
    write_json(storage.folder / _TRAINED, tree)
    storage.publish(storage.folder / _TRAINED)


def read_trained(storage: RunStorage) -> Trained | None:
    """None if there is none that can be read, or its checkpoint is not there: then it is for a training to go on."""
    content = storage.read(_TRAINED)
    if content is None:
        return None
    try:
        trained = _parsed(json.loads(content))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, UserError):
        return None
    return trained if trained.step == newest_step(storage) else None


def _parsed(tree: dict[str, Any]) -> Trained:
    identity = tree["identity"]
    return Trained(
        **{key: tree[key] for key in ("name", "validation_digest")},
        step=int(tree["step"]),
        metrics={str(key): float(value) for key, value in tree["metrics"].items()},
        recipe=recipe_from_yaml(tree["recipe"], _TRAINED),
        identity=replace(Identity(**identity), class_names=tuple(identity["class_names"])),
        validation=DataInput(**tree["validation"]),
        register_models=tree["register_models"] is True,
        pictures=known_pictures(tree.get("pictures")) or {},
    )
