"""Digests of every micro-batch of a run: `python batch_digests.py JSON`, as a separate process.

Batches are taken as in training (`steps_from`, `mix`), with every augmentation, mixup and CutMix.
"""

from __future__ import annotations

import hashlib
import json
import sys
from contextlib import closing
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from pydantic import TypeAdapter
from torch.nn.functional import one_hot

from resnet_dist.config.recipe import Mixing, TrainTransform
from resnet_dist.data.decoder import ImageSettings
from resnet_dist.data.loader import BetonLoader
from resnet_dist.data.mixing import mix
from resnet_dist.data.order import PageShuffle, micro_batch_share
from resnet_dist.training.feed import OpenSplit, steps_from
from resnet_dist.training.launches import cut, launch_numbers

GLOBAL_BATCH, MICRO_BATCH, LAST_STEP = 12, 3, 6
"""Four micro-batches of three; 40 samples make three steps an epoch, and four are left over."""
SEED = 7
AUGMENT = [
    {"kind": "color_jitter", "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
    {"kind": "lighting"},
    {"kind": "rand_augment"},
    {"kind": "trivial_augment_wide"},
    {"kind": "random_erasing"},
]
TRANSFORMS = {
    "random_resized_crop": {"kind": "random_resized_crop", "size": 32, "augment": AUGMENT},
    "scale_crop": {"kind": "scale_crop", "size": 32, "shorter_side": [34, 60], "augment": AUGMENT},
    "pad_crop": {"kind": "pad_crop", "size": 32, "augment": AUGMENT},
}


class Setting(NamedTuple):
    beton: str
    transform: str
    shuffle: str
    decoder: str = "native"


class Leg(NamedTuple):
    """What a group of workers does before it is stopped, or ends."""

    world_size: int
    num_threads: int
    first_step: int = 0
    end_step: int = LAST_STEP


def leg_digests(setting: Setting, leg: Leg) -> dict[str, str]:
    """Of all ranks one after the other: "step/micro-batch" -> digest of pixels, targets and sample ids."""
    found: dict[str, str] = {}
    for rank in range(leg.world_size):
        mine = rank_digests(setting, leg, rank)
        assert not found.keys() & mine.keys()
        found |= mine
    return found


@lru_cache(maxsize=4)
def open_loader(beton: str, transform: str, decoder: Any, num_threads: int) -> BetonLoader:
    crop = TypeAdapter[Any](TrainTransform).validate_python(TRANSFORMS[transform])
    settings = ImageSettings(crop, decoder, seed=SEED)
    return BetonLoader(Path(beton), settings, batch_size=MICRO_BATCH, num_threads=num_threads)


def rank_digests(setting: Setting, leg: Leg, rank: int) -> dict[str, str]:
    loader = open_loader(setting.beton, setting.transform, setting.decoder, leg.num_threads)
    num_samples = len(loader.page_of_sample)
    pages = PageShuffle(np.arange(num_samples) // 5, 3) if setting.shuffle == "page" else None
    train = SimpleNamespace(global_batch_size=GLOBAL_BATCH, micro_batch_size=MICRO_BATCH, num_micro_batches=4)
    mixing = Mixing(mixup_alpha=0.2, cutmix_alpha=1.0)
    data = SimpleNamespace(augmentation_repeats=1, mixing=mixing, overfit_batch=False)
    recipe: Any = SimpleNamespace(seed=SEED, train=train, data=data)
    ctx: Any = SimpleNamespace(rank=rank, world_size=leg.world_size, heartbeat=lambda: None)
    split = OpenSplit(loader, num_samples, pages)
    numbers = partial(launch_numbers, recipe, num_layers=0, image_px=32)
    launches = cut(micro_batch_share(4, rank, leg.world_size), leg.num_threads)  # merged or not: the same pixels
    found = {}
    step = leg.first_step
    while step < leg.end_step:
        epoch, first_step = divmod(step, num_samples // GLOBAL_BATCH)
        with closing(steps_from(split, recipe, ctx, epoch, first_step, launches=launches, numbers=numbers)) as steps:
            for batches in steps:
                for batch in batches:
                    k, targets = len(batch.micro_batches), one_hot(batch.labels, 10).float()
                    mixed = mix(batch.numbers, batch.images, targets, k)
                    parts = zip(*(t.chunk(k) for t in mixed), np.split(batch.sample_ids, k), strict=True)
                    for number, (images, shares, ids) in zip(batch.micro_batches, parts, strict=True):
                        held = b"".join([images.numpy().tobytes(), shares.numpy().tobytes(), ids.tobytes()])
                        found[f"{step}/{number}"] = hashlib.sha256(held).hexdigest()
                step += 1
                if step == leg.end_step:
                    break
    return found


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    answers = [rank_digests(Setting(*s), Leg(*leg), rank) for s, leg, rank in asked]
    assert not {"ffcv", "numba"} & set(sys.modules), "the native path pays for their imports"
    print(json.dumps(answers))
