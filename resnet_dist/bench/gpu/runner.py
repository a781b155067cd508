"""The checks, how each runs in a process of its own, and the report. Imports neither torch nor the checks."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple

from data_prep.beton.files import write_text_atomically
from resnet_dist.bench.gpu.result import Result, Skipped
from resnet_dist.bench.paired import markdown

LIMIT_S = 60.0
"""Of one check."""
TOTAL_LIMIT_S = 600.0
_KILL_LIMIT_S = 10.0
_MAX_LINE, _MAX_LOG = 600, 8000
_THREAD = re.compile(r"((?:Current t|T)hread 0x\w+) .*\(most recent call first\):")
_FRAME = re.compile(r'File "(.*)", line (\d+) in (\S+)')
Status = Literal["pass", "FAIL", "measured", "skipped"]


class Check(NamedTuple):
    number: str
    name: str
    module: str
    """In `resnet_dist.bench.gpu`; its function has the check's name."""
    on_cpu: bool = True
    """Whether it makes sense on a CPU."""

    def run(self, device: Any, small: bool) -> Result:
        """`small`: tiny nets and data, for tests. Raises Skipped if it cannot run here."""
        if not self.on_cpu and device.type == "cpu":
            raise Skipped("needs a GPU")
        function: Callable[[Any, bool], Result] = getattr(
            import_module(f"resnet_dist.bench.gpu.{self.module}"), self.name.replace("-", "_")
        )
        return function(device, small)


CHECKS = (
    Check("1", "environment", "machine"),
    Check("2", "loader", "data"),
    Check("3", "copies", "data", on_cpu=False),
    Check("4", "host-syncs", "steps", on_cpu=False),
    Check("5", "layout", "steps"),
    Check("6a", "numbers", "steps"),
    Check("6b", "merged", "steps"),
    Check("6c", "graphs", "steps", on_cpu=False),
    Check("7", "exact", "steps"),
    Check("8", "resume", "steps"),
    Check("9", "reduction", "workers"),
    Check("10", "agreement", "workers"),
    Check("11", "compile", "speed"),
    Check("12a", "speed-eager", "speed"),
    Check("12b", "speed-graphs", "speed", on_cpu=False),
    Check("12c", "speed-fp16", "speed", on_cpu=False),
    Check("12d", "speed-compiled", "speed", on_cpu=False),
    Check("13", "host-share", "speed"),
    Check("14", "optimizers", "speed"),
    Check("15", "batch-norm", "speed"),
    Check("16", "full-loop", "runs"),
    Check("17", "snapshot", "machine"),
    Check("18", "other-paths", "runs"),
)


@dataclass(frozen=True)
class Outcome:
    """How a check ended."""

    number: str
    name: str
    status: Status
    line: str
    seconds: float
    measured: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.number:>3} {self.name:15} {self.status:8} {self.seconds:5.1f} s  {self.line}"


def select(names: Sequence[str], *, on_cpu: bool) -> list[Check]:
    """The checks of these names or numbers; all that make sense on the device, if there are none."""
    if names:
        return [check for check in CHECKS if check.name in names or check.number in names]
    return [check for check in CHECKS if check.on_cpu or not on_cpu]


# One check, in this process


def run_here(check: Check, device: Any, small: bool) -> Outcome:
    """Whatever it raises becomes a failure, which its line names."""
    began_s = time.perf_counter()
    measured: dict[str, Any] = {}
    status: Status
    try:
        measured, passed, line = check.run(device, small)
        status = "measured" if passed is None else "pass" if passed else "FAIL"
    except Skipped as reason:
        status, line = "skipped", str(reason)
    except Exception as error:  # noqa: BLE001 - the other checks continue
        status, line = "FAIL", f"{type(error).__name__}: {error}"
        measured = {"traceback": traceback.format_exc()}
    return Outcome(check.number, check.name, status, one_line(line), time.perf_counter() - began_s, measured)


def one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MAX_LINE else line[: _MAX_LINE - 3] + "..."


# One check, in a process of its own: a crash, a hang or a broken CUDA context ends nothing else.


