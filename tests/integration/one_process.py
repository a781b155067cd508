"""The digits recipe in one process without Ray: the run that faults are compared with. Started by test_faults.py.

Usage: one_process.py DATA_ROOT RUN_DIR [--set KEY=VALUE ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

from resnet_dist.config.loading import load_recipe
from resnet_dist.config.profile import Profile, Workers
from resnet_dist.launch.preflight import prepare
from resnet_dist.storage.folder import FolderStorage
from resnet_dist.tracking.tracker import Tracker
from resnet_dist.training.context import LocalContext, TrainingJob
from resnet_dist.training.loop import run_worker

RECIPE = Path(__file__).parents[2] / "resnet_dist" / "recipes" / "digits_resnet20.yaml"


def main(data_root: Path, run_dir: Path, overrides: list[str]) -> None:
    recipe = load_recipe(RECIPE, overrides)
    workers = Workers(min=1, max=1)
    uri, storage = "sqlite:////unused.db", str(run_dir.parent)
    profile = Profile(workers=workers, cpus_per_worker=1, data_root=str(data_root), storage=storage, tracking_uri=uri)
    prepared = prepare(recipe, profile, run_dir.name)
    run_dir.mkdir(parents=True)
    job = TrainingJob(
        recipe, prepared.plan, prepared.identity, prepared.train_beton, prepared.val_beton, loader_threads=1
    )
    result = run_worker(job, LocalContext(FolderStorage(run_dir)), Tracker())
    assert result.outcome == "finished"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [a for a in sys.argv[3:] if a != "--set"])
