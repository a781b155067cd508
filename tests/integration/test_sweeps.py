"""`resnet-dist tune` as a user runs it: a sweep, its report, its best recipe, kills, mistakes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import ray
from mlflow import MlflowClient
from mlflow.entities import Run

from resnet_dist.cli import main
from resnet_dist.config.loading import load_recipe
from resnet_dist.sweeps.ledger import DriverStarted, SweepState, read_ledger, replay

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SPACE = f"""
base: {ROOT}/resnet_dist/recipes/digits_resnet20.yaml
proxy: {{model.name: resnet8, train.total_epochs: 3}}
space:
  optim.lr: {{kind: grid, values: [0.01, 0.1, 1e9]}}
search: {{kind: grid}}
scheduler: {{kind: asha, first_rung: 0.33, rungs: 1, reduction_factor: 2}}
metric: val/loss
"""


def tune_command(cli: Any, *extra: str, space: str = SPACE) -> list[str]:
    (cli.folder / "space.yaml").write_text(space)
    settings = {
        "data_root": cli.data_root,
        "storage": cli.folder / "runs",
        "tracking_uri": f"sqlite:///{cli.folder}/mlflow.db",
    }
    sets = [part for key, value in settings.items() for part in ("--profile-set", f"{key}={value}")]
    words = [str(cli.folder / "space.yaml"), "--on", "cluster/profiles/laptop.yaml", "--name", "sweep"]
    return [str(BIN / "resnet-dist"), "tune", *words, *sets, *extra]


def state_of(cli: Any) -> SweepState:
    return replay(read_ledger(cli.folder / "runs" / "sweep"))


def mlflow_runs(cli: Any) -> dict[str, Run]:
    """By name. Two runs of one name are an error: no trial may have two."""
    client = MlflowClient(f"sqlite:///{cli.folder}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("resnet-dist").experiment_id])
    named = {run.info.run_name: run for run in runs}
    assert len(named) == len(runs)
    return named


def tune_here(command: list[str], monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    """The command in this process; its exit code."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def require_nothing_twice(state: SweepState) -> None:
    for trial in state.trials.values():
        epochs = [report.epoch for report in trial.reports]
        assert epochs == sorted(set(epochs))


def test_a_sweep_from_space_to_recipe(
    cli: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = tune_command(cli, "--json", "--set", "resources.max_concurrent=1")
    done = cli.run(command)
    assert done.returncode == 0, done.stderr
    assert "3 trials to go, 1 at once" in done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])
    state, sweep_dir = state_of(cli), cli.folder / "runs" / "sweep"
    # lr 1e9 diverges in its first epoch: it is worst, it is not retried, and the sweep continues.
    assert state.trials["t0002"].status == "diverged"
    assert state.trials["t0002"].num_faults == 0
    # The first to reach the rung continues; the second is compared with it and, if worse, not trained a step further.
    assert state.trials["t0000"].status == "finished"
    assert (state.trials["t0001"].status, state.trials["t0001"].epoch) in (("finished", 3.0), ("stopped", 1.0))
    require_nothing_twice(state)

    assert printed["why"] == "all trials ended"
    best = load_recipe(Path(printed["best_recipe"]))
    assert (best.model.name, best.train.total_epochs) == ("resnet20", 15)  # the base, not the proxy
    assert best.optim.lr in (0.01, 0.1)
    for name in ("index.html", "ranking.md", "ranking.csv", "learning_curves.png"):
        assert (sweep_dir / "report" / name).stat().st_size > 100

    runs = mlflow_runs(cli)
    parent = runs["sweep"]
    assert (parent.info.status, parent.data.tags["kind"]) == ("FINISHED", "sweep")
    assert set(runs) == {"sweep", "sweep-t0000", "sweep-t0001", "sweep-t0002"}
    trials = [runs[f"sweep-{name}"] for name in sorted(state.trials)]
    assert {run.data.tags["mlflow.parentRunId"] for run in trials} == {parent.info.run_id}
    words = {"finished": "FINISHED", "stopped": "KILLED", "diverged": "FAILED"}
    assert [run.info.status for run in trials] == [words[state.trials[name].status] for name in sorted(state.trials)]
    assert "val/loss" in trials[1].data.metrics
    artifacts = MlflowClient(f"sqlite:///{cli.folder}/mlflow.db").list_artifacts(parent.info.run_id)
    assert {file.path for file in artifacts} >= {"config", "report"}

    # The same command again: nothing is started, not even Ray; the report is drawn again. What a driver that was
    # killed after the last trial had ended has left undone is done.
    (sweep_dir / "report" / "index.html").unlink()
    client, record = MlflowClient(f"sqlite:///{cli.folder}/mlflow.db"), sweep_dir / "mlflow_run.json"
    record.write_text(json.dumps({k: v for k, v in json.loads(record.read_text()).items() if k != "end"}))
    client.update_run(parent.info.run_id, "RUNNING")
    left_over = sweep_dir / "sweep-t0002" / "best" / "epoch=001-step=00000011"
    left_over.mkdir(parents=True)
    before = read_ledger(sweep_dir)
    assert not tune_here(command, monkeypatch)
    assert not ray.is_initialized()
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == printed
    assert (sweep_dir / "report" / "index.html").exists()
    assert client.get_run(parent.info.run_id).info.status == "FINISHED"
    assert not left_over.exists()
    after = read_ledger(sweep_dir)
    assert after[: len(before)] == before
    assert [type(event) for event in after[len(before) :]] == [DriverStarted]


