"""`resnet-dist bench sweep`: trials per minute of the light path and of one TorchTrainer per trial, in turns.

Both run the user's command over the same points. No trial is stopped early, and each is trained by one process: on the
train path, a worker group of one, started for this trial.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from resnet_dist.bench.paired import markdown, rotated
from resnet_dist.errors import Fault
from resnet_dist.sweeps.ledger import Event, TrialEnded, TrialStarted, read_ledger

PATHS = ("light", "train")
_LIMIT_S = 3600.0


@dataclass(frozen=True)
class Measured:
    num_trials: int
    command_s: float
    """From the command to its end, report included."""
    per_minute: float
    """Trials per minute, from the end of the first trials (as many as run at once) to that of the last."""


def bench_sweep(
    space: Path, profile: Path, profile_sets: Sequence[str], num_trials: Mapping[str, int], rounds: int
) -> str:
    """A Markdown table. `num_trials`: path -> trials of a sweep, more than run at once. Raises Fault if one fails."""
    rows = []
    rates: dict[str, list[tuple[float, float]]] = {path: [] for path in PATHS}
    for number in range(rounds):
        for path in rotated(PATHS, number):
            seen = _measure(space, profile, profile_sets, path, num_trials[path])
            rates[path].append((60 * seen.num_trials / seen.command_s, seen.per_minute))
            cells = [f"{rate:.2f}" for rate in rates[path][-1]]
            rows.append([str(number + 1), path, str(seen.num_trials), f"{seen.command_s:.1f}", *cells])
    ratios = [
        f"{light[0] / train[0]:.1f} with start-up, {light[1] / train[1]:.1f} without"
        for light, train in zip(rates["light"], rates["train"], strict=True)
    ]
    head = ["round", "path", "trials", "command, s", "trials a minute, start-up included", "without it"]
    return f"{markdown(head, rows)}\n\nlight / train: {'; '.join(ratios)}"


def _measure(space: Path, profile: Path, profile_sets: Sequence[str], path: str, num_trials: int) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        ours = {"workers": "1", "storage": folder, "tracking_uri": f"sqlite:///{folder}/mlflow.db"}
        values = {"resources.path": path, "trials": str(num_trials), "scheduler": "{kind: fifo}"}
        command = [sys.executable, "-m", "resnet_dist", "tune", str(space), "--on", str(profile), "--name", "sweep"]
        for setting in [*profile_sets, *(f"{key}={value}" for key, value in ours.items())]:
            command += ["--profile-set", setting]
        for key, value in values.items():
            command += ["--set", f"{key}={value}"]
        began_s = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
        command_s = time.perf_counter() - began_s
        if done.returncode:
            raise Fault(f"the sweep on the {path} path failed: {done.stderr.strip()}")
        return Measured(num_trials, command_s, steady_rate(read_ledger(Path(folder) / "sweep")))


def steady_rate(events: Sequence[Event]) -> float:
    """Trials per minute once processes are up: of those that end after the first ones that ran side by side.

    Raises Fault if a sweep had no further trials.
    """
    running = at_once = 0
    ends_s: list[float] = []
    for event in events:
        if isinstance(event, TrialStarted):
            running += 1
            at_once = max(at_once, running)
        elif isinstance(event, TrialEnded):
            running -= 1
            ends_s.append(event.time_s)
    if len(ends_s) <= at_once:
        raise Fault(f"{len(ends_s)} trials, {at_once} at once, are too few to measure a rate; give more trials")
    return 60 * (len(ends_s) - at_once) / (ends_s[-1] - ends_s[at_once - 1])
