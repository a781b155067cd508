"""Every node's betons are the run's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.beton.manifest import load_manifest
from data_prep.convert.config import ConvertSettings
from data_prep.convert.pool import ThisProcess
from data_prep.convert.progress import NoProgress
from data_prep.convert.run import convert
from data_prep.convert.stop import StopFlag
from data_prep.sources.synthetic import Synthetic
from resnet_dist.config.loading import load_recipe
from resnet_dist.errors import UserError
from resnet_dist.launch.data_identity import data_digest, require_same_data
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
