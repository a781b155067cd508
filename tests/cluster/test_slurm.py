"""The Slurm job: its script with stand-ins for Slurm, and (slow) on a real Slurm of one node."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ("slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel", "munged")
SRUN = """
import os, socket, time
listening = socket.create_server((os.environ["RAY_HEAD"], int(os.environ["RAY_PORT"])))
time.sleep(60)
"""
SCONTROL = '[ "$1" = show ] && echo localhost || echo "scontrol $*"'
COMMAND = """
trap 'sleep 0.5; echo saved; exit 143' TERM
echo "$* at $RAY_ADDRESS, $RAY_AUTH_MODE ${#RAY_AUTH_TOKEN}"
[ "$1" != forever ] && exit "$1"
while :; do sleep 0.1; done
"""


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """run.sbatch as Slurm starts it on the first of two nodes. `resnet-dist N` ends with the status N."""
    tools = tmp_path / ".venv/bin"
    tools.mkdir(parents=True)
    (tools / "python").symlink_to(sys.executable)
    bash = shutil.which("bash")
    for name, interpreter, text in (
        ("srun", sys.executable, SRUN),
        ("scontrol", bash, SCONTROL),
        ("resnet-dist", bash, COMMAND),
        ("data-prep", bash, COMMAND),
    ):
        (tools / name).write_text(f"#!{interpreter}\n{text}")
        (tools / name).chmod(0o755)
    started: list[subprocess.Popen[str]] = []

    def start(*words: str, number: int = 7000 + os.getpid() % 10000) -> subprocess.Popen[str]:
        slurm = {
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURM_JOB_ID": str(number),
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
        }
        command = ["bash", ROOT / "cluster/slurm/run.sbatch", *words]
        process = subprocess.Popen(
            command,
            env={**os.environ, **slurm},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def until(what: Callable[[], bool], timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def test_two_jobs_on_a_node_have_clusters_of_their_own_and_end_with_their_commands_status(job) -> None:
    first = 10_000 + 2 * (os.getpid() % 5000)
    jobs = [job(str(status), "--on", "P", number=first + status) for status in (0, 1)]
    for status, process in enumerate(jobs):
        out, _ = process.communicate(timeout=60)
        assert process.returncode == status
        (line,) = out.splitlines()
        assert line.startswith(f"{status} --on P at ")
        assert line.endswith(f":{20_000 + (first + status) % 10_000}, token 64")


def test_a_stopped_run_saves_and_the_job_queues_again(job) -> None:
    process = job("data-prep", "forever", number=12_345)
    process.stdout.readline()
    process.terminate()
    out, _ = process.communicate(timeout=60)
    saved, message, requeue = out.splitlines()
    assert (saved, requeue, process.returncode) == ("saved", "scontrol requeue 12345", 143)
    assert message.endswith("the job is queued again and resumes from the last checkpoint")


def test_ray_that_does_not_start_ends_the_job_with_a_line(job, tmp_path: Path) -> None:
    (tmp_path / ".venv/bin/srun").write_text("#!/bin/sh\nexit 1\n")
    process = job("0")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Ray did not start" in out


def test_no_command_is_a_mistake(job) -> None:
    process = job()
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out.count("\n")) == (2, 1)


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """munged, slurmctld and slurmd of one node, on ports and in folders of the test's own."""
    if os.geteuid() != 0 or any(shutil.which(tool) is None for tool in TOOLS):
        pytest.skip("needs root, and Debian's slurmctld, slurmd, slurm-client and munge")
    folder = Path("/tmp") / f"slurm-test-{os.getpid()}"
    for name in ("state", "spool", "munge"):
        (folder / name).mkdir(parents=True, mode=0o755)
    key = folder / "munge/key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    ports = []
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            ports.append(probe.getsockname()[1])
    host = socket.gethostname().split(".")[0]
    config = folder / "slurm.conf"
    config.write_text(
        f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=60
FirstJobId={os.getpid()}
SelectType=select/cons_tres
NodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} RealMemory=4000 State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=EXCLUSIVE
"""
    )
    env = {**os.environ, "SLURM_CONF": str(config)}
    munge = [
        "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge/socket",
        f"--pid-file={folder}/munge/pid", f"--log-file={folder}/munge/log", f"--seed-file={folder}/munge/seed",
    ]  # fmt: skip
    daemons = [
        subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        for command in (munge, ["slurmctld", "-D"], ["slurmd", "-D"])
    ]
    try:
        until(lambda: "idle" in slurm_says(env, "sinfo", "--noheader", "--format=%T"), 60)
        yield env
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in reversed(daemons):
            daemon.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def slurm_says(env: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60).stdout.strip()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_real_job_is_stopped_queues_again_and_ends(slurm: dict[str, str], tmp_path: Path) -> None:
    """Digits on one node; SIGTERM as the time limit sends it; the second life finishes the run."""
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("cluster", "resnet_dist", "data_prep", ".venv"):
        (checkout / name).symlink_to((ROOT / name).resolve())
    env = {**slurm, "PYTHONPATH": str(ROOT), "RAY_worker_niceness": "0"}  # Ray's 15 starves beside other work
    for split in ("train", "val"):
        subprocess.run(
            [
                ROOT / ".venv/bin/data-prep", "convert", "--source", "digits", "--split", split,
                "--output", str(checkout / f"data/digits/{split}.beton"), "--workers", "1",
            ],
            env=env, check=True, capture_output=True, timeout=300, cwd=checkout,
        )  # fmt: skip
    command = [
        "sbatch", "--parsable", "--nodes=1", "--gpus-per-node=0", "--cpus-per-task=2", "--time=20",
        "cluster/slurm/run.sbatch", "train", "resnet_dist/recipes/digits_resnet20.yaml",
        "--on", "cluster/profiles/laptop.yaml", "--name", "slurm", "--profile-set", "checkpoint.every_epochs=1",
    ]  # fmt: skip
    done = subprocess.run(command, env=env, cwd=checkout, capture_output=True, text=True, check=True, timeout=60)
    number = done.stdout.strip()
    log = checkout / f"resnet-dist-{number}.log"
    runs = checkout / "runs/slurm"
    state = lambda: slurm_says(env, "squeue", "--noheader", "--format=%T", f"--jobs={number}")  # noqa: E731
    try:
        until(lambda: bool(list(runs.glob("epoch=*"))) or state() not in {"PENDING", "RUNNING"}, 300)
        assert list(runs.glob("epoch=*")), "the job ended before its first checkpoint"
        slurm_says(env, "scancel", "--batch", "--signal=TERM", number)
        until(lambda: "the job is queued again" in log.read_text(), 120)
        # A requeued job may begin only two minutes later.
        until(lambda: state() == "RUNNING" and log.read_text().count("Local node IP") >= 2, 300)
        until(lambda: (runs / "result.json").exists() and state() in {"", "COMPLETED"}, 300)
    except AssertionError:
        print(log.read_text() if log.exists() else "no log", state())
        raise
    finally:  # Ray outlives the daemons
        slurm_says(env, "scancel", "--full", "--signal=KILL", number)
        until(lambda: state() in {"", "COMPLETED", "CANCELLED", "FAILED"}, 60)
    assert "restart" in slurm_says(env, "scontrol", "show", "job", number).lower()
