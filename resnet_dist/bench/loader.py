"""`resnet-dist bench loader`: our loader against its peers on one beton, pass by pass in turns.

A machine is never quiet, so speed is images per second of CPU time, summed over a peer's threads and processes, the
passes of all peers alternate, and ratios are medians over the rounds of the ratio within a round. Each peer has a
process of its own; only one of them runs at a time.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import IO, Any

from resnet_dist.bench.peers import PEERS, Task, write_files
from resnet_dist.config.recipe import MAX_SIZE
from resnet_dist.errors import Fault, UserError

SETTINGS = ((False, 224), (False, 160), (False, 128), (True, 224))
"""(evaluates, size in px)"""


@dataclass(frozen=True)
class Result:
    """One peer under one setting."""

    start_s: float
    """From the import to the end of the first pass."""
    memory_bytes: int
    """That belongs to no file, after the first pass; imports included."""
    images_per_cpu_s: tuple[float, ...]
    """One per round: what one core does."""
    images_per_s: tuple[float, ...]
    """One per round, by the clock, on all threads: whatever else the machine did shows."""


def read_setting(text: str) -> tuple[bool, int]:
    """`train-224`, `eval-224`. UserError for anything else."""
    kind, _, size = text.partition("-")
    if kind not in ("train", "eval") or not size.isdecimal() or not 1 <= int(size) <= MAX_SIZE:
        raise UserError(f"{text}: a setting is train-SIZE or eval-SIZE, for example train-224")
    return kind == "eval", int(size)


def bench_loader(
    beton: Path,
    *,
    num_threads: int,
    rounds: int,
    peers: Sequence[str] = tuple(PEERS),
    settings: Sequence[tuple[bool, int]] = SETTINGS,
) -> str:
    """A Markdown table per setting. UserError if the beton does not hold JPEGs only."""
    if unknown := set(peers) - set(PEERS):
        raise UserError(f"there is no peer {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    present = [peer for peer in peers if peer != "DALI" or importlib.util.find_spec("nvidia.dali") is not None]
    with tempfile.TemporaryDirectory() as folder:
        write_files(beton, Path(folder))
        tables = []
        for evaluates, size in settings:
            tasks = [Task(peer, str(beton), folder, evaluates, size, num_threads) for peer in present]
            tables.append(table(tasks[0], dict(zip(present, _measure(tasks, rounds), strict=True))))
    missing = [f"{peer}: not installed" for peer in peers if peer not in present]
    return "\n\n".join([*tables, *missing])


def table(task: Task, results: dict[str, Result]) -> str:
    kind = "evaluation: resize, centre crop" if task.evaluates else "training: random resized crop, flip"
    lines = [
        f"### {kind}, {task.size} px, {task.num_threads} threads",
        "",
        "| | images/s per core | relative to stock FFCV | native is faster by | images/s by the clock | start-up, s "
        "| memory, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for peer, result in results.items():
        cells = [
            f"{median(result.images_per_cpu_s):.0f}",
            _ratio(result, results.get("stock FFCV")),
            _ratio(results.get("native"), result),
        ]
        cells += [f"{median(result.images_per_s):.0f}", f"{result.start_s:.1f}", f"{result.memory_bytes / 1e6:.0f}"]
        lines.append(f"| {peer} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratio(one: Result | None, other: Result | None) -> str:
    if one is None or other is None:
        return "-"
    return f"{median(a / b for a, b in zip(one.images_per_cpu_s, other.images_per_cpu_s, strict=True)):.2f}"


def _measure(tasks: Sequence[Task], rounds: int) -> list[Result]:
    with ExitStack() as stack:
        processes = [stack.enter_context(_process(task)) for task in tasks]
        starts = [_answer(process, task) for process, task in zip(processes, tasks, strict=True)]
        passes: list[list[dict[str, Any]]] = [[] for _ in tasks]
        for number in range(rounds):
            for k in range(len(tasks)):
                k = (k + number) % len(tasks)  # no one always runs behind the same other
                _input(processes[k]).write("\n")
                _input(processes[k]).flush()
                passes[k].append(_answer(processes[k], tasks[k]))
    return [_result(start, done) for start, done in zip(starts, passes, strict=True)]


def _result(start: dict[str, Any], passes: list[dict[str, Any]]) -> Result:
    per_cpu_s, per_s = (tuple(p["num_images"] / p[seconds] for p in passes) for seconds in ("cpu_s", "wall_s"))
    return Result(start["start_s"], start["memory_bytes"], per_cpu_s, per_s)


@contextmanager
def _process(task: Task) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "resnet_dist.bench.peers", json.dumps(task._asdict())]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
        _input(process).close()
        process.wait(timeout=30)
    finally:
        process.kill()
        process.wait()


def _answer(process: subprocess.Popen[str], task: Task) -> dict[str, Any]:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            answer: dict[str, Any] = json.loads(line)
            return answer
    raise Fault(f"the process of {task.peer} ended; its reason stands above")


def _input(process: subprocess.Popen[str]) -> IO[str]:
    assert process.stdin is not None
    return process.stdin