def run_apart(check: Check, command: Sequence[str], limit_s: float) -> Outcome:
    """Runs `command`, which writes the check's outcome to the file that is its last argument.

    After `limit_s` the command should have ended itself, with a traceback on its standard error; if it has not after
    some seconds more, it is killed.
    """
    began_s = time.perf_counter()

    def failed(reason: str) -> Outcome:
        measured = {"log": text[-_MAX_LOG:]}
        return Outcome(check.number, check.name, "FAIL", one_line(reason), time.perf_counter() - began_s, measured)

    with tempfile.TemporaryDirectory(prefix="resnet-dist-bench-") as folder:
        result, log = Path(folder) / "result.json", Path(folder) / "log"
        with log.open("w") as output:
            # A session of its own, so that what its compiler started is killed with it.
            process = subprocess.Popen(
                [*command, str(result)], stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
            code: int | None = None
            try:
                with suppress(subprocess.TimeoutExpired):
                    code = process.wait(limit_s + _KILL_LIMIT_S)
            finally:
                kill_session(process)
        if result.exists():
            outcome = Outcome(**json.loads(result.read_text(encoding="utf-8")))
            return replace(outcome, seconds=time.perf_counter() - began_s)  # with the start of Python and CUDA
        text = log.read_text(encoding="utf-8", errors="replace")
        where = where_it_was(text)
        if code is None or "Timeout (" in text:
            return failed(f"limit: not done after {limit_s:.0f} s; {where or 'and it did not end itself'}")
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return failed(f"its process {how}; {where or f'its last line: {last_line(text)}'}")


def kill_session(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and those that it started. The wait has a limit: a process that is stuck in the driver stays."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_KILL_LIMIT_S)


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "none")


def where_it_was(text: str) -> str | None:
    """The innermost function of this project in a traceback that `faulthandler` wrote, of the thread that crashed or of
    the main thread, which comes last; None if there is none."""
    threads = _THREAD.split(text)[1:]
    if not threads:
        return None
    current = [trace for head, trace in zip(threads[::2], threads[1::2], strict=True) if head.startswith("Current")]
    frames = _FRAME.findall(current[0] if current else threads[-1])
    ours = [frame for frame in frames if "resnet_dist" in frame[0] or "data_prep" in frame[0]] or frames
    if not ours:
        return None
    path, line, function = ours[0]
    return f"it was in {function} ({'/'.join(Path(path).parts[-2:])}:{line})"


# All checks, and the report


def run_all(
    checks: Iterable[Check],
    run: Callable[[Check, float], Outcome],
    report: Callable[[Outcome], None],
    *,
    total_limit_s: float = TOTAL_LIMIT_S,
) -> list[Outcome]:
    """`run(check, limit in seconds)` for each; `report` after each. Once the total is spent, the others are skipped."""
    outcomes: list[Outcome] = []
    deadline_s = time.monotonic() + total_limit_s
    for check in checks:
        left_s = deadline_s - time.monotonic()
        if left_s < 1:
            reason = f"no time: the checks before it took the {total_limit_s:.0f} s that all may take"
            outcome = Outcome(check.number, check.name, "skipped", reason, 0.0)
        else:
            outcome = run(check, min(LIMIT_S, left_s))
        outcomes.append(outcome)
        report(outcome)
    return outcomes


def wrapped(text: str, width: int) -> str:
    """With the lines after the first indented, so that the checks' names stay a column of their own."""
    return textwrap.fill(text, width, subsequent_indent=20 * " ", break_long_words=False, break_on_hyphens=False)


def table(outcomes: Sequence[Outcome], head: str) -> str:
    rows = [[o.number, o.name, o.status, o.line.replace("|", "/"), f"{o.seconds:.1f}"] for o in outcomes]
    return f"{head}\n\n{markdown(['#', 'check', 'result', 'measured', 's'], rows)}\n"


def summary(outcomes: Sequence[Outcome], seconds: float) -> str:
    count = {status: sum(o.status == status for o in outcomes) for status in ("pass", "FAIL", "measured", "skipped")}
    return (
        f"{count['pass']} passed, {count['FAIL']} failed, {count['measured']} measured without a threshold, "
        f"{count['skipped']} skipped, in {seconds:.0f} s"
    )


def write_report(stem: Path, outcomes: Sequence[Outcome], head: str) -> None:
    """`<stem>.md` and `<stem>.json`, each whole at any time."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    everything = {"head": head, "checks": [asdict(outcome) for outcome in outcomes]}
    write_text_atomically(stem.with_name(f"{stem.name}.md"), table(outcomes, head))
    write_text_atomically(stem.with_name(f"{stem.name}.json"), json.dumps(everything, indent=1, default=str) + "\n")
