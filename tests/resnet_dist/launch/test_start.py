"""Runs that start from weights, or from another run's checkpoint."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from resnet_dist.config.loading import to_yaml
from resnet_dist.config.profile import CheckpointConfig, Profile, Workers
from resnet_dist.config.recipe import ForkConfig, InitConfig, recipe_hash
from resnet_dist.errors import UserError
from resnet_dist.launch.execute import execute, in_process
from resnet_dist.launch.preflight import Prepared, prepare
from resnet_dist.launch.run import Run
from resnet_dist.models import build_model
from resnet_dist.storage.base import RunStorage
from resnet_dist.studies.study import study_recipe
from resnet_dist.sweeps.prepare import prepare_sweep
from resnet_dist.training.checkpoint import STATE, load_state
from resnet_dist.training.checkpoint_manager import START, newest_complete, open_checkpoint
from resnet_dist.training.context import Observer, WorkerResult
from tests.resnet_dist.tiny_data import write_tiny_digits

pytestmark = pytest.mark.system

Runs = Callable[..., Prepared]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    write_tiny_digits(folder)
    return folder


@pytest.fixture
def prepared(folder: Path, tmp_path: Path) -> Runs:
    def make(name: str, *overrides: str, epochs: int = 3) -> Prepared:
        given = ["model.num_classes=4", "train.global_batch_size=8", "train.micro_batch_size=8"]
        given += [f"train.total_epochs={epochs}", "schedule.warmup.epochs=0", "train.reduction=exact", *overrides]
        profile = Profile(
            workers=Workers(min=1, max=1),
            cpus_per_worker=1,
            data_root=str(folder),
            storage=str(tmp_path / "runs"),
            tracking_uri=f"sqlite:///{folder}/mlflow.db",
            checkpoint=CheckpointConfig(every_epochs=1, keep=9),
        )
        return prepare(study_recipe("resnet8", overrides=given), profile, name)

    return make


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Of a net of ten classes, under DistributedDataParallel's names."""
    torch.manual_seed(7)
    net = build_model("resnet8", num_classes=10)
    for buffer in net.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    path = tmp_path / "published.pth"
    torch.save({"state_dict": {f"module.{name}": value for name, value in net.state_dict().items()}}, path)
    return path


class StopAfter(Observer):
    def __init__(self, epochs: int) -> None:
        self.left = epochs

    def evaluated(self, step: int, metrics: Any) -> None:
        self.left -= 1

    def stop_requested(self) -> bool:
        return self.left == 0


def train(prepared: Prepared, observer: Observer | None = None) -> WorkerResult:
    with Run.open(prepared, brief=True) as run:
        return execute(run, on=in_process, observer=observer)


def newest_state(storage: RunStorage) -> dict[str, Any]:
    with newest_complete(storage) as found:
        assert found is not None
        return load_state(found.directory, torch.device("cpu"))


def bits(storage: RunStorage) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in newest_state(storage)["net"].items()}


def test_a_run_starts_from_weights_with_a_new_head_and_the_average_too(prepared: Runs, weights: Path) -> None:
    run = prepared("r", f"model.init.weights={weights}", "train.ema.decay=0.9")
    assert run.start is not None
    assert "with a new head" in run.start.lines[0]
    assert run.recipe.model.init is not None
    assert run.recipe.model.init.digest is not None
    with Run.open(run, brief=True), open_checkpoint(run.storage, START) as start:
        net = load_state(start.directory, torch.device("cpu"))["net"]
    published = torch.load(weights, weights_only=True)["state_dict"]
    for name, value in net.items():
        if not name.startswith("fc."):
            assert value.equal(published[f"module.{name}"]), name
    assert net["fc.weight"].shape[0] == 4

    train(prepared("still", f"model.init.weights={weights}", "train.ema.decay=0.9", "optim.lr=1e-30", epochs=1))
    state = newest_state(
        prepared("still", f"model.init.weights={weights}", "train.ema.decay=0.9", "optim.lr=1e-30", epochs=1).storage
    )
    for name in ("layer1.0.conv1.weight", "layer3.0.conv1.weight"):
        assert state["net"][name].equal(published[f"module.{name}"])
        assert state["average"][name].equal(published[f"module.{name}"])


def test_a_stopped_run_resumes_to_the_same_bits_without_the_original_weights(prepared: Runs, weights: Path) -> None:
    undisturbed = prepared("a", f"model.init.weights={weights}")
    train(undisturbed)
    begun = prepared("b", f"model.init.weights={weights}")
    with Run.open(begun, brief=True):  # killed before its first checkpoint, on a machine that loses data
        state = begun.storage.folder / START / STATE
        state.write_bytes(state.read_bytes()[:-100])
    assert train(prepared("b", f"model.init.weights={weights}"), StopAfter(1)).outcome == "stopped"
    weights.unlink()
    resumed = prepared("b", f"model.init.weights={weights}")
    assert train(resumed).outcome == "finished"
    assert bits(resumed.storage) == bits(undisturbed.storage)


