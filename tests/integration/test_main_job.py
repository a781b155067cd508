"""The main job on real processes: the commands of the README, watched from outside."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from typer.testing import CliRunner

from data_prep.beton.reader import BetonReader
from resnet_dist.cli import app

STEPS_PER_EPOCH = 11  # 1,442 training digits in global batches of 128
SHORT = ("--set", "model.name=resnet8", "--set", "train.total_epochs=2", "--profile-set", "checkpoint.every_epochs=1")


def points(folder: Path, key: str) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every point of a metric, by MLflow run."""
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    runs = [run for e in client.search_experiments() for run in client.search_runs([e.experiment_id])]
    return {
        f"{run.info.run_id} {run.info.status}": [
            (point.step, point.value) for point in client.get_metric_history(run.info.run_id, key)
        ]
        for run in runs
    }


def wait_for(folder: Path, pattern: str, process: subprocess.Popen[str], but: Collection[str] = ()) -> None:
    deadline = time.monotonic() + 180.0
    while all(path.name in but for path in folder.glob(pattern)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"no new {pattern} in {folder}"
        time.sleep(0.2)


def last_json(out: str) -> Any:
    result: Any = json.loads(out.strip().splitlines()[-1])
    return result


def called(*words: str) -> Any:
    """What a command prints as JSON, called in this process, which has torch and mlflow already."""
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return last_json(done.stdout)


def test_train_then_evaluate_checkpoint_and_model(cli: Any, head: Any) -> None:
    done = cli.run(cli.train_command(*SHORT, "--json"), RAY_ADDRESS=head.address)
    assert done.returncode == 0, done.stderr
    result = last_json(done.stdout)
    assert result["step"] == 2 * STEPS_PER_EPOCH

    beton = cli.data_root / "digits" / "val.beton"
    evaluations = []
    for model in (result["checkpoint"], result["model_uri"], str(cli.folder / "runs" / "run")):
        words = ["evaluate", model, "--data", str(beton), "--json"]
        evaluations.append(called(*words, "--tracking-uri", f"sqlite:///{cli.folder}/mlflow.db"))
    for evaluation in evaluations:
        assert evaluation["val/top1"] == result["metrics"]["val/top1"]
        assert evaluation["val/loss"] == pytest.approx(result["metrics"]["val/loss"], rel=1e-5)

    (run, loss), *others = points(cli.folder, "train/loss").items()
    assert others == []
    assert run.endswith("FINISHED")
    assert [step for step, _ in loss] == [10, 11, 20, 22]
    ((_, top1),) = points(cli.folder, "val/top1").items()
    assert [step for step, _ in top1] == [11, 22]
    assert top1[-1][1] == result["metrics"]["val/top1"]

    plain_load(result["model_uri"], cli.folder, beton, result["metrics"]["val/top1"])
    recorded(cli, result)

    again = cli.run(cli.train_command(*SHORT, "--json"), RAY_ADDRESS=head.address)
    assert last_json(again.stdout) == result  # a finished run is not trained again
    other = cli.run(cli.train_command(*SHORT, "--set", "optim.lr=0.01"), RAY_ADDRESS=head.address)
    assert other.returncode == 2
    assert "began with another recipe: optim.lr 0.1 -> 0.01" in other.stderr


def recorded(cli: Any, result: dict[str, Any]) -> None:
    """What the driver logs besides the numbers, as `resnet-dist runs` and the artifacts show it."""
    (artifacts,) = (cli.folder / "mlartifacts" / "resnet-dist").glob(f"{result['run_id']}/artifacts")
    files = {str(path.relative_to(artifacts)) for path in artifacts.rglob("*") if path.is_file()}
    plots = {f"plots/{name}.png" for name in ("learning_curves", "learning_rate", "throughput", "confusion")}
    texts = {"config/recipe.yaml", "config/profile.yaml", "code/environment.json", "events.log", "checkpoints.json"}
    assert files >= plots | texts | {"evaluation/confusion.json"}
    checkpoints = json.loads((artifacts / "checkpoints.json").read_text())
    assert {entry["path"] for entry in checkpoints} >= {result["checkpoint"]}
    assert sum(entry["name"].startswith("best/") for entry in checkpoints) == 1
    confusion = json.loads((artifacts / "evaluation/confusion.json").read_text())
    right = sum(number for true, answer, number in confusion["counts"] if true == answer)
    assert 100 * right / sum(number for _, _, number in confusion["counts"]) == result["metrics"]["val/top1"]

    (row,) = called("runs", "--tracking-uri", f"sqlite:///{cli.folder}/mlflow.db", "--json")
    assert (row["name"], row["status"], row["run_id"]) == ("run", "FINISHED", result["run_id"])
    assert row["metrics"]["train/grad_norm"] > 0
    assert (row["tags"]["workers"], row["tags"]["restarts"]) == ("2", "0")
    assert row["params"]["profile.storage"] == str(cli.folder / "runs")
    assert f"--name {result['name']}" in row["tags"]["mlflow.note.content"]


def plain_load(model_uri: str, folder: Path, beton: Path, top1: float) -> None:
    """What a user does with nothing but mlflow, torch and Pillow gives the accuracy that training reported."""
    code = (
        "import io, sys, mlflow, numpy as np, torch; from PIL import Image;"
        "mlflow.set_tracking_uri(sys.argv[1]); model = mlflow.pytorch.load_model(sys.argv[2]);"
        "data = np.load(sys.argv[3]); right = 0;\n"
        "for i in range(0, len(data['labels']), 100):\n"
        "    logits = model(torch.from_numpy(data['images'][i:i + 100]))\n"
        "    right += int((logits.argmax(1).numpy() == data['labels'][i:i + 100]).sum())\n"
        "print(100 * right / len(data['labels']))"
    )
    arrays = folder / "val.npz"
    decode_with_pillow(beton, arrays)
    command = [sys.executable, "-c", code, f"sqlite:///{folder}/mlflow.db", model_uri, str(arrays)]
    out = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert out.returncode == 0, out.stderr
    # Pillow's decoder differs from libffcv's by a grey level or so: at most one of 355 digits may fall otherwise.
    assert float(out.stdout) == pytest.approx(top1, abs=100 / 355 + 1e-9)


def decode_with_pillow(beton: Path, arrays: Path) -> None:
    import io

    import numpy as np
    from PIL import Image

    reader = BetonReader(beton)
    images = [
        np.asarray(Image.open(io.BytesIO(bytes(reader.image_bytes(i)))).convert("RGB")) for i in range(len(reader))
    ]
    np.savez(arrays, images=np.stack(images), labels=np.array([reader.label(i) for i in range(len(reader))]))


@pytest.mark.timeout(600)  # three starts of Ray
def test_a_stopped_then_killed_driver_resumes_where_it_was(cli: Any) -> None:
    """With a Ray of its own, as `make demo` has: SIGTERM saves a checkpoint, SIGKILL takes the driver and its Ray."""
    command = cli.train_command(*SHORT, "--set", "train.total_epochs=6", "--profile-set", "log_every_steps=1")
    run_dir, last_step = cli.folder / "runs" / "run", 6 * STEPS_PER_EPOCH

    process = cli.start(command)
    wait_for(run_dir, "epoch=*", process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    assert "stopped after step" in err
    assert "Traceback" not in err
    ((run, rows),) = points(cli.folder, "train/loss").items()
    assert run.endswith("KILLED")
    assert 0 < len(rows) < last_step

    stopped_at = {path.name for path in run_dir.glob("epoch=*")}
    process = cli.start(command)
    wait_for(run_dir, "epoch=*", process, but=stopped_at)
    process.kill()
    process.communicate(timeout=60)

    done = cli.run([*command, "--json"])
    assert done.returncode == 0, done.stderr
    assert last_json(done.stdout)["step"] == last_step
    ((run, rows),) = points(cli.folder, "train/loss").items()
    assert run.endswith("FINISHED")
    assert [step for step, _ in rows] == list(range(1, last_step + 1))