ANNEALED = SPACE.replace("[0.01, 0.1, 1e9]", "[0.003, 0.01, 0.03, 0.1, 0.2, 0.3]").replace(
    "kind: asha, first_rung: 0.33, rungs: 1, reduction_factor: 2",
    "kind: annealed, rungs: [0.33], cooldown: 0.5, reduction_factor: 6",
)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_five_times_a_sweep_ends_as_if_it_had_not_been(cli: Any) -> None:
    """Every point is judged by its cooldown, whenever the driver is killed, and keeps the weights of it."""
    space = ANNEALED
    patience, ledger = random.Random(0), cli.folder / "runs/sweep/ledger.jsonl"

    def num_reports() -> int:
        return ledger.read_bytes().count(b"TrialReported") if ledger.exists() else 0

    for kill in range(5):
        before = num_reports()
        log = cli.folder / f"driver{kill}.txt"
        with log.open("w") as output:
            process = subprocess.Popen(
                tune_command(cli, space=space),
                cwd=ROOT,
                env={**os.environ, **cli.environment},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        while num_reports() == before:  # every driver gets something done
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        time.sleep(patience.uniform(0, 2))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    last = cli.start(tune_command(cli, space=space))
    _, err = last.communicate(timeout=600)
    assert last.returncode == 0, err
    state = state_of(cli)
    ended = [(trial.kind, trial.status, trial.epoch) for trial in state.trials.values()]
    assert Counter(ended) == {
        ("point", "finished", 3.0): 1,
        ("point", "stopped", 1.0): 5,
        ("cooldown", "finished", 17 / 11): 6,  # 6 steps after the first epoch's 11
    }
    require_nothing_twice(state)
    (best,) = (trial.number for trial in state.trials.values() if trial.status == "finished" and trial.kind == "point")
    scores = {trial.number: trial.metrics["val/loss"] for trial in state.trials.values() if trial.kind == "cooldown"}
    assert best == min(scores, key=scores.__getitem__)
    for number in scores:
        kept = cli.folder / "runs" / "sweep" / (f"sweep-t{number:04d}" + ("" if number == best else "-c1"))
        assert len(list(kept.glob("epoch=*"))) == 1
    runs = mlflow_runs(cli)
    assert len(runs) == 13
    assert not [run for run in runs.values() if run.info.status == "RUNNING"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ctrl_c_saves_and_the_same_command_resumes_with_more_trials(cli: Any) -> None:
    space = SPACE.replace("[0.01, 0.1, 1e9]", "[0.01, 0.1]").replace("total_epochs: 3", "total_epochs: 12")
    process = cli.start(tune_command(cli, space=space))
    ledger = cli.folder / "runs" / "sweep" / "ledger.jsonl"
    for _ in range(3000):
        if ledger.exists() and b"TrialReported" in ledger.read_bytes():
            break
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "stopped: the same command resumes it" in out
    assert {trial.status for trial in state_of(cli).trials.values()} <= {"waiting", "finished", "stopped"}
    done = cli.run(tune_command(cli, space=space))
    assert done.returncode == 0, done.stderr
    assert len([t for t in state_of(cli).trials.values() if t.end is not None]) == 2


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_trials_on_worker_groups_of_two(cli: Any) -> None:
    """There are CPUs for one group at a time, and a group releases its CPUs at once."""
    space = SPACE + "resources: {path: train}\n"
    process = cli.start(tune_command(cli, space=space))
    _, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    assert "3 trials to go, 1 at once" in err
    state = state_of(cli)
    assert state.trials["t0002"].status == "diverged"
    assert sum(trial.num_faults for trial in state.trials.values()) == 0
    assert mlflow_runs(cli)["sweep-t0001"].data.tags["workers"] == "2"


def test_the_dry_run_shows_trials_and_cost(
    cli: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not tune_here(tune_command(cli, "--dry-run", "--set", "resources.images_per_s=100"), monkeypatch)
    out = capsys.readouterr().out
    assert "t0001  optim.lr 0.1  (lr 0.1, weight decay 0.0001, tau 909 epochs)" in out
    assert "cost               9 epochs if none is stopped early, about 6 in the long run (8,652 images)" in out
    assert "at once            2 trials" in out
    assert "rung 1             3 points, to epoch 1: about 3 epochs; keeps about 1" in out
    assert "at 100 images/s a trial (resources.images_per_s)" in out
    assert not (cli.folder / "runs" / "sweep").exists()


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (
            ["--set", "space={optim.lr: {kind: grid, valus: [1]}}"],
            ["space.optim.lr.valus: unknown key", "mean values?"],
        ),
        (["--set", "proxy={model.name: resnet9}"], ["model.name: there is no net 'resnet9'", "resnet18"]),
        (["--set", "space={optim.lr: {kind: grid, values: [-1]}}"], ["the trial of optim.lr -1", "optim.lr"]),
        (["--set", "base=nowhere.yaml"], ["nowhere.yaml: cannot be read"]),
        (["--profile-set", "storage=s3://bucket/runs"], ["a sweep's ledger", "set sweeps to a folder of this machine"]),
        (["--profile-set", "data_root=/nowhere"], ["/nowhere/digits/train.beton: does not exist"]),
    ],
)
def test_mistakes_are_reported_before_anything_starts(
    cli: Any,
    extra: list[str],
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = tune_here(tune_command(cli, *extra), monkeypatch)
    out, err = capsys.readouterr()
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    for part in expected:
        assert part in err
    assert not (cli.folder / "runs" / "sweep").exists()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_node_joins_and_is_lost_in_the_middle(cli: Any, small_head: Any) -> None:
    """A new node gets a trial; the trial of a lost node resumes from its checkpoint."""
    space = SPACE.replace("[0.01, 0.1, 1e9]", "[0.01, 0.02, 0.05, 0.1]").replace("total_epochs: 3", "total_epochs: 20")
    space = space.replace("kind: asha, first_rung: 0.33, rungs: 1, reduction_factor: 2", "kind: fifo")
    every = ("--profile-set", "checkpoint.every_epochs=1")
    process = cli.start(tune_command(cli, *every, space=space), RAY_ADDRESS=small_head.address)

    def wait_until(done: Any) -> None:
        for _ in range(3000):
            assert process.poll() is None, process.communicate()[1]
            if (cli.folder / "runs/sweep/ledger.jsonl").exists() and done(state_of(cli)):
                return
            time.sleep(0.2)
        raise TimeoutError

    def num_running(state: SweepState) -> int:
        return sum(trial.status == "running" and bool(trial.reports) for trial in state.trials.values())

    wait_until(lambda state: num_running(state) == 1)
    with small_head.another_node():
        wait_until(lambda state: num_running(state) == 2)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    state = state_of(cli)
    assert {trial.status for trial in state.trials.values()} == {"finished"}
    assert sum(trial.num_faults for trial in state.trials.values()) == 1
    assert "its process died" in err
    require_nothing_twice(state)
