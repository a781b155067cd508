"""A run whose storage is a bucket: trained, killed, resumed, examined and evaluated by the commands."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from resnet_dist.config.loading import load_profile
from resnet_dist.config.profile import absolute_paths
from resnet_dist.sweeps.prepare import prepare_sweep
from resnet_dist.sweeps.record import end_sweep
from resnet_dist.sweeps.runner import thin
from resnet_dist.sweeps.trial import TrialObserver, TrialSetup, train_trial
from resnet_dist.tracking.mlflow_run import open_run

ROOT = Path(__file__).parents[2]
LAST_STEP = 44
RECIPE = ("--set", "model.name=resnet8", "--set", "train.reduction=exact", "--set", "train.total_epochs=4")


@pytest.fixture
def bucket(object_store: Any) -> Any:
    """A client that looks into the bucket `runs`."""
    object_store.create_bucket(Bucket="runs")
    return object_store


def keys(bucket: Any, prefix: str) -> list[str]:
    return [entry["Key"] for entry in bucket.list_objects_v2(Bucket="runs", Prefix=prefix).get("Contents", [])]


@pytest.mark.slow
def test_a_killed_run_resumes_from_the_bucket(cli: Any, bucket: Any) -> None:
    """SIGKILL of the driver takes its Ray, its workers and their working copies; the newest checkpoint is torn then."""
    often = ("--profile-set", "log_every_steps=1", "--profile-set", "checkpoint.every_steps=5")
    there = ("--profile-set", "storage=s3://runs/digits")
    command = cli.train_command(*RECIPE, *often, *there, "--json", name="r")
    process = cli.start(command)
    deadline = time.monotonic() + 180
    while len(cards := [key for key in keys(bucket, "digits/r/epoch=") if key.endswith("checkpoint.json")]) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in children if "RayTrainWorker" in " ".join(child.cmdline())]
    process.kill()
    process.communicate(timeout=60)
    _, alive = psutil.wait_procs(workers, timeout=60)  # they live for seconds more, and may save once more
    assert workers
    assert not alive
    newest = max(key for key in keys(bucket, "digits/r/epoch=") if key.endswith("checkpoint.json"))
    torn = newest.replace("checkpoint.json", "state.pt")
    bucket.put_object(Bucket="runs", Key=torn, Body=b"torn")

    doctor = [sys.executable, "-m", "resnet_dist", "doctor", "s3://runs/digits/r"]
    found = cli.run(doctor)
    assert found.returncode == 0, found.stderr
    assert f"damaged   {newest.split('/')[2]}" in found.stdout
    assert "the run resumes from epoch=" in found.stdout

    done = cli.run(command)
    assert done.returncode == 0, done.stderr
    assert "is damaged; the checkpoint before it is used" in done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["step"] == LAST_STEP
    assert result["checkpoint"] == "s3://runs/digits/r/epoch=004-step=00000044"
    assert cards
    steps_are_logged_once(cli)

    beton = str(cli.data_root / "digits" / "val.beton")
    for model in ("s3://runs/digits/r", result["checkpoint"]):
        evaluate = [sys.executable, "-m", "resnet_dist", "evaluate", model, "--data", beton, "--json"]
        out = cli.run(evaluate)
        assert out.returncode == 0, out.stderr
        assert json.loads(out.stdout)["val/top1"] == result["metrics"]["val/top1"]


def steps_are_logged_once(cli: Any) -> None:
    code = (
        "import json, sys; from mlflow import MlflowClient; c = MlflowClient(sys.argv[1]);"
        "(r,) = [r for e in c.search_experiments() for r in c.search_runs([e.experiment_id])];"
        "print(json.dumps([m.step for m in c.get_metric_history(r.info.run_id, 'train/loss')]))"
    )
    out = cli.run([sys.executable, "-c", code, f"sqlite:///{cli.folder}/mlflow.db"])
    assert json.loads(out.stdout) == list(range(1, LAST_STEP + 1))


class Unjudged(TrialObserver):
    """Lets every trial continue."""

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        pass


def test_a_sweeps_trial_reads_and_writes_the_bucket(cli: Any, bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the cache of the node that it is on; the ledger's folder is this machine's."""
    for file in (cli.data_root / "digits").iterdir():
        bucket.upload_file(str(file), "runs", f"data/digits/{file.name}")
    space = cli.folder / "space.yaml"
    space.write_text(
        f"base: {ROOT}/resnet_dist/recipes/digits_resnet20.yaml\n"
        "proxy: {model.name: resnet8, train.total_epochs: 1}\n"
        "space: {optim.lr: {kind: grid, values: [0.1]}}\nsearch: {kind: grid}\nmetric: val/loss\n"
    )
    uri = f"sqlite:///{cli.folder}/mlflow.db"
    settings = {
        "data_root": "s3://runs/data",
        "cache": cli.folder / "cache",
        "storage": "s3://runs/swept",
        "sweeps": cli.folder / "sweeps",
        "tracking_uri": uri,
    }
    profile = load_profile(ROOT / "cluster/profiles/laptop.yaml", [f"{k}={v}" for k, v in settings.items()])
    sweep = prepare_sweep(space, [], absolute_paths(profile, cli.folder), "sweep")
    assert sweep.sweep_dir == cli.folder / "sweeps" / "sweep"
    parent = open_run(uri, "sweeps", "sweep", sweep.sweep_dir, tags={}, params={})
    assert sweep.planned is not None
    recipe, run = sweep.builder.proxy(sweep.planned[0]), sweep.trial_run("t0000")
    setup = TrialSetup(sweep.trial_profile, parent_run_id=parent.run_id, is_light=True, environment={})
    config = {"trial": "t0000", "run": run, "recipe": recipe.model_dump(mode="json")}
    end = train_trial(config, setup, Unjudged())
    assert (end.outcome, end.step) == ("finished", LAST_STEP // 4)
    assert len(list((cli.folder / "cache").rglob("*.beton"))) == 2

    here = sweep.trial_storage("t0000")
    assert here.location == "s3://runs/swept/sweep/sweep-t0000"
    thin(here, keep=False)
    assert not [name for name in here.names() if name.startswith(("epoch=", "best"))]
    assert keys(bucket, "swept/sweep/sweep-t0000/mlflow_run.json")
    unknown = sweep.trial_storage("t0001")
    end_sweep(parent, [here, unknown], "FINISHED")
    status = MlflowClient(uri).get_run(end.run_id).info.status
    assert status == "FINISHED"  # not taken for one without a driver
    assert not keys(bucket, "swept/sweep/sweep-t0001")
