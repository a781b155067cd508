"""`bench gpu`: all of it with tiny nets on a CPU, checks that hang or crash, and the checks on a GPU."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from resnet_dist.bench.gpu import runner
from resnet_dist.bench.gpu.__main__ import main
from resnet_dist.bench.gpu.profiled import hidden_share, merged
from resnet_dist.bench.gpu.result import Result, Skipped, largest
from resnet_dist.bench.gpu.runner import CHECKS, Check, Outcome, run_all, run_apart, run_here, select, wrapped
from resnet_dist.cli.bench import bench_gpu
from resnet_dist.data.batch import HostBuffers
from resnet_dist.models.batch_norm import BatchNorm2d
from resnet_dist.models.classifier import ImageClassifier
from resnet_dist.training import step

CHECK = Check("2", "loader", "data")


@pytest.fixture(autouse=True)
def backends() -> Iterator[None]:
    """Checks set PyTorch's backends for the whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


# On a CPU


def test_every_check_that_makes_sense_on_a_cpu_passes_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cpu", "--in-process", "--output", str(tmp_path / "reports" / "cpu")]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "reports" / "cpu.json").read_text())
    status = {check["name"]: check["status"] for check in report["checks"]}
    assert list(status) == [check.name for check in CHECKS if check.on_cpu]
    assert set(status.values()) <= {"pass", "measured"}
    # A line for each as it ends, and a table in the file alone
    table = (tmp_path / "reports" / "cpu.md").read_text()
    assert all(f" {name} " in printed and f"| {name} |" in table for name in status)
    assert "|---|" not in printed
    assert printed.count("not judged on a CPU") == 2


@pytest.mark.parametrize("check", [check for check in CHECKS if not check.on_cpu], ids=lambda check: check.name)
def test_a_check_that_needs_a_gpu_is_skipped_on_a_cpu(check: Check) -> None:
    outcome = run_here(check, torch.device("cpu"), True)
    assert (outcome.status, outcome.line) == ("skipped", "needs a GPU")


def test_lines_are_wrapped_beside_the_names() -> None:
    text = str(Outcome("12d", "speed-compiled", "measured", "words of a line " * 20, 3.0))
    first, *others = wrapped(text, 80).splitlines()
    assert first.startswith("12d speed-compiled  measured   3.0 s  words of")
    assert all(line[:20].isspace() and line[20] != " " and len(line) <= 80 for line in others)
    assert " ".join([first, *(line.strip() for line in others)]) == text.strip()


def test_the_help_of_the_command_names_every_check() -> None:
    described = " ".join((bench_gpu.__doc__ or "").split())
    assert f"The checks: {', '.join(check.name for check in CHECKS)}." in described


def no_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BatchNorm2d, "forward", nn.BatchNorm2d.forward)


def one_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[tuple[HostBuffers, int], Tensor] = {}
    take = HostBuffers.take
    monkeypatch.setattr(HostBuffers, "take", lambda self, n: kept.setdefault((self, n), take(self, n)))


def lost_momentum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim.SGD, "load_state_dict", lambda self, state: None)


def counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    all_reduce = torch.distributed.all_reduce
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t, **options: all_reduce(t.mul_(2), **options))


def smoothed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "training_loss", lambda logits, targets, *_: cross_entropy(logits, targets) * 1.001)


def nchw(monkeypatch: pytest.MonkeyPatch) -> None:
    build = ImageClassifier.__init__
    monkeypatch.setattr(
        ImageClassifier, "__init__", lambda self, *a, **o: build(self, *a, **o | {"channels_last": False})
    )


def not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "training_loss", lambda logits, *_: logits.sum() * math.nan)


@pytest.mark.parametrize(
    ("name", "breaks"),
    [
        ("loader", one_buffer),
        ("layout", nchw),
        ("numbers", smoothed),
        ("numbers", not_finite),
        ("merged", no_groups),
        ("merged", not_finite),
        ("resume", lost_momentum),
        ("reduction", counted_twice),
        ("agreement", counted_twice),
    ],
)
def test_a_check_fails_when_what_it_proves_is_broken(
    name: str, breaks: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks(monkeypatch)
    (check,) = select([name], on_cpu=True)
    outcome = run_here(check, torch.device("cpu"), True)
    assert outcome.status == "FAIL"
    assert "traceback" not in outcome.measured, outcome.measured["traceback"]


BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BANNED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

BANNED = set(sys.argv.pop(1).split(","))
sys.meta_path.insert(0, Blocked())
from resnet_dist.bench.gpu.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.system
def test_it_needs_no_more_than_torch_and_four_small_packages() -> None:
    banned = "ray,mlflow,ffcv,numba,typer,rich,click,blake3,xxhash,timm,torchvision,pyarrow,psutil,pynvml"
    checks = [argument for name in ("loader", "resume", "full-loop") for argument in ("--check", name)]
    command = [sys.executable, "-c", BLOCKED, f"{banned},requests,matplotlib,optuna", "--cpu", "--in-process", *checks]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "blake3 and xxhash are not installed" in ran.stdout
    assert "lamb: skipped: timm is not installed" in ran.stdout


def test_without_a_gpu_it_says_why_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    error = capsys.readouterr().err
    assert error.startswith("resnet-dist bench gpu: ")
    assert "--cpu" in error
    assert error.count("\n") == 1


def test_without_nvidia_ml_py_it_still_finds_the_driver_and_the_gpus(nvml_folder: Path) -> None:
    code = "import sys; sys.modules['pynvml'] = None; from resnet_dist.bench.gpu.machine import installed_gpus; "
    code += "node = installed_gpus(); print(node.driver, len(node.gpus))"
    environment = os.environ | {"LD_LIBRARY_PATH": str(nvml_folder)}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=60, check=True)
    assert ran.stdout.decode() == "580.65.06 2\n"


