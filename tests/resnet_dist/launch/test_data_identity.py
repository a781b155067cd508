"""Every node's betons are the run's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_prep.beton.manifest import load_manifest
from data_prep.convert.config import ConvertSettings
from data_prep.convert.pool import ThisProcess
from data_prep.convert.progress import NoProgress
from data_prep.convert.run import convert
from data_prep.convert.stop import StopFlag
from data_prep.sources.builtin import Synthetic
from resnet_dist.config.loading import load_recipe
from resnet_dist.errors import UserError
from resnet_dist.launch.data_identity import (
    data_digest,
    known_pictures,
    mixed_pictures,
    other_pictures,
    picture_settings,
    require_same_data,
)
from resnet_dist.training.checkpoint import Identity
from resnet_dist.training.job import Job
from resnet_dist.training.plan import RunPlan

RECIPE = Path(__file__).parents[3] / "resnet_dist/recipes/digits_resnet20.yaml"


def beton(path: Path, num_samples: int) -> Path:
    stop = StopFlag()
    source = Synthetic(num_samples=num_samples, min_side=8, max_side=8)
    convert(source, ConvertSettings(), path, pool=ThisProcess(stop), progress=NoProgress(), stop=stop)
    return path


def test_a_node_with_other_betons_is_told_so(tmp_path: Path) -> None:
    train, val = beton(tmp_path / "train.beton", 4), beton(tmp_path / "val.beton", 3)
    identity = Identity("r", data_digest(load_manifest(train), load_manifest(val)))
    job = Job(load_recipe(RECIPE), RunPlan(1, 1, 1, 1, 1, None, 1), identity, train, val, loader_threads=1)
    require_same_data(job)
    other = beton(tmp_path / "other.beton", 5)
    with pytest.raises(UserError, match=r"holds data train=[0-9a-f]{32} val=.*, the run is of train=.*; put the same"):
        require_same_data(replace(job, train_beton=other))


APPLY = {"exif": "apply", "background": [255, 0, 0], "max_side": 500}
PLAIN = {"exif": "ignore", "background": None, "max_side": None}


@pytest.mark.parametrize(
    ("settings", "found", "is_mixed"),
    [
        ({"exif": "apply", "quality": 95}, {**PLAIN, "exif": "apply"}, False),  # as earlier versions wrote it
        ({**APPLY, "quality": 95}, APPLY, False),
        ({}, PLAIN, False),
        ({"inputs": [APPLY, {"inputs": [APPLY, APPLY]}]}, APPLY, False),
        ({"inputs": [APPLY, {"inputs": [APPLY, {**APPLY, "exif": "ignore"}]}]}, {**APPLY, "exif": "ignore"}, True),
        ({"inputs": [APPLY, {**APPLY, "max_side": 64}]}, {**APPLY, "max_side": None}, False),
    ],
)
def test_how_pictures_were_converted_is_read_from_a_manifest(
    tmp_path: Path, settings: Any, found: dict[str, Any], is_mixed: bool
) -> None:
    manifest = replace(load_manifest(beton(tmp_path / "all.beton", 2)), settings=settings)
    assert picture_settings(manifest) == found
    assert (mixed_pictures(manifest, "x.beton") is not None) is is_mixed


@pytest.mark.parametrize("bad", [{"exif": "perhaps"}, {"background": [1, 2]}, {"background": "red"}, {"max_side": -1}])
def test_settings_that_no_conversion_has_are_refused(tmp_path: Path, bad: Any) -> None:
    manifest = replace(load_manifest(beton(tmp_path / "all.beton", 2)), settings={**PLAIN, **bad})
    with pytest.raises(UserError, match="are not ones that data-prep writes"):
        picture_settings(manifest)
    assert known_pictures({**PLAIN, **bad}) is None


def test_data_converted_unlike_is_told() -> None:
    assert other_pictures(APPLY, {**APPLY, "max_side": None}, "a", "b") is None
    assert str(other_pictures(PLAIN, APPLY, "runs/a", "val.beton")).startswith(
        "runs/a was converted with --exif ignore, val.beton with apply: the net sees other pictures"
    )
    assert "--background None" in str(other_pictures(PLAIN, {**PLAIN, "background": [0, 0, 0]}, "a", "b"))
