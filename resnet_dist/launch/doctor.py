"""`resnet-dist doctor RUN`: what lies in a run's folder, whether it is whole, and what a new start would do with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from resnet_dist.errors import Fault, UserError
from resnet_dist.launch.result import read_result
from resnet_dist.training.checkpoint import TEMPORARY, newest_first, read_card

RAY_SNAPSHOT = "checkpoint_manager_snapshot.json"
State = Literal["ok", "damaged", "leftover"]


@dataclass(frozen=True)
class Finding:
    """One thing in the folder. `damaged` and `leftover` are what `repair` removes: nothing needs them."""

    path: Path
    state: State
    what: str


def examine(run_dir: Path) -> list[Finding]:
    """Everything of the run, newest checkpoint first; every checkpoint is read whole. UserError if there is no run."""
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: there is no such run; give the folder of a run under the profile's storage")
    findings = [*_checkpoints(run_dir), *_leftovers(run_dir), *_bookkeeping(run_dir)]
    if not findings:
        raise UserError(f"{run_dir}: holds nothing of a run; give the folder of a run under the profile's storage")
    return findings


def repair(findings: list[Finding]) -> list[Finding]:
    """Removes what is damaged or left over, and returns it. Whole checkpoints are never touched."""
    removed = [finding for finding in findings if finding.state != "ok"]
    for finding in removed:
        if finding.path.is_dir():
            shutil.rmtree(finding.path)
        else:
            finding.path.unlink(missing_ok=True)
    return removed


def verdict(findings: list[Finding]) -> str:
    """One line: what the same command would do next."""
    if any(f.path.name == "result.json" and f.state == "ok" for f in findings):
        return "the run is complete"
    whole = next((f for f in findings if f.state == "ok" and f.path.name.startswith("epoch=")), None)
    return f"the run goes on from {whole.path.name}" if whole else "the run would begin at its first step"


def _checkpoints(run_dir: Path) -> Iterator[Finding]:
    for directory in newest_first(run_dir.iterdir()):
        try:
            card = read_card(directory)
        except Fault as fault:
            yield Finding(directory, "damaged", str(fault))
            continue
        top1 = card.metrics.get("val/top1")
        shown = "" if top1 is None else f", top-1 {top1:.2f} %"
        yield Finding(directory, "ok", f"checkpoint, recipe {card.identity.recipe_hash}{shown}")


def _leftovers(run_dir: Path) -> Iterator[Finding]:
    for path in sorted(run_dir.glob(f".*{TEMPORARY}")):
        yield Finding(path, "leftover", "a checkpoint that was not finished")


def _bookkeeping(run_dir: Path) -> Iterator[Finding]:
    snapshot = run_dir / RAY_SNAPSHOT
    if snapshot.exists():
        yield Finding(snapshot, "leftover", "Ray Train's list of checkpoints; a new start does not use it")
    for name, what in (("mlflow_run.json", "which MLflow run this is"), ("result.json", "the result of the whole run")):
        path = run_dir / name
        if path.exists():
            try:
                json.loads(path.read_text(encoding="utf-8"))
                if name == "result.json":
                    read_result(run_dir)
            except (ValueError, Fault) as error:
                yield Finding(path, "damaged", f"{what}: {error}")
            else:
                yield Finding(path, "ok", what)
