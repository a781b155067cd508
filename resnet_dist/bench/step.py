"""`resnet-dist bench step`: what a training step of this project costs beside a bare PyTorch DDP loop.

The same model, batch, optimizer and process layout; both loops and `exact` run in turns in the same processes, so each
round gives a ratio that what else the machine does hardly touches.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from statistics import median

from resnet_dist.bench.step_process import ARMS, Settings
from resnet_dist.errors import Fault

_LIMIT_S = 3600.0
_NAMES = {
    "bare": "bare PyTorch DDP loop",
    "fast": "this project, reduction: fast",
    "exact": "this project, reduction: exact",
}


def bench_step(settings: Settings) -> str:
    """A Markdown table. Raises Fault if a process fails."""
    return table(settings, run_processes(settings))


def run_processes(settings: Settings) -> dict[str, list[float]]:
    """Seconds a step of every round, by arm, as rank 0 saw them."""
    with tempfile.TemporaryDirectory(prefix="resnet-dist-bench-") as folder:
        workers = [
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "resnet_dist.bench.step_process"),
                    *(json.dumps(settings), str(rank), f"{folder}/store"),
                ],
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(settings.world_size)
        ]
        try:
            outputs = [worker.communicate(timeout=_LIMIT_S)[0] for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
    if any(worker.returncode for worker in workers):
        raise Fault("a process of the benchmark failed; its reason stands above")
    times: dict[str, list[float]] = json.loads(outputs[0].splitlines()[-1])
    return times


def table(settings: Settings, times: Mapping[str, Sequence[float]]) -> str:
    """Median step, and the median over the rounds of its ratio to the bare loop's, with the quartiles."""
    layout = (
        f"{settings.world_size} workers of one thread, {settings.model} at {settings.image_size} px, a step of "
        f"{settings.micro_batches} x {settings.micro_batch_size} images a worker, {settings.rounds} rounds of "
        f"{settings.steps} steps"
    )
    lines = [layout, "", "| | step, ms | relative to the bare loop (quartiles over rounds) |", "|---|---|---|"]
    for arm in ARMS:
        ratios = sorted(ours / bare for ours, bare in zip(times[arm], times["bare"], strict=True))
        quarter = len(ratios) // 4
        spread = f" ({ratios[quarter]:.3f} to {ratios[-1 - quarter]:.3f})" if arm != "bare" else ""
        lines.append(f"| {_NAMES[arm]} | {1e3 * median(times[arm]):.1f} | {median(ratios):.3f}{spread} |")
    return "\n".join(lines)
