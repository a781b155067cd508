"""Every profile of cluster/ loads, says what it is for, and contains no secret and nothing specific to one machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from resnet_dist.config.loading import load_profile
from resnet_dist.config.profile import absolute_paths
from resnet_dist.jobs.submission import Command, require_seen_by_nodes

FOLDER = Path(__file__).parents[2] / "cluster/profiles"
FILES = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_profile_loads_and_its_head_says_what_it_is_for(file: Path) -> None:
    profile = absolute_paths(load_profile(file), Path("/base"))
    assert profile.workers.min >= 1
    assert file.read_text().startswith("# ")
    assert f"`{file.name}`" in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize("file", [f for f in FILES if f.stem != "laptop"], ids=lambda file: file.stem)
def test_a_clusters_profile_can_be_submitted(file: Path) -> None:
    require_seen_by_nodes(Command("train", (), "name"), load_profile(file))


@pytest.mark.parametrize("file", [f for f in FILES if "gpus_per_worker: 1" in f.read_text()], ids=lambda f: f.stem)
def test_gpu_profiles_leave_the_cpus_to_the_loader(file: Path) -> None:
    profile = load_profile(file)
    assert profile.env["OMP_NUM_THREADS"] == "1"
    assert profile.cpus_per_worker >= 6
    # the driver's limit ends before the one of a pod or a job that is stopped (submission)
    assert profile.failure.stop_grace_s <= 180
