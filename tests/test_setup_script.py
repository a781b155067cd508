"""`make setup` on a bare machine: what it installs with the rights to, and the one line it prints without."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.system

SETUP = Path(__file__).parents[1] / "cluster" / "setup.sh"
SYSTEM_TOOLS = ("bash", "dirname", "touch", "env", "cat")


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A clone with a .venv that is there already, and a PATH without compilers; every call is noted in calls.txt."""
    (tmp_path / "cluster").mkdir()
    shutil.copy(SETUP, tmp_path / "cluster" / "setup.sh")
    (tmp_path / "bin").mkdir()
    for name in SYSTEM_TOOLS:
        (tmp_path / "bin" / name).symlink_to(shutil.which(name) or f"/bin/{name}")
    script(tmp_path / ".venv" / "bin" / "python", 'echo "venv python $*" >> calls.txt')
    script(tmp_path / "bin" / "apt-get", 'echo "apt-get $*" >> calls.txt')
    script(tmp_path / "bin" / "python3", "exit 0")
    return tmp_path


def script(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def run(machine: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": str(machine / "bin"), "HOME": os.environ.get("HOME", "/"), **settings}
    command = ["/bin/bash", "cluster/setup.sh"]
    return subprocess.run(
        command, cwd=machine, env=environment, capture_output=True, text=True, timeout=30, check=False
    )


def calls(machine: Path) -> str:
    return (machine / "calls.txt").read_text() if (machine / "calls.txt").exists() else ""


def test_root_installs_what_is_missing(machine: Path) -> None:
    script(machine / "bin" / "id", "echo 0")
    done = run(machine)
    assert done.returncode == 0, done.stderr
    expected = "install -y -q --no-install-recommends g++ pkg-config libopencv-dev libturbojpeg0-dev libjpeg-dev"
    assert expected in calls(machine)
    assert "venv python -m pip install" in calls(machine)
    assert (machine / ".venv" / ".ready").exists()


def test_without_rights_it_says_what_to_type_and_installs_nothing(machine: Path) -> None:
    script(machine / "bin" / "id", "echo 1000")
    done = run(machine)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "setup: system packages are missing; type: sudo apt-get install -y "
        "g++ pkg-config libopencv-dev libturbojpeg0-dev libjpeg-dev"
    ]
    assert calls(machine) == ""
    assert not (machine / ".venv" / ".ready").exists()


def test_nothing_is_installed_where_all_is_there(machine: Path) -> None:
    for tool in ("g++", "pkg-config"):
        script(machine / "bin" / tool, "exit 0")
    done = run(machine)
    assert done.returncode == 0, done.stderr
    assert "apt-get" not in calls(machine)


def test_the_cpu_variant_is_the_same_lock_without_cuda(machine: Path) -> None:
    for tool in ("g++", "pkg-config"):
        script(machine / "bin" / tool, "exit 0")
    (machine / "bin" / "sed").symlink_to(shutil.which("sed") or "/bin/sed")
    shutil.copy(SETUP.parents[1] / "requirements.lock", machine)
    assert run(machine, VARIANT="cpu").returncode == 0
    assert "--extra-index-url https://download.pytorch.org/whl/cpu -r .venv/requirements-cpu.lock" in calls(machine)
    whole, cpu = ((machine / f).read_text() for f in ("requirements.lock", ".venv/requirements-cpu.lock"))
    assert "nvidia-nccl-cu13==" in whole
    left_out = {"nvidia", "cuda", "triton"}
    (kept,) = [line for line in cpu.splitlines() if line.partition("-")[0].partition("=")[0] in left_out]
    assert kept.startswith("nvidia-ml-py==")
    assert "\ntorch==" in cpu
    assert "--hash" not in cpu  # they are those of the CUDA builds
    assert "\\" not in cpu
    wrong = run(machine, VARIANT="rocm")
    assert (wrong.returncode, wrong.stderr) == (2, "setup: VARIANT is 'rocm'; set cuda or cpu\n")


def test_an_old_python_is_named(machine: Path) -> None:
    script(machine / "bin" / "python3", '[[ $1 == --version ]] && echo "Python 3.9.2" && exit 0; exit 1')
    done = run(machine)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "setup: Python 3.11 or newer is needed, 'python3' is Python 3.9.2; set PYTHON=/path/to/python3"
    ]
