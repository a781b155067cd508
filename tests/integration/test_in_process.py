"""A study's training: one process, no Ray, one MLflow run. Interrupted it resumes; finished it is not repeated."""

from __future__ import annotations

from pathlib import Path

import pytest

from resnet_dist.config.profile import Profile, Workers
from resnet_dist.launch.run import Run
from resnet_dist.studies.study import open_study
from resnet_dist.tracking.experiment import list_runs
from resnet_dist.tracking.mlflow_run import recorded_end
from resnet_dist.training.context import LocalContext

STEPS = 22


@pytest.fixture
def profile(digits: Path, tmp_path: Path) -> Profile:
    return Profile(
        workers=Workers(min=1, max=1),
        cpus_per_worker=1,
        data_root=str(digits),
        storage=str(tmp_path / "runs"),
        tracking_uri=f"sqlite:///{tmp_path}/mlflow.db",
    )


def test_an_interrupted_study_continues_in_the_same_runs(
    profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ["train.total_epochs=2"]

    def interrupt(self: LocalContext, step: int, metrics: object) -> None:
        if step == STEPS:
            raise KeyboardInterrupt

    def begin() -> None:
        with monkeypatch.context() as patch, open_study(profile, "trial", "words") as study:
            patch.setattr(LocalContext, "progress", interrupt)
            study.train("plain8", lr=0.1, seed=0, overrides=few)

    with pytest.raises(KeyboardInterrupt):
        begin()
    folder = tmp_path / "runs" / "study-trial"
    end = recorded_end(folder / "plain8-lr0.1-seed0")
    assert end is not None
    assert (end.status, end.reason) == ("KILLED", "interrupted")

    with open_study(profile, "trial", "words") as study:
        first = study.train("plain8", lr=0.1, seed=0, overrides=few)
        again = study.train("plain8", lr=0.1, seed=0, overrides=few)
        study.publish("# Report\n")
    assert first.outcome == "finished"
    assert again.history == first.history
    for key in ("train/loss", "val/top1_error"):
        assert [step for step, _ in first.history.points[key]] == [11, STEPS]
    rows = list_runs(profile.tracking_uri)
    assert sorted((row.name, row.status, row.experiment) for row in rows) == [
        ("plain8-lr0.1-seed0", "FINISHED", "resnet-dist-studies"),
        ("trial", "FINISHED", "resnet-dist-studies"),
    ]
    by_name = {row.name: row for row in rows}
    assert by_name["plain8-lr0.1-seed0"].tags["mlflow.parentRunId"] == by_name["trial"].run_id
    assert (folder / "report" / "trial.md").read_text() == "# Report\n"


def test_a_diverged_run_is_a_result_and_is_not_trained_again(profile: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    diverging = ["train.total_epochs=1", "train.divergence.max_loss=0.1"]
    with open_study(profile, "trial", "words") as study:
        assert study.train("plain8", lr=0.1, seed=0, overrides=diverging).outcome == "diverged"
        monkeypatch.setattr(Run, "open", None)  # a second training would call it
        assert study.train("plain8", lr=0.1, seed=0, overrides=diverging).outcome == "diverged"
