"""Images of the studies' data, without augmentation, for measurements on a single batch."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from data_prep.beton.manifest import load_manifest
from resnet_dist.config.profile import Profile
from resnet_dist.config.recipe import Recipe
from resnet_dist.data.batch import Batch
from resnet_dist.data.loader import BetonLoader
from resnet_dist.data.order import train_order


def training_batches(recipe: Recipe, profile: Profile, num_batches: int) -> list[Batch]:
    """The first global batches of epoch 0, on the CPU. Raises UserError if the data are not there."""
    beton = Path(profile.data_root) / recipe.data.dataset / "train.beton"
    manifest = load_manifest(beton)
    size = recipe.train.global_batch_size
    order = train_order(
        manifest.num_samples,
        seed=recipe.seed,
        epoch=0,
        global_batch_size=size,
        micro_batch_size=size,
        rank=0,
        world_size=1,
        start_step=0,
    ).reshape(-1)
    ids = np.resize(order, num_batches * size)  # over and over, if an epoch is shorter
    loader = BetonLoader(
        beton,
        manifest,
        recipe.data.eval,
        decoder=recipe.data.decoder,
        batch_size=size,
        seed=recipe.seed,
        num_threads=1,
        device=torch.device("cpu"),
    )
    with closing(loader):
        return list(loader.epoch(0, ids))
