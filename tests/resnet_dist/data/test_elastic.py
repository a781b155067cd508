"""The promise batch by batch: workers, threads, stops and processes never change a pixel, with all features on."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from resnet_dist.config.recipe import CenterCrop
from resnet_dist.data.order import eval_batches
from tests.resnet_dist.data import batch_digests
from tests.resnet_dist.data.batch_digests import LAST_STEP, Leg, Setting, leg_digests

pytestmark = pytest.mark.system

CROPS = ["random_resized_crop", "scale_crop", "pad_crop"]
SHUFFLES = ["full", "page"]
WORLDS = [1, 2, 3, 4]
"""Four micro-batches a step: three workers have uneven shares."""


@pytest.fixture(scope="module", autouse=True)
def _loaders() -> Iterator[None]:
    """One loader serves every leg of its thread count, as a process' loader serves every epoch."""
    yield
    batch_digests.open_loader.cache_clear()


@pytest.fixture(scope="module")
def setting(photo_beton: Path, tile_beton: Path):  # type: ignore[no-untyped-def]
    def one(crop: str, shuffle: str, decoder: str = "native") -> Setting:
        return Setting(str(tile_beton if crop == "pad_crop" else photo_beton), crop, shuffle, decoder)

    return one


@cache
def alone(setting: Setting) -> dict[str, str]:
    """One worker with one thread, from the first step to the last."""
    digests = leg_digests(setting, Leg(1, 1))
    assert len(digests) == len(set(digests.values())) == 4 * LAST_STEP
    return digests


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("crop", CROPS)
def test_every_world_size_shows_the_same_batches(crop: str, shuffle: str, num_threads: int, setting) -> None:  # type: ignore[no-untyped-def]
    for world_size in WORLDS:
        assert leg_digests(setting(crop, shuffle), Leg(world_size, num_threads)) == alone(setting(crop, shuffle))


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("crop", CROPS)
def test_a_run_stops_and_resumes_at_any_step_with_any_number_of_workers(
    crop: str, shuffle: str, number: int, setting
) -> None:  # type: ignore[no-untyped-def]
    draw, step, digests = random.Random(f"{crop} {shuffle} {number}"), 0, {}
    while step < LAST_STEP:
        end = draw.randint(step + 1, LAST_STEP)
        leg = Leg(draw.choice(WORLDS), draw.choice([1, 2]), step, end)
        digests |= leg_digests(setting(crop, shuffle), leg)
        step = end
    assert digests == alone(setting(crop, shuffle))


@pytest.mark.slow
def test_libffcvs_pixels_are_as_elastic(setting) -> None:  # type: ignore[no-untyped-def]
    ffcv = setting("random_resized_crop", "full", "ffcv")
    assert leg_digests(ffcv, Leg(3, 2, 1, 5)).items() <= alone(ffcv).items()


def test_other_processes_show_the_same_batches(setting) -> None:  # type: ignore[no-untyped-def]
    """Two ranks, each in a process of its own, from step 2 on; strings hash otherwise in each."""
    settings = [setting(crop, shuffle) for crop in CROPS for shuffle in SHUFFLES]
    processes = [
        subprocess.Popen(
            [sys.executable, batch_digests.__file__, json.dumps([(s, Leg(2, rank + 1, 2), rank) for s in settings])],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    answers = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    for one, other, asked in zip(*answers, settings, strict=True):
        assert not one.keys() & other.keys()
        assert one | other == {key: value for key, value in alone(asked).items() if int(key.partition("/")[0]) >= 2}


def test_evaluation_shows_every_sample_once_in_the_same_batches(photo_beton: Path, open_loader) -> None:  # type: ignore[no-untyped-def]
    """Five batches of 7 and a short one of 5 for 1 to 8 workers: some get none."""
    crop = CenterCrop(kind="center_crop", size=32, resize=36)
    seen = []
    for world_size in range(1, 9):
        shown = []
        for rank in range(world_size):
            mine = eval_batches(40, 7, rank, world_size)
            loader = open_loader(photo_beton, crop, batch_size=7, num_threads=1 + rank % 2)
            shown += loader.epoch(0, np.arange(mine.start * 7, min(mine.stop * 7, 40)))
        assert [i for batch in shown for i in batch.sample_ids] == list(range(40))
        assert sum(len(batch.images) for batch in shown) == 40
        seen.append(torch.cat([batch.images for batch in shown]))
    assert all(torch.equal(one, seen[0]) for one in seen)