def test_an_unknown_check_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cpu", "--check", "speeed"]) == 2
    assert "speeed: there is no such check; there are environment, loader," in capsys.readouterr().err


# Checks that end badly


def apart(code: str, *, limit_s: float = 20.0) -> Outcome:
    """A check's process that runs `code`; `sys.argv[1]` is the file for its outcome."""
    return run_apart(CHECK, [sys.executable, "-c", f"import os, sys, time\n{code}"], limit_s)


def test_a_check_reports_through_a_file_whatever_it_prints() -> None:
    expected = Outcome("2", "loader", "pass", "equal bits", 0.1, {"batches": 3})
    told = f"print('noise'); open(sys.argv[1], 'w').write({json.dumps(expected.__dict__)!r})"
    assert replace(apart(told), seconds=0.1) == expected


def test_a_check_that_hangs_is_ended_and_its_line_says_where() -> None:
    hang = "import faulthandler; faulthandler.dump_traceback_later(0.5, exit=True)\ndef wait(): time.sleep(60)\nwait()"
    began_s = time.monotonic()
    outcome = apart(hang, limit_s=0.5)
    assert time.monotonic() - began_s < 9
    assert (outcome.status, outcome.line) == ("FAIL", "limit: not done after 0 s; it was in wait (<string>:3)")


def test_a_check_that_does_not_end_itself_is_killed_with_what_it_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_KILL_LIMIT_S", 0.5)
    child = "import subprocess; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); time.sleep(60)"
    outcome = apart(child, limit_s=1.0)
    assert outcome.line == "limit: not done after 1 s; and it did not end itself"
    pid = int(outcome.measured["log"])
    deadline_s = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("os.kill(os.getpid(), 9)", "its process was killed by SIGKILL; its last line: none"),
        (
            "import faulthandler; faulthandler.enable()\ndef crash(): faulthandler._sigsegv()\ncrash()",
            "its process was killed by SIGSEGV; it was in crash (<string>:3)",
        ),
        (
            "print('out of memory', file=sys.stderr); os._exit(3)",
            "its process ended with exit code 3; its last line: out of memory",
        ),
    ],
)
def test_a_check_that_crashes_fails_with_its_last_line(code: str, line: str) -> None:
    outcome = apart(code)
    assert (outcome.status, outcome.line) == ("FAIL", line)


def test_nan_is_never_the_smaller_one() -> None:
    assert math.isnan(largest([1e-15, math.nan, 1e-16]))
    assert largest([1e-15, 2e-15]) == 2e-15


def test_what_a_check_raises_is_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(outcome: Result | Exception) -> Check:
        def run(device: object, small: bool) -> Result:
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        monkeypatch.setattr("resnet_dist.bench.gpu.data.loader", run)
        return CHECK

    results = {
        "pass": Result({}, True, "fine"),
        "FAIL": Result({}, False, "bad"),
        "measured": Result({}, None, "3 ms"),
        "skipped": Skipped("needs timm"),
    }
    for status, result in results.items():
        assert run_here(check(result), None, True).status == status
    broken = run_here(check(ValueError("two\nlines")), None, True)
    assert (broken.status, broken.line) == ("FAIL", "ValueError: two lines")
    assert "Traceback" in broken.measured["traceback"]


def test_checks_after_the_total_limit_are_skipped_with_the_reason() -> None:
    outcomes = run_all(
        CHECKS[:2],
        lambda check, limit_s: Outcome(check.number, check.name, "pass", f"{limit_s}", 0.0),
        lambda outcome: time.sleep(0.6),
        total_limit_s=1.5,
    )
    assert [outcome.status for outcome in outcomes] == ["pass", "skipped"]
    assert "no time" in outcomes[1].line


@pytest.mark.system
def test_a_stopped_bench_prints_what_it_has(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "resnet_dist.bench.gpu", "--cpu", "--output", str(tmp_path / "cpu")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline(), process.stdout.readline()]
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
        assert process.wait(60) == 1
    assert " environment " in lines[1]
    assert "Stopped before the end: 0 passed, 0 failed, 1 measured without a threshold, 0 skipped" in rest
    assert len(json.loads((tmp_path / "cpu.json").read_text())["checks"]) == 1


def test_the_hidden_part_of_copies() -> None:
    assert merged([(5, 22), (30, 31), (21, 25)]) == [(5, 25), (30, 31)]
    assert hidden_share([(0, 10), (20, 30)], [(5, 22), (21, 25)]) == 0.5


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("check", CHECKS, ids=[check.name for check in CHECKS])
def test_a_check_on_a_gpu(check: Check) -> None:
    """Scaled down; `resnet-dist bench gpu` runs them in full."""
    outcome = run_here(check, torch.device("cuda", 0), True)
    assert outcome.status != "FAIL", f"{outcome.line}\n{outcome.measured.get('traceback', '')}"