def test_the_weights_are_part_of_the_runs_identity_and_their_place_is_not(prepared: Runs, weights: Path) -> None:
    run = prepared("r", f"model.init.weights={weights}")
    train(run, StopAfter(1))
    moved = weights.with_name("moved.pth")
    shutil.copy(weights, moved)
    assert recipe_hash(prepared("r", f"model.init.weights={moved}").recipe) == recipe_hash(run.recipe)
    state = torch.load(weights, weights_only=True)
    state["state_dict"]["module.conv1.weight"] += 1
    torch.save(state, weights)
    with pytest.raises(UserError, match=r"began with another recipe: model.init.digest"):
        prepared("r", f"model.init.weights={weights}")
    with pytest.raises(UserError, match=r"began with another recipe: model.init "):
        prepared("r")
    assert run.recipe.model.init is not None
    with pytest.raises(UserError, match=r"has digest .*it changed"):
        prepared("new", f"model.init.weights={weights}", f"model.init.digest={run.recipe.model.init.digest}")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.init.head=keep"], "head: keep"),
        (["model.name=resnet20"], "weights of|has no|net has"),
        (["model.init.weights=/nowhere.pth"], "/nowhere.pth"),
    ],
)
def test_weights_that_do_not_fit_are_a_mistake_before_the_start(
    prepared: Runs, weights: Path, overrides: list[str], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        prepared("r", f"model.init.weights={weights}", *overrides)


def test_a_fork_with_the_same_recipe_ends_in_the_bits_of_its_parent(prepared: Runs) -> None:
    parent = prepared("parent")
    train(parent)
    fork = prepared("fork", 'fork={"checkpoint": "parent@1"}')
    assert (fork.plan.first_step, fork.plan.schedule_start) == (2, 0)
    assert train(fork).step == 6
    assert bits(fork.storage) == bits(parent.storage)


def test_a_finished_run_gets_more_epochs_as_another_run_and_resumes(prepared: Runs) -> None:
    parent = prepared("parent")
    train(parent)
    before = bits(parent.storage)
    longer = ['fork={"checkpoint": "parent"}', "optim.lr=0.01", "optim.weight_decay=0.001"]
    fork = prepared("longer", *longer, epochs=5)
    assert fork.start is not None
    assert "optim.lr 0.1 -> 0.01" in fork.start.lines[0]
    train(fork, StopAfter(1))
    shutil.rmtree(parent.storage.folder)  # the fork has a copy
    assert train(prepared("longer", *longer, epochs=5)).step == 10
    state = newest_state(fork.storage)
    assert state["optimizer"]["param_groups"][0]["weight_decay"] == 0.001
    assert bits(fork.storage) != before


def test_the_schedule_of_a_fork_runs_over_the_whole_or_over_the_rest(prepared: Runs) -> None:
    train(prepared("parent"), StopAfter(2))
    schedule = ['schedule={"kind": "linear"}', 'fork={"checkpoint": "parent"}']
    whole = prepared("whole", *schedule, epochs=4)
    rest = prepared("rest", *schedule, "fork.schedule=rest", epochs=4)
    assert (whole.plan.first_step, whole.plan.schedule_start) == (4, 0)
    assert (rest.plan.first_step, rest.plan.schedule_start) == (4, 4)
    train(whole)
    train(rest)
    rates = {run.name: newest_state(run.storage)["optimizer"]["param_groups"][0]["lr"] for run in (whole, rest)}
    assert rates["whole"] == pytest.approx(0.1 * (1 - 7 / 8))
    assert rates["rest"] == pytest.approx(0.1 * (1 - 3 / 4))


def test_a_killed_cooldown_ends_in_the_bits_of_one_that_was_not_and_nothing_else_ends_it(prepared: Runs) -> None:
    """Beyond the schedule, in the middle of an epoch, without its parent, and whatever its early stop says."""
    settings = ['schedule={"kind": "plateau"}', 'train.early_stop={"metric": "val/loss", "patience": 1}']
    parent = prepared("parent", *settings, "train.early_stop.patience=9")
    train(parent)
    settings += ["train.max_steps=5", 'fork={"checkpoint": "parent"}', "fork.schedule=cooldown", "fork.cooldown=0.75"]
    quiet, killed = prepared("quiet", *settings), prepared("killed", *settings)
    assert (quiet.plan.first_step, quiet.plan.cooldown_steps) == (6, 4)
    train(quiet)
    assert train(killed, StopAfter(1)).step < 10
    shutil.rmtree(parent.storage.folder)
    assert train(prepared("killed", *settings)).step == 10
    assert bits(killed.storage) == bits(quiet.storage)
    state = newest_state(quiet.storage)
    assert state["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.1 / 4)


@pytest.mark.parametrize(
    ("fork", "said"),
    [
        ({"schedule": "cooldown"}, "schedule: cooldown needs cooldown, its length"),
        ({"cooldown": 0.2}, "cooldown (0.2) needs schedule: cooldown, got whole"),
        ({"schedule": "cooldown", "cooldown": 20}, "less than or equal to 1"),
    ],
)
def test_a_cooldown_says_its_length_and_nothing_else_has_one(fork: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        ForkConfig.model_validate({"checkpoint": "parent", **fork})


def test_a_fork_that_cannot_be_is_a_mistake_before_the_start(prepared: Runs) -> None:
    train(prepared("parent"))
    of_first = 'fork={"checkpoint": "parent@1"}'
    (best,) = (prepared("parent").storage.folder / "best").iterdir()
    for said, *overrides in (
        ("nobody is not a run with a checkpoint", 'fork={"checkpoint": "nobody"}'),
        ("has no checkpoint of epoch 7, but of 1, 2, 3", 'fork={"checkpoint": "parent@7"}'),
        ("has done 6 steps, this run ends after 6; raise train.total_epochs", 'fork={"checkpoint": "parent"}'),
        ('model.name "resnet8" -> "resnet20"', of_first, "model.name=resnet20"),
        ("train.global_batch_size 8 -> 16", of_first, "train.global_batch_size=16"),
        ('optim.name "sgd" -> "lamb"', of_first, "optim.name=lamb"),
        ("has weights alone", f'fork={{"checkpoint": "{best}"}}'),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            prepared("fork", *overrides)


def test_all_trials_of_a_sweep_start_from_the_weights_that_it_found_first(
    prepared: Runs, weights: Path, tmp_path: Path
) -> None:
    run = prepared("unused", f"model.init.weights={weights}")
    base = run.recipe.model_copy(
        update={"model": run.recipe.model.model_copy(update={"init": InitConfig(weights=str(weights))})}
    )
    (tmp_path / "base.yaml").write_text(to_yaml(base))

    def trials(space: str) -> list[InitConfig]:
        (tmp_path / "space.yaml").write_text(f"base: base.yaml\nspace:\n  {space}\nsearch: {{kind: grid}}\n")
        sweep = prepare_sweep(tmp_path / "space.yaml", [], run.profile, "sweep")
        inits = [sweep.builder.proxy(point).model.init for point in sweep.planned or ()]
        return [init for init in inits if init is not None]

    assert run.recipe.model.init is not None
    digest = run.recipe.model.init.digest
    assert [init.digest for init in trials("optim.lr: {kind: choice, values: [0.1, 0.2]}")] == [digest] * 2
    others = trials(f"model.init.weights: {{kind: choice, values: [{weights}, other.pth]}}")
    assert [(init.weights, init.digest) for init in others] == [(str(weights), None), ("other.pth", None)]


def test_a_run_resumes_only_from_what_it_is_told_it_began_with(prepared: Runs, weights: Path) -> None:
    train(prepared("parent"))
    train(prepared("fork", 'fork={"checkpoint": "parent@1"}'), StopAfter(1))
    assert prepared("fork", 'fork={"checkpoint": "parent@1"}').has_begun
    for said, change in (("fork.digest", "fork.checkpoint=parent@2"), ("fork.schedule", "fork.schedule=rest")):
        with pytest.raises(UserError, match=f"began with another recipe: {said}"):
            prepared("fork", 'fork={"checkpoint": "parent@1"}', change)
    shutil.rmtree(prepared("parent").storage.folder)
    assert prepared("fork", 'fork={"checkpoint": "parent@1"}').has_begun
    with pytest.raises(UserError, match=r"fork.schedule"):
        prepared("fork", 'fork={"checkpoint": "parent@1"}', "fork.schedule=rest")
    with pytest.raises(UserError, match=r"is not a run with a checkpoint"):
        prepared("fork", 'fork={"checkpoint": "nobody"}')

    train(prepared("tuned", f"model.init.weights={weights}"), StopAfter(1))
    with pytest.raises(UserError, match=r"there is no net|torchvision:"):
        prepared("tuned", "model.init.weights=torchvision:resnet50.NO_SUCH")


def test_a_run_resumes_although_the_run_that_it_started_from_trains_on(prepared: Runs) -> None:
    train(prepared("parent"), StopAfter(1))
    tuned = prepared("tuned", "model.init.weights=parent", "data.mean=[100, 100, 100]")
    assert tuned.start is not None
    assert any("was trained with data.mean" in line for line in tuned.start.lines)
    train(tuned, StopAfter(1))
    train(prepared("parent"))
    assert prepared("tuned", "model.init.weights=parent", "data.mean=[100, 100, 100]").has_begun
