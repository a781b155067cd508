"""An open run: whatever happens inside its block, its end is written once, by the holder of its lease."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from resnet_dist.config.profile import CheckpointConfig, Profile, Workers
from resnet_dist.errors import Fault, UserError
from resnet_dist.launch import train as train_module
from resnet_dist.launch.cluster import ClusterNode
from resnet_dist.launch.execute import execute, in_process
from resnet_dist.launch.preflight import Prepared, describe_run, prepare
from resnet_dist.launch.progress import EventLog
from resnet_dist.launch.publish import RunResult, read_result, write_result
from resnet_dist.launch.run import Run
from resnet_dist.storage.folder import FolderStorage
from resnet_dist.studies.study import study_recipe
from resnet_dist.tracking.mlflow_run import RunEnd, recorded_end
from resnet_dist.training.checkpoint import METADATA, checkpoint_name, step_of
from resnet_dist.training.context import Observer, TrainingOutcome, WorkerResult
from tests.resnet_dist.tiny_data import write_tiny_digits

pytestmark = pytest.mark.system

EPOCHS, STEPS_PER_EPOCH = 3, 2


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_digits(tmp_path_factory.mktemp("data")).parent


@pytest.fixture(scope="module")
def tracking_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def prepared(data_root: Path, tracking_uri: str, tmp_path: Path) -> Callable[..., Prepared]:
    recipe = study_recipe(
        "resnet8",
        overrides=[
            "model.num_classes=4",
            "train.global_batch_size=8",
            "train.micro_batch_size=8",
            f"train.total_epochs={EPOCHS}",
            "schedule.warmup.epochs=0",
        ],
    )
    profile = Profile(
        workers=Workers(min=1, max=1),
        cpus_per_worker=1,
        data_root=str(data_root),
        storage=str(tmp_path / "runs"),
        tracking_uri=tracking_uri,
    )
    return lambda name="r", **changes: prepare(recipe, profile.model_copy(update=changes), name)


def drive(prepared: Prepared, on: Callable[[Run, Observer], WorkerResult], observer: Observer | None = None) -> Run:
    with Run.open(prepared, brief=True) as run:
        execute(run, on=on, observer=observer)
        assert recorded_end(prepared.run_dir) is None  # until the block is left
    return run


def somewhere(ends: Callable[[], WorkerResult]) -> Callable[[Run, Observer], WorkerResult]:
    """Where a run is executed and ends like this."""

    def on(run: Run, observer: Observer) -> WorkerResult:
        run.starts_on([ClusterNode("here", cpus=1, gpus=0)])
        return ends()

    return on


@pytest.mark.parametrize(
    ("outcome", "reason", "end"),
    [
        ("finished", "", RunEnd("FINISHED", "finished")),
        ("finished", "val/loss rose", RunEnd("FINISHED", "finished early: val/loss rose")),
        ("stopped", "", RunEnd("KILLED", "stopped after step 4")),
        ("diverged", "", RunEnd("FAILED", "diverged")),
    ],
)
def test_the_end_is_what_came_out(
    prepared: Callable[..., Prepared], outcome: TrainingOutcome, reason: str, end: RunEnd
) -> None:
    checked = prepared()
    run = drive(checked, somewhere(lambda: WorkerResult(outcome, step=4, reason=reason)))
    assert recorded_end(checked.run_dir) == end
    run_id = run.record.handle.run_id
    assert MlflowClient(checked.profile.tracking_uri).get_run(run_id).info.status == end.status
    assert f"{outcome} after step 4" in run.events.read()


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (Fault("a node was lost"), RunEnd("FAILED", "failed: a node was lost")),
        (UserError("no such data"), RunEnd("FAILED", "failed: no such data")),
        (KeyboardInterrupt(), RunEnd("KILLED", "interrupted")),
        (ZeroDivisionError(), RunEnd("FAILED", "an unexpected error: ZeroDivisionError")),
    ],
)
def test_the_end_is_what_went_wrong(prepared: Callable[..., Prepared], error: BaseException, end: RunEnd) -> None:
    checked = prepared()

    def fail() -> WorkerResult:
        raise error

    with pytest.raises(type(error)):
        drive(checked, somewhere(fail))
    assert recorded_end(checked.run_dir) == end


def test_a_driver_that_was_replaced_writes_neither_events_nor_an_end(prepared: Callable[..., Prepared]) -> None:
    checked = prepared()

    def is_replaced() -> WorkerResult:
        (checked.run_dir / "driver" / "00002.lease").touch()
        return WorkerResult("finished", step=4)

    with pytest.raises(Fault, match="has taken over"):
        drive(checked, somewhere(is_replaced))
    assert recorded_end(checked.run_dir) is None
    assert "after step" not in EventLog(checked.storage).read()


def test_train_says_how_an_unfinished_run_came_out(
    prepared: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop() -> WorkerResult:
        os.kill(os.getpid(), signal.SIGTERM)
        return WorkerResult("stopped", step=2)

    checked, ends = prepared(), [lambda: WorkerResult("diverged", step=2, reason="loss nan"), stop]
    monkeypatch.setattr(train_module, "ray_session", lambda profile: nullcontext())
    monkeypatch.setattr(train_module, "wait_for_capacity", lambda profile, log: None)
    monkeypatch.setattr(train_module, "ray_group", lambda run, observer: somewhere(ends.pop(0))(run, observer))
    diverged, stopped = (train_module.train(checked.recipe, checked.profile, "r") for _ in range(2))
    assert (diverged.outcome, diverged.reason, diverged.step) == ("diverged", "loss nan", 2)
    assert (stopped.outcome, stopped.stop_signal, stopped.model_uri) == ("stopped", signal.SIGTERM, "")
    assert stopped.run_id == diverged.run_id
    assert recorded_end(checked.run_dir) == RunEnd("KILLED", "stopped after step 2")
    assert "diverged after step 2: loss nan" in EventLog(checked.storage).read()


def test_two_drivers_of_one_run(prepared: Callable[..., Prepared]) -> None:
    checked = prepared()
    with Run.open(checked), pytest.raises(UserError, match="another driver is working on this run"), Run.open(checked):
        pass


def test_no_run_is_trained_in_a_sweeps_folder(prepared: Callable[..., Prepared]) -> None:
    checked = prepared()
    checked.run_dir.mkdir(parents=True)
    (checked.run_dir / "ledger.jsonl").write_text("{}\n")
    refuses(checked, "is a sweep's folder; give another --name")


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again_in_silence(
    prepared: Callable[..., Prepared],
) -> None:
    run_dir, (killed, torn) = prepared().run_dir, (checkpoint_name(1, 2), checkpoint_name(2, 4))
    (run_dir / killed).mkdir(parents=True)  # killed in an upload: its metadata comes last
    checked = prepared()
    assert checked.warnings == (f"{run_dir}/{killed}: was never completely written; ignored",)
    with Run.open(checked):
        describe_run(checked.recipe, checked.profile, "r")
    (run_dir / torn).mkdir()
    (run_dir / torn / METADATA).write_text("torn")
    checked = prepared()
    assert checked.warnings[0] == f"{run_dir}/{torn}: is damaged"
    refuses(checked, rf"none of its 2 checkpoints is complete \(newest: {torn}\); see")
    (run_dir / "result.json").write_text("{}")  # a complete run needs no checkpoint
    assert f"warning: {run_dir}/{torn}: is damaged" in describe_run(checked.recipe, checked.profile, "r")


def refuses(checked: Prepared, why: str) -> None:
    """The run and its dry run are refused alike."""
    with pytest.raises(UserError, match=why), Run.open(checked):
        pass
    with pytest.raises(UserError, match=why):
        describe_run(checked.recipe, checked.profile, checked.name)


class StopsAt(Observer):
    def __init__(self, step: int) -> None:
        self.step, self.evaluations = step, list[int]()

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        assert "val/top1" in metrics
        self.evaluations.append(step)

    def stop_requested(self) -> bool:
        return self.step in self.evaluations


def test_a_run_that_its_observer_stopped_resumes_to_the_same_weights(prepared: Callable[..., Prepared]) -> None:
    def train(name: str, stop_at: int) -> RunEnd:
        return drive(prepared(name), in_process, StopsAt(stop_at)).record.ending.end

    def weights(name: str) -> dict[str, torch.Tensor]:
        newest = max(prepared(name).run_dir.glob("epoch=*"))
        net: dict[str, torch.Tensor] = torch.load(newest / "state.pt", weights_only=True)["net"]
        return net

    never = -1
    assert train("whole", never).status == "FINISHED"
    assert train("parts", stop_at=STEPS_PER_EPOCH) == RunEnd("KILLED", f"stopped after step {STEPS_PER_EPOCH}")
    assert train("parts", never).status == "FINISHED"
    torch.testing.assert_close(weights("parts"), weights("whole"), rtol=0, atol=0)
    assert len(list(prepared("parts").run_dir.glob("epoch=*"))) <= prepared("parts").profile.checkpoint.keep


def test_checkpoints_by_the_clock_are_written_in_process_too(prepared: Callable[..., Prepared]) -> None:
    often = prepared(checkpoint=CheckpointConfig(every_epochs=99, every_minutes=1e-9, keep=99))
    drive(often, in_process)
    # Not after every step: a request of the step before a checkpoint counts as answered.
    assert [step_of(path.name) for path in sorted(often.run_dir.glob("epoch=*"))] == [1, 3, 5, 6]


def test_a_result_round_trips_and_a_damaged_one_says_how_to_repair_it(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path)
    assert read_result(storage) is None
    result = RunResult("n", str(tmp_path), "r", "t", "m", f"{tmp_path}/epoch=002", 22, {"val/top1": 99.0})
    write_result(storage, result)
    assert read_result(storage) == result
    copy = shutil.copytree(tmp_path, tmp_path / "moved")
    moved = read_result(FolderStorage(copy))
    assert moved is not None
    assert (moved.run_dir, moved.checkpoint) == (str(copy), f"{copy}/epoch=002")
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(Fault, match="delete it and run again"):
        read_result(storage)
