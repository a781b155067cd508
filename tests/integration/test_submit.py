"""`resnet-dist submit` against a real head: the printed line, the followed job, its stop and its exit code."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BIN = Path(sys.executable).parent

SHORT = ("--set", "model.name=resnet8", "--set", "train.total_epochs=2")
STEPS = 22


def submit_command(cli: Any, head: Any, *extra: str, name: str = "run") -> list[str]:
    """`train`'s words of `cli`, as `submit`'s."""
    resnet_dist, train, *words = cli.train_command(*extra, name=name)
    return [resnet_dist, "submit", train, *words, "--address", head.dashboard, "--python", sys.executable]


@pytest.mark.slow
def test_the_printed_line_trains_from_each_nodes_own_copy(cli: Any, head: Any) -> None:
    cache = cli.folder / "nvme"
    extra = ("--profile-set", f"cache={cache}", "--profile-set", "env={OMP_NUM_THREADS: 1}")
    printed = cli.run(submit_command(cli, head, *SHORT, *extra, "--json", "--dry-run"))
    assert printed.returncode == 0, printed.stderr
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    done = cli.run(["bash", "-c", printed.stdout], PATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f'"step": {STEPS}' in done.stdout
    assert {beton.name for beton in cache.glob("*/*.beton")} == {"train.beton", "val.beton"}


def test_a_users_mistake_there_is_exit_code_2_here(cli: Any, head: Any) -> None:
    done = cli.run(submit_command(cli, head, "--profile-set", "data_root=/nowhere"))
    assert done.returncode == 2, done.stdout + done.stderr
    assert "/nowhere/digits/train.beton: does not exist" in done.stdout


def test_a_missing_cluster_is_reported_at_once(cli: Any) -> None:
    class Nowhere:
        dashboard = "http://127.0.0.1:9"

    done = cli.run(submit_command(cli, Nowhere))
    assert done.returncode == 2
    assert "no Ray cluster takes jobs at http://127.0.0.1:9" in done.stderr


@pytest.mark.slow
def test_ctrl_c_detaches_stop_saves_and_the_same_command_resumes(cli: Any, head: Any) -> None:
    long = ("--set", "model.name=resnet8", "--set", "train.total_epochs=120")
    command = submit_command(cli, head, *long, name="long")
    following = cli.start(command)
    job = next(found for line in following.stderr if (found := re.search(r"job (\S+) at http", line)))
    wait_for_line(following, "step ")
    following.send_signal(signal.SIGINT)
    _, err = following.communicate(timeout=60)
    assert following.returncode == 130
    assert "the job keeps running" in err

    again = cli.run(command)
    assert again.returncode == 2
    assert f"job {job[1]} is already running it" in again.stderr

    stop = [str(BIN / "ray"), "job", "stop", job[1], "--address", head.dashboard]
    assert cli.run(stop).returncode == 0
    assert list((cli.folder / "runs" / "long").glob("epoch=*"))  # saved on the way out

    rest = cli.run(submit_command(cli, head, *long, "--json", name="long"))
    assert rest.returncode == 0, rest.stdout + rest.stderr
    assert '"step": 1320' in rest.stdout


def wait_for_line(process: subprocess.Popen[str], begin: str) -> None:
    """Reads the output up to such a line; the test's own limit ends a wait for ever."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(begin):
            return
    raise AssertionError(f"ended with {process.wait()} before a line that begins with {begin!r}")
