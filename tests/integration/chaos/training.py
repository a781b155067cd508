"""A short exact run on the lab's cluster, as a user starts it; its progress is read from its storage."""

from __future__ import annotations

import hashlib
import json
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from lab import BIN, ROOT, Lab

EPOCHS = 8
LAST_STEP = EPOCHS * 11  # 1,442 training digits in global batches of 128
RECIPE = {
    "model.name": "resnet8",
    "train.reduction": "exact",
    "train.micro_batch_size": "32",  # four a step: three workers have uneven shares
    "train.total_epochs": str(EPOCHS),
    "eval.every_epochs": "4",
}
LIMITS = {
    "log_every_steps": "1",
    "register_models": "false",
    "checkpoint.every_steps": "10",
    "checkpoint.every_epochs": "1000",
    "checkpoint.keep": "2",
    "resize_every_s": "20",
    "failure.max_failures": "50",  # a machine as loaded as this one looks dead at times
    "failure.max_controller_failures": "5",
    "failure.collective_timeout_s": "30",
    "failure.progress_timeout_s": "120",
    "failure.wait_for_resources_s": "300",
    "failure.stop_grace_s": "120",
    "failure.storage_timeout_s": "240",
    "failure.driver_timeout_s": "20",
}


class Training:
    """One run, which may take several commands."""

    def __init__(self, lab: Lab, shared: Path, folder: Path, workers: str) -> None:
        """`shared` holds the data and MLflow's database, `folder` everything of this run."""
        self.lab = lab
        self.folder = folder
        folder.mkdir()
        self.ballast = folder / "ballast"
        self.run_dir = folder / "runs" / folder.name
        self.log = folder / "driver.log"
        self._database = shared / "mlflow.db"  # one for all rounds: making its tables takes seconds
        profile = {
            **LIMITS,
            "workers": workers,
            "data_root": shared / "data",
            "storage": folder / "runs",
            "tracking_uri": f"sqlite:///{self._database}",
        }
        self.command = [
            *("resnet_dist/recipes/digits_resnet20.yaml", "--on", "cluster/profiles/laptop.yaml"),
            *("--name", folder.name),
            *(part for key, value in profile.items() for part in ("--profile-set", f"{key}={value}")),
            *(part for key, value in RECIPE.items() for part in ("--set", f"{key}={value}")),
        ]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """The command, on the lab's head."""
        self.process = self.another()

    def another(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                self.lab.head.inside([str(BIN / "resnet-dist"), "train", *self.command]),
                cwd=ROOT,
                env={**self.lab.environment(), "RAY_ADDRESS": self.lab.address},
                stdout=log,
                stderr=log,
            )

    def step(self) -> int:
        """The newest step that the run's spool knows of."""
        newest = 0
        for segment in self.run_dir.glob("tracking/*/*.jsonl"):
            for line in segment.read_bytes().splitlines()[-3:]:
                try:
                    newest = max(newest, json.loads(line).get("step", 0))
                except ValueError:
                    continue  # half a line
        return newest

    def wait_for(self, condition: Callable[[], bool], limit_s: float) -> float | None:
        """Seconds until `condition` held; None if the command ended before. Raises AssertionError at the limit."""
        began_s = time.monotonic()
        while not condition():
            if self.process is None or self.process.poll() is not None:
                return None
            assert time.monotonic() - began_s < limit_s, f"nothing for {limit_s:g} s:\n{self.tail()}"
            time.sleep(0.05)
        return time.monotonic() - began_s

    def finish(self, limit_s: float) -> int:
        """The command's exit code. Kills it and raises AssertionError at the limit."""
        assert self.process is not None
        try:
            return self.process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"the command did not end within {limit_s:g} s:\n{self.tail()}") from None

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def tail(self) -> str:
        return self.log.read_text()[-3000:]

    def leases(self) -> set[str]:
        """The drivers that have held this run."""
        return {path.name for path in self.run_dir.glob("driver/*.lease")}

    def events(self) -> list[str]:
        path = self.run_dir / "events.log"
        return path.read_text().splitlines() if path.exists() else []

    def digest(self) -> str:
        return digest(self.run_dir)

    def points(self) -> dict[str, list[tuple[int, float]]]:
        """(step, value) of every point that MLflow holds of the curves that must not depend on a fault."""
        run_id = json.loads((self.run_dir / "mlflow_run.json").read_text())["run_id"]
        with sqlite3.connect(self._database, timeout=60) as database:
            (status,) = database.execute("select status from runs where run_uuid = ?", [run_id]).fetchone()
            assert status == "FINISHED", status
            query = "select key, step, value from metrics where run_uuid = ? order by key, step"
            rows = database.execute(query, [run_id]).fetchall()
        found: dict[str, list[tuple[int, float]]] = {}
        for key, step, value in rows:
            if key.startswith(("train/", "val/")):
                found.setdefault(key, []).append((step, value))
        return found


def digest(run_dir: Path) -> str:
    """Of every bit of the last checkpoint's weights and optimizer state."""
    newest = max(run_dir.glob("epoch=*"))
    assert newest.name.endswith(f"step={LAST_STEP:08d}"), newest
    state = torch.load(newest / "state.pt", weights_only=True)
    hasher = hashlib.sha256()
    for key, value in state["net"].items():
        hasher.update(key.encode() + value.contiguous().numpy().tobytes())
    for number, slots in sorted(state["optimizer"]["state"].items()):
        hasher.update(str(number).encode() + slots["momentum_buffer"].contiguous().numpy().tobytes())
    return hasher.hexdigest()[:16]


def make_data(root: Path) -> Path:
    """A data root with the digits."""
    folder = root / "digits"
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        target = folder / f"{split}.beton"
        if not target.exists():
            command = [str(BIN / "data-prep"), "convert", "--source", "digits", "--workers", "0"]
            subprocess.run([*command, "--output", str(target)], check=True, timeout=300, capture_output=True)
    return root


def alone(run_dir: Path, data_root: Path) -> str:
    """The digest of the same run in one process without Ray."""
    program = ROOT / "tests" / "integration" / "one_process.py"
    sets = [part for key, value in RECIPE.items() for part in ("--set", f"{key}={value}")]
    subprocess.run([sys.executable, str(program), str(data_root), str(run_dir), *sets], check=True, timeout=900)
    return digest(run_dir)
