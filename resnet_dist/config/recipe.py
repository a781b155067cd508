"""The recipe: everything that decides the numbers of a run, and nothing else.

A recipe names no host, path, worker count or GPU. Two runs of one recipe on one data set end with the same result
whatever the hardware was, so its hash (`recipe_hash`) stands in every checkpoint and a checkpoint of another recipe is
refused.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated

from pydantic import Field, PositiveInt

from resnet_dist.config.base import Section
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


def recipe_hash(recipe: Recipe) -> str:
    """16 hex digits of the SHA-256 of the recipe's canonical JSON (sorted keys, defaults filled in)."""
    canonical = json.dumps(recipe.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
