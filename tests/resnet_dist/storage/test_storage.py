"""What every storage promises: complete or not there, one owner of a name, nothing lost that was said to be safe."""

from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path

import pytest
import torch

from resnet_dist.doctor.run import examine, repair, verdict
from resnet_dist.errors import Fault, UserError
from resnet_dist.launch.lease import take
from resnet_dist.storage.base import RunStorage
from resnet_dist.storage.locations import open_storage, split
from resnet_dist.tracking.spool import read_history, spool_folder
from resnet_dist.tracking.tracker import Spool
from resnet_dist.training.checkpoint import (
    METADATA,
    STATE,
    CheckpointMetadata,
    Identity,
    checkpoint_name,
    load_state,
    write_checkpoint,
)
from resnet_dist.training.checkpoint_manager import keep_if_best, newest_complete, open_best

pytestmark = pytest.mark.system

MINE = Identity("a" * 16, "d")


def commit(storage: RunStorage, step: int, value: float = 0.0) -> str:
    name = checkpoint_name(step // 10, step)
    metadata = CheckpointMetadata(step // 10, step, MINE, {}, {"val/top1": value}, files={})
    state = {"net": {"w": torch.full((3,), value)}}
    storage.commit(name, partial(write_checkpoint, state=state, metadata=metadata), last=METADATA)
    return name


def damage(storage: RunStorage, name: str) -> None:
    """What a disk, or a half upload under old metadata, may leave."""
    storage.pull()
    path = storage.folder / name / STATE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"rot")
    storage.upload(path)


def newest(location: str) -> tuple[str | None, tuple[str, ...]]:
    with newest_complete(open_storage(location)) as found:
        return (found.name, found.warnings) if found else (None, ())


def test_a_checkpoint_comes_back(storage: RunStorage, location: str) -> None:
    assert newest(location) == (None, ())
    name = commit(storage, 20, 2.5)
    commit(storage, 10)
    with newest_complete(open_storage(location)) as found:
        assert found is not None
        assert (found.name, found.metadata.step, found.metadata.identity) == (name, 20, MINE)
        assert torch.equal(load_state(found.directory, torch.device("cpu"))["net"]["w"], torch.full((3,), 2.5))


def test_a_checkpoint_of_the_same_name_is_replaced(storage: RunStorage, location: str) -> None:
    commit(storage, 10, 1.0)
    commit(storage, 10, 2.0)
    with newest_complete(open_storage(location)) as found:
        assert found is not None
        assert found.metadata.metrics == {"val/top1": 2.0}


@pytest.mark.parametrize("lost", [STATE, METADATA])
def test_a_torn_newest_gives_way_with_a_warning(storage: RunStorage, location: str, lost: str) -> None:
    old, new = commit(storage, 10), commit(storage, 20)
    storage.remove(f"{new}/{lost}")
    name, warnings = newest(location)
    assert name == old
    assert len(warnings) == 1
    assert f"{location}/{new}" in warnings[0]


def test_a_failed_write_leaves_nothing(storage: RunStorage) -> None:
    def fail(directory: Path) -> None:
        (directory / STATE).write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        storage.commit(checkpoint_name(1, 10), fail, last=METADATA)
    assert storage.names() == []


def test_the_best_weights(storage: RunStorage, location: str) -> None:
    for step, top1, kept in ((10, 50.0, True), (20, 50.0, False), (30, 60.0, True)):
        metadata = CheckpointMetadata(step // 10, step, MINE, {}, {"val/top1": top1}, files={})
        assert keep_if_best(storage, {"w": torch.tensor(top1)}, metadata) is kept
    assert open_storage(location).names("best") == ["epoch=003-step=00000030"]
    with open_best(open_storage(location), MINE) as best:
        assert best is not None
        assert best.metadata.metrics == {"val/top1": 60.0}
    assert newest(location) == (None, ())


@pytest.mark.parametrize(("best_by", "step"), [(None, 20), ("top1", 20), ("balanced_top1", 30), ("loss", 10)], ids=str)
def test_the_recipe_says_by_what_weights_are_the_best(tmp_path: Path, best_by: str | None, step: int) -> None:
    storage, recipe = open_storage(str(tmp_path)), {"eval": {"best_by": best_by}} if best_by else {}
    for number, (top1, balanced, loss) in enumerate([(50.0, 30.0, 0.5), (60.0, 20.0, 0.9), (55.0, 40.0, 0.7)], 1):
        metrics = {"val/top1": top1, "val/balanced_top1": balanced, "val/loss": loss}
        keep_if_best(storage, {}, CheckpointMetadata(number, 10 * number, MINE, recipe, metrics, files={}))
    with open_best(storage, MINE) as best:
        assert best is not None
        assert best.metadata.step == step


def test_the_doctor_lists_and_repairs(storage: RunStorage, location: str) -> None:
    storage.pull()
    complete, rotten, torn = (commit(storage, step, 97.25) for step in (10, 20, 30))
    damage(storage, rotten)
    storage.remove(f"{torn}/{METADATA}")
    path = storage.folder / "mlflow_run.json"
    path.write_text('{"run_id": "r"}')
    storage.upload(path)
    doctor = open_storage(location)
    findings = examine(doctor)
    assert [(f.name, f.state) for f in findings] == [
        (torn, "damaged"),
        (rotten, "damaged"),
        (complete, "ok"),
        ("mlflow_run.json", "ok"),
    ]
    assert verdict(findings) == f"the run resumes from {complete}"
    assert [f.name for f in repair(doctor, findings)] == [torn, rotten]
    assert [(f.name, f.state) for f in examine(open_storage(location))] == [(complete, "ok"), ("mlflow_run.json", "ok")]


def test_a_small_file_reaches_other_machines(storage: RunStorage, location: str) -> None:
    assert storage.read("notes.txt") is None
    storage.pull()
    path = storage.folder / "stacks" / "rank0.txt"
    path.parent.mkdir()
    path.write_text("stack")
    storage.upload(path)
    other = open_storage(location)
    assert other.read("stacks/rank0.txt") == b"stack"
    other.pull()
    assert (other.folder / "stacks" / "rank0.txt").read_text() == "stack"
    another = open_storage(location)
    another.pull("tracking")
    assert another.folder.is_dir()
    if another.folder != storage.folder:  # an object store: only what was asked for
        assert not (another.folder / "stacks").exists()
        another.pull("stacks")
        assert (another.folder / "stacks" / "rank0.txt").read_text() == "stack"


def test_one_process_alone_gets_a_name(storage: RunStorage, location: str) -> None:
    other = open_storage(location)
    for one in (storage, other):
        one.pull()
        (one.folder / "tracking").mkdir(exist_ok=True)
    assert storage.create_exclusive(storage.folder / "tracking" / "00001-00001.jsonl")
    assert not other.create_exclusive(other.folder / "tracking" / "00001-00001.jsonl")


def test_a_driver_reads_its_run_after_it_took_the_lease(storage: RunStorage, location: str) -> None:
    """And the next driver finds it, takes the next number, and removes older ones."""
    for number in (1, 2, 3):
        driver = storage if number == 1 else open_storage(location)
        lease = take(driver, timeout_s=20.0)
        driver.pull()
        lease.token.require_held()
        assert lease.token.number == number
        lease.release()
    assert storage.names("driver") == ["00002.json", "00002.lease", "00003.json", "00003.lease"]


def spool_of(storage: RunStorage) -> Spool:
    return Spool(spool_folder(storage.folder, "r"), storage)


def test_another_machine_reads_durable_spool_lines(storage: RunStorage, location: str) -> None:
    """Also after more than one part's worth, and when the first machine is gone for good."""
    first = spool_of(storage)
    text = "x" * 100_000
    for step in range(1, 11):
        first.metrics({"train/loss": 1.0 / step}, step)
        first.text(f"notes/{step}.txt", text)
        assert first.persist(60)
    second = open_storage(location)
    successor = spool_of(second)
    assert successor.path.name == "00000-00002.jsonl"
    successor.metrics({"train/loss": 5.0}, 10)  # known
    successor.metrics({"train/loss": 0.5}, 11)
    successor.close()
    assert not first.is_newest()
    reader = open_storage(location)
    reader.pull()
    history = read_history(reader.folder, "r")
    assert history.points == {"train/loss": [(s, 1.0 / s) for s in range(1, 11)] + [(11, 0.5)]}
    assert len(history.texts) == 10
    assert set(history.texts.values()) == {text}
    first.close()


def test_storage_travels_to_workers(storage: RunStorage, location: str) -> None:
    again: RunStorage = pickle.loads(pickle.dumps(storage))
    assert again.location == location
    commit(storage, 10)
    assert again.names() == [checkpoint_name(1, 10)]


def test_a_writable_storage_passes_and_stays_clean(storage: RunStorage, location: str) -> None:
    storage.require_writable()
    assert open_storage(split(location)[0]).names() == []


def test_a_bucket_that_is_not_there_is_the_users_to_fix(bucket: str) -> None:
    with pytest.raises(UserError, match=r"storage is not writable.*AWS_ENDPOINT_URL"):
        open_storage("s3://nowhere/runs/run").require_writable()


def test_an_unreachable_store_is_not_damage(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a run whose store is away for a minute would begin at its first step."""
    import fsspec

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(Fault, match="s3://runs/run failed"), newest_complete(open_storage("s3://runs/run")):
        pass
    fsspec.filesystem("s3").clear_instance_cache()


@pytest.mark.parametrize(
    ("location", "why"),
    [
        ("gs://bucket/runs", "gs:// is not supported"),
        ("s3://", "names no bucket"),
        ("s3://key:secret@bucket/runs", "credentials and endpoint come from the environment"),
    ],
)
def test_invalid_storage_locations(location: str, why: str) -> None:
    with pytest.raises(UserError, match=why) as caught:
        open_storage(location)
    assert "secret" not in str(caught.value)


def test_a_path_splits_like_a_url(tmp_path: Path) -> None:
    assert split(f"{tmp_path}/runs/r") == (f"{tmp_path}/runs", "r")
    assert split("s3://bucket/runs/r/") == ("s3://bucket/runs", "r")
