"""A study: its MLflow run with report and figures, its trainings as runs below that one, and its batches."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from data_prep.beton.files import make_folder, write_text_atomically
from resnet_dist.code_version import read_code_version
from resnet_dist.config.loading import load_recipe
from resnet_dist.config.profile import Profile
from resnet_dist.config.recipe import Recipe
from resnet_dist.data.batch import Batch
from resnet_dist.data.decoder import eval_images
from resnet_dist.data.loader import BetonLoader
from resnet_dist.data.order import train_order
from resnet_dist.errors import UserError
from resnet_dist.launch.execute import execute, in_process
from resnet_dist.launch.preflight import Prepared, prepare
from resnet_dist.launch.run import Run
from resnet_dist.tracking.mlflow_run import (
    RunHandle,
    end_run,
    end_status,
    log_details,
    log_folder,
    open_run,
    recorded_end,
    recorded_run,
)
from resnet_dist.tracking.spool import History, read_history
from resnet_dist.tracking.tracker import SpoolTracker
from resnet_dist.training.context import TrainingOutcome

_RECIPE = Path(__file__).with_name("digits.yaml")
REPORT = "report"
"""Folder of the report and its figures: in the study's own folder, and among the artifacts of its MLflow run."""


@dataclass(frozen=True)
class StudyRun:
    prepared: Prepared
    outcome: TrainingOutcome
    history: History
    """Every number of the run, from its spool."""


@dataclass(frozen=True)
class Study:
    """An open study. Its trainings are kept and can resume: a study that is started again trains what is missing."""

    name: str
    profile: Profile
    """The trainings' profile: the study's folder is its storage."""
    handle: RunHandle
    tracker: SpoolTracker
    """The study's own numbers, over the study's x-axis as steps: depth for example."""

    @property
    def report_folder(self) -> Path:
        return self.handle.run_dir / REPORT

    def train(
        self, net: str, *, lr: float, seed: int, overrides: Sequence[str] = (), name: str | None = None
    ) -> StudyRun:
        """Trains a net by the studies' recipe, in this process, unless an earlier call has, even if that one diverged.

        Raises UserError, Fault.
        """
        recipe = study_recipe(net, lr=lr, seed=seed, overrides=overrides)
        run_name = name or f"{net}-lr{lr:g}-seed{seed}"
        log(f"{self.name}: {run_name}")
        prepared = prepare(recipe, self.profile, run_name)
        outcome = outcome_before(prepared)
        if outcome is None:
            with Run.open(prepared, parent_run_id=self.handle.run_id) as run:
                outcome = execute(run, on=in_process).outcome
        handle = recorded_run(prepared.storage, self.profile.tracking_uri)
        assert handle is not None
        return StudyRun(prepared, outcome, read_history(prepared.run_dir, handle.run_id))

    def publish(self, report: str) -> Path:
        """Writes the report (Markdown) beside the figures, and logs both to the MLflow run."""
        make_folder(self.report_folder)
        path = self.report_folder / f"{self.name}.md"
        write_text_atomically(path, report)
        self.tracker.flush(timeout_s=60.0)
        log_folder(self.handle, self.report_folder, REPORT)
        return path


def outcome_before(prepared: Prepared) -> TrainingOutcome | None:
    """How this training ended under an earlier command; None if it has to be trained, or trained further."""
    end = recorded_end(prepared.run_dir)
    if end is not None and end.status == "FINISHED":
        return "finished"
    return "diverged" if end is not None and end.reason.startswith("diverged") else None


def study_recipe(net: str, *, lr: float = 0.1, seed: int = 0, overrides: Sequence[str] = ()) -> Recipe:
    """`digits.yaml` for a net."""
    return load_recipe(_RECIPE, [f"model.name={net}", f"optim.lr={lr}", f"seed={seed}", *overrides])


@contextmanager
def open_study(profile: Profile, name: str, description: str) -> Iterator[Study]:
    """Opens the study's MLflow run, or continues it, in the experiment `<profile's>-studies`.

    Raises UserError for a profile whose storage is not a folder, Fault if MLflow does not respond.
    """
    if "://" in profile.storage:
        raise UserError(f"storage {profile.storage}: a study needs a folder: --profile-set storage=FOLDER")
    folder = Path(profile.storage) / f"study-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    below = profile.model_copy(
        update={
            "storage": str(folder),
            "experiment": f"{profile.experiment}-studies",
            "log_every_steps": 10**6,  # only at the end of each epoch
            "checkpoint": profile.checkpoint.model_copy(update={"every_epochs": 7, "keep": 1}),
        }
    )
    code = read_code_version(Path(__file__).parents[2])
    tags = {"kind": "study", **({"mlflow.source.git.commit": code.commit} if code else {})}
    handle = open_run(profile.tracking_uri, below.experiment, name, folder, tags, {})
    log_details(handle, description=description, texts={})
    tracker = SpoolTracker(folder, handle.run_id, profile.tracking_uri)
    with end_status(partial(end_run, handle)), closing(tracker):
        yield Study(name, below, handle, tracker)


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def training_batches(recipe: Recipe, profile: Profile, num_batches: int) -> list[Batch]:
    """The first global batches of epoch 0, without augmentation, on the CPU. Raises UserError if there are none."""
    beton = Path(profile.data_root) / recipe.data.dataset / "train.beton"
    size = recipe.train.global_batch_size
    with closing(BetonLoader(beton, eval_images(recipe), batch_size=size)) as loader:
        order = train_order(
            loader.num_samples,
            seed=recipe.seed,
            epoch=0,
            global_batch_size=size,
            micro_batch_size=size,
            rank=0,
            world_size=1,
        )
        ids = np.resize(order.reshape(-1), num_batches * size)  # repeated, if an epoch is shorter
        return list(loader.epoch(0, ids))
