"""The recipe: everything that decides the numbers of a run, and nothing else.

A recipe names no host, path, worker count or GPU. Two runs of one recipe on one data set end with the same result
whatever the hardware was, so its hash (`recipe_hash`) stands in every checkpoint and a checkpoint of another recipe is
refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, PositiveInt

from resnet_dist.config.base import Section, without_recorded_defaults
from resnet_dist.config.recipe_data import DataConfig
from resnet_dist.config.recipe_model import ModelConfig
from resnet_dist.config.recipe_optim import OptimConfig, ScheduleConfig
from resnet_dist.config.recipe_train import TrainConfig


class EvalConfig(Section):
    batch_size: PositiveInt
    """Images per forward pass. It fixes the batches, so the loss does not depend on the worker count."""
    every_epochs: PositiveInt = 1
    """Evaluate after every this many epochs, and always after the last step."""


class Recipe(Section):
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    eval: EvalConfig


_UNSET = object()
RECORDED_DEFAULTS: Mapping[str, Any] = {"data.allow_overlap": False}
"""Keys that were added after recipes were first hashed, see `without_recorded_defaults`."""
_DECIDES_NO_NUMBER = "allow_overlap"
"""Of the data section: a run may be resumed with another value."""


def recipe_hash(recipe: Recipe) -> str:
    """16 hex digits of the SHA-256 of the recipe's canonical JSON: sorted keys, without those at a recorded default."""
    hashed = _hashed(recipe.model_dump(mode="json"))
    canonical = json.dumps(hashed, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def recipe_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The keys that differ between two dumped recipes, recorded defaults aside.

    >>> recipe_changes({"optim": {"lr": 0.05}}, {"optim": {"lr": 0.02}})
    ['optim.lr 0.05 -> 0.02']
    """
    return _changes(_hashed(before), _hashed(after), "")


def _hashed(dumped: Mapping[str, Any]) -> Any:
    hashed = without_recorded_defaults(dumped, RECORDED_DEFAULTS)
    if isinstance(hashed.get("data"), Mapping):
        hashed["data"] = {key: value for key, value in hashed["data"].items() if key != _DECIDES_NO_NUMBER}
    return hashed


def _changes(before: Any, after: Any, path: str) -> list[str]:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        keys = {**before, **after}
        found = [_changes(before.get(k, _UNSET), after.get(k, _UNSET), f"{path}.{k}".removeprefix(".")) for k in keys]
        return [change for changes in found for change in changes]
    return [] if before == after else [f"{path} {_shown(before)} -> {_shown(after)}"]


def _shown(value: Any) -> str:
    return "unset" if value is _UNSET else json.dumps(value)[:60]
