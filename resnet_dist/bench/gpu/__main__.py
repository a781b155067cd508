"""`python -m resnet_dist.bench.gpu`, and `resnet-dist bench gpu`, which calls the same `main`.

Needs torch, numpy, Pillow, pydantic, PyYAML and the built decode kernel, and nothing else of what a run needs.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from resnet_dist.bench.gpu import runner

_OTHER_DIGESTS = "; blake3 and xxhash are not installed: what the checks write has BLAKE2b digests in their place"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 if no check failed, 1 if one did, 2 if they cannot be run at all."""
    options = parser().parse_args(arguments)
    if unknown := set(options.check).difference(*((check.name, check.number) for check in runner.CHECKS)):
        known = ", ".join(check.name for check in runner.CHECKS)
        return usage_error(f"--check {' '.join(sorted(unknown))}: there is no such check; there are {known}")
    if options.outcome is not None:
        # Both write the stacks of all threads. The limit has a thread of its own that needs no interpreter lock, so a
        # hang in the driver ends too.
        faulthandler.enable()
        faulthandler.dump_traceback_later(options.limit, exit=True)
    other_digests = stand_in_for_digests()
    try:
        import torch
    except Exception as error:  # noqa: BLE001 - a broken installation raises anything
        return usage_error(f"PyTorch cannot be imported: {runner.one_line(f'{type(error).__name__}: {error}')}")
    if not options.cpu and not torch.cuda.is_available():
        from resnet_dist.bench.gpu.machine import cuda_problem

        return usage_error(f"{cuda_problem()}; --cpu runs, with tiny nets, the checks that make sense on a CPU")
    device = torch.device("cpu") if options.cpu else torch.device("cuda", 0)
    checks = runner.select(options.check, on_cpu=options.cpu)
    if options.outcome is not None:
        write_outcome(runner.run_here(checks[0], device, options.cpu), options.outcome)
        os._exit(0)  # CUDA, NCCL or a compiler may hang at exit, which says nothing about the check
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    head = f"{where}, PyTorch {torch.__version__}, Python {sys.version.split()[0]}, {time.strftime('%Y-%m-%d')}"
    return run_checks(checks, device, options, head + (_OTHER_DIGESTS if other_digests else ""))


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="resnet-dist bench gpu",
        description="Prove on one GPU that the GPU side of this project is right, and measure how fast it is: "
        f"{len(runner.CHECKS)} checks, each in a process of its own and for {runner.LIMIT_S:.0f} s at most, within "
        f"{runner.TOTAL_LIMIT_S / 60:.0f} minutes. Exit code 1 if a check fails.",
        epilog=f"The checks: {', '.join(check.name for check in runner.CHECKS)}.",
    )
    result.add_argument(
        "--check", action="append", default=[], metavar="NAME", help="Run only this check; repeatable.  [default: all]"
    )
    result.add_argument(
        "--output", type=Path, metavar="STEM", help="Write a table to STEM.md and all measurements to STEM.json."
    )
    result.add_argument(
        "--cpu", action="store_true", help="Run on the CPU, with tiny nets, the checks that make sense there."
    )
    result.add_argument(
        "--in-process", action="store_true", help="Run all checks in one process: starts faster, but without limits."
    )
    # For the process of one check: the file for its outcome, and its limit in seconds
    result.add_argument("--outcome", type=Path, help=argparse.SUPPRESS)
    result.add_argument("--limit", type=float, default=runner.LIMIT_S, help=argparse.SUPPRESS)
    return result


def usage_error(message: str) -> int:
    print(f"resnet-dist bench gpu: {message}", file=sys.stderr)
    return 2


def stand_in_for_digests() -> bool:
    """Where blake3 or xxhash is not installed, puts hashlib's BLAKE2b in their place, in this process alone: what the
    checks write is in temporary folders, and nobody else reads it. Returns whether it did.
    """
    try:
        import_module("blake3")
        import_module("xxhash")
    except ImportError:
        proof, checksum = ModuleType("blake3"), ModuleType("xxhash")
        proof.blake3 = partial(hashlib.blake2b, digest_size=32)  # type: ignore[attr-defined]
        checksum.xxh3_128 = partial(hashlib.blake2b, digest_size=16)  # type: ignore[attr-defined]
        sys.modules.update(blake3=proof, xxhash=checksum)
        return True
    return False


def write_outcome(outcome: runner.Outcome, path: Path) -> None:
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(asdict(outcome), default=str), encoding="utf-8")
    unfinished.replace(path)


def run_checks(checks: Sequence[runner.Check], device: Any, options: argparse.Namespace, head: str) -> int:
    outcomes: list[runner.Outcome] = []
    flags = ["--cpu"] if options.cpu else []

    def run(check: runner.Check, limit_s: float) -> runner.Outcome:
        if options.in_process:
            return runner.run_here(check, device, options.cpu)
        command = [sys.executable, "-m", "resnet_dist.bench.gpu", "--check", check.name, *flags]
        return runner.run_apart(check, [*command, "--limit", str(limit_s), "--outcome"], limit_s)

    def show(text: str) -> None:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
        print(runner.wrapped(text, width) if width else text, flush=True)

    def report(outcome: runner.Outcome) -> None:
        outcomes.append(outcome)
        if options.output is not None:
            runner.write_report(options.output, outcomes, head)
        show(str(outcome))

    began_s = time.monotonic()
    show(head)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the check that runs, too
    try:
        runner.run_all(checks, run, report)
        stopped = ""
    except KeyboardInterrupt:
        stopped = "Stopped before the end: "
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"\n{stopped}{runner.summary(outcomes, time.monotonic() - began_s)}")
    return 1 if stopped or any(outcome.status == "FAIL" for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
