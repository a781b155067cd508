"""Workers are killed and nodes join: the run resumes, and ends with the same bits as an undisturbed one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

EXACT = ("--set", "model.name=resnet8", "--set", "train.reduction=exact", "--set")
SHORT, LONG = (*EXACT, "train.total_epochs=3"), (*EXACT, "train.total_epochs=40")
EVERY_STEP = ("--profile-set", "log_every_steps=1", "--profile-set", "checkpoint.every_steps=3")
FIRST_CHECKPOINT = "epoch=000-step=*"


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = max((folder / "runs" / "run").glob("epoch=*"))
    assert newest.name in ("epoch=003-step=00000033", "epoch=040-step=00000440")
    weights: dict[str, torch.Tensor] = torch.load(newest / "state.pt", weights_only=True)["net"]
    return weights


def workers_of(head: Any) -> list[psutil.Process]:
    """The processes that train on the node of `head`; another Ray of this machine has its own."""
    return [p for p in psutil.Process(head.pid).children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]


def wait_for_checkpoint(run_dir: Path, process: subprocess.Popen[str], limit_s: float = 120.0) -> None:
    deadline = time.monotonic() + limit_s
    while not list(run_dir.glob(FIRST_CHECKPOINT)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def undisturbed(folder: Path, data_root: Path, recipe: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The weights of one worker in one process, without Ray."""
    program = Path(__file__).with_name("one_process.py")
    command = [sys.executable, str(program), str(data_root), str(folder / "alone" / "runs" / "run"), *recipe]
    subprocess.run(command, check=True, timeout=180)
    return final_weights(folder / "alone")


@pytest.mark.parametrize("fault", ["SIGKILL", pytest.param("SIGSTOP", marks=pytest.mark.slow)])
def test_a_lost_worker_changes_nothing(cli: Any, head: Any, fault: str) -> None:
    """Killed, a worker is missed at once; stopped, its peers wait for it until the limit of a collective."""
    limits = ("--profile-set", "failure.collective_timeout_s=10")
    command = cli.train_command(*SHORT, *EVERY_STEP, *limits)
    process = cli.start(command, RAY_ADDRESS=head.address, TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S="3")
    wait_for_checkpoint(cli.folder / "runs" / "run", process)
    workers = workers_of(head)
    assert len(workers) == 2
    os.kill(workers[-1].pid, getattr(signal, fault))
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "attempt 2: the workers were restarted" in err
    expected = undisturbed(cli.folder, cli.data_root, SHORT)
    torch.testing.assert_close(final_weights(cli.folder), expected, rtol=0, atol=0)


@pytest.mark.slow
def test_a_run_grows_when_a_node_comes(cli: Any, small_head: Any) -> None:
    elastic = ("--profile-set", "workers=1..2", "--profile-set", "resize_every_s=5")
    process = cli.start(cli.train_command(*LONG, *EVERY_STEP, *elastic), RAY_ADDRESS=small_head.address)
    wait_for_checkpoint(cli.folder / "runs" / "run", process)
    with small_head.another_node():
        _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "1 workers are up" in err
    assert "2 workers are up (attempt 2" in err
    expected = undisturbed(cli.folder, cli.data_root, LONG)
    torch.testing.assert_close(final_weights(cli.folder), expected, rtol=0, atol=0)
