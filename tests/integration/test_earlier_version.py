"""Files of an earlier version are read and resumed: betons, a run killed at step 6, a killed sweep, MLflow's database.

`earlier_version.tar.xz` was written by commit d23ff8b on the digits: `runs/stopped` and `runs/sweep` by drivers that
were killed with SIGKILL, `runs/finished` (without its checkpoints) by the command that `runs/stopped` had been given.
"""

from __future__ import annotations

import json
import sqlite3
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from resnet_dist.sweeps.ledger import read_ledger, replay
from resnet_dist.tracking.connection import prepare_store

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PROFILE = ("--on", "cluster/profiles/laptop.yaml")
SMALL_RUN = ("--set", "model.name=resnet8", "--set", "train.total_epochs=2", "--set", "train.reduction=exact")


@pytest.fixture
def earlier(cli: Any) -> Any:
    """`cli` with the folder of the earlier version's user, moved to where it is now."""
    with tarfile.open(Path(__file__).with_name("earlier_version.tar.xz")) as archive:
        archive.extractall(cli.folder, filter="data")
    prepare_store(f"sqlite:///{cli.folder}/runs/mlflow.db")  # as the next driver does: it corrects the artifacts' paths
    return cli


def settings(folder: Path) -> list[str]:
    values = {
        "data_root": folder / "data",
        "storage": folder / "runs",
        "tracking_uri": f"sqlite:///{folder}/runs/mlflow.db",
    }
    return [part for key, value in values.items() for part in ("--profile-set", f"{key}={value}")]


def rows(folder: Path, query: str, *values: str) -> list[Any]:
    with sqlite3.connect(folder / "runs" / "mlflow.db") as database:
        return database.execute(query, values).fetchall()


def test_its_beton_is_verified_and_its_model_evaluated(earlier: Any) -> None:
    val = earlier.folder / "data" / "digits" / "val.beton"
    verified = earlier.run([str(BIN / "data-prep"), "verify", str(val), "--decode", "all"])
    assert verified.returncode == 0, verified.stderr
    model_uri = json.loads((earlier.folder / "runs" / "finished" / "result.json").read_text())["model_uri"]
    command = [str(BIN / "resnet-dist"), "evaluate", model_uri, "--data", str(val), "--json"]
    evaluated = earlier.run([*command, "--tracking-uri", f"sqlite:///{earlier.folder}/runs/mlflow.db"])
    assert evaluated.returncode == 0, evaluated.stderr
    finished = json.loads((earlier.folder / "runs" / "finished" / "result.json").read_text())["metrics"]
    metrics = json.loads(evaluated.stdout.splitlines()[-1])
    assert metrics["val/top1"] == pytest.approx(finished["val/top1"], abs=0.6)  # 2 of 355 images


def test_its_killed_run_is_resumed_in_its_mlflow_run(earlier: Any) -> None:
    run = earlier.folder / "runs" / "stopped"
    run_id = json.loads((run / "mlflow_run.json").read_text())["run_id"]
    recipe = "resnet_dist/recipes/digits_resnet20.yaml"
    command = [str(BIN / "resnet-dist"), "train", recipe, *PROFILE, "--name", "stopped", *settings(earlier.folder)]
    done = earlier.run([*command, *SMALL_RUN, "--profile-set", "log_every_steps=1", "--json"])
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["run_id"], result["step"]) == (run_id, 22)
    steps = rows(
        earlier.folder, "select step from metrics where run_uuid = ? and key = 'train/loss' order by step", run_id
    )
    assert [step for (step,) in steps] == list(range(1, 23))
    assert rows(earlier.folder, "select status from runs where run_uuid = ?", run_id) == [("FINISHED",)]
    # CPUs differ in their last digits, and 22 steps enlarge that.
    finished = json.loads((run.parent / "finished" / "result.json").read_text())["metrics"]
    assert result["metrics"]["val/loss"] == pytest.approx(finished["val/loss"], rel=0.1)


def test_its_killed_sweep_is_resumed_from_its_ledger(earlier: Any) -> None:
    sweep = earlier.folder / "runs" / "sweep"
    before = (sweep / "ledger.jsonl").read_text()
    space = (earlier.folder / "space.yaml").read_text().replace("/home/ada/code", str(ROOT))
    (earlier.folder / "space.yaml").write_text(space)
    command = [str(BIN / "resnet-dist"), "tune", str(earlier.folder / "space.yaml"), *PROFILE, "--name", "sweep"]
    done = earlier.run([*command, *settings(earlier.folder), "--json"])
    assert done.returncode == 0, done.stderr
    assert (sweep / "ledger.jsonl").read_text().startswith(before)
    state = replay(read_ledger(sweep))
    assert {name: trial.status for name, trial in state.trials.items()} == {
        "t0000": "finished",
        "t0001": "finished",
        "t0002": "finished",
        "t0003": "finished",
    }
    statuses = rows(earlier.folder, "select name, status from runs where name like 'sweep%' order by name")
    assert statuses == [("sweep", "FINISHED"), *((f"sweep-t000{k}", "FINISHED") for k in range(4))]
