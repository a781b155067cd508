"""`resnet-dist doctor RUN`: what is in a run's storage, whether it is complete, from where the run would resume."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from data_prep.strict_json import parse
from resnet_dist.errors import Fault, UserError
from resnet_dist.launch.publish import read_result
from resnet_dist.storage.base import MAX_SMALL_BYTES, RAY_SNAPSHOT, TEMPORARY, RunStorage
from resnet_dist.training.checkpoint import Damaged
from resnet_dist.training.checkpoint_manager import BEST, list_saved, open_checkpoint

_SMALL_FILES = {
    "mlflow_run.json": "which MLflow run this is",
    "trained.json": "the training is over",
    "result.json": "the result of the whole run",
}


@dataclass(frozen=True)
class Finding:
    """One file or folder of the run. `repair` removes what is `damaged` or a `leftover`: nothing needs those."""

    name: str
    state: Literal["ok", "damaged", "leftover"]
    what: str


def examine(storage: RunStorage) -> list[Finding]:
    """Everything of the run, newest checkpoint first; every checkpoint is read in full.

    Raises UserError if there is no run, Fault if storage cannot be reached.
    """
    findings = [*_checkpoints(storage), *_leftovers(storage), *_small_files(storage)]
    if not findings:
        raise UserError(f"{storage.location}: is no run; give the folder of a run under the profile's storage")
    return findings


def repair(storage: RunStorage, findings: list[Finding]) -> list[Finding]:
    """Removes what is damaged or left over, and returns it. Complete checkpoints are never touched."""
    removed = [finding for finding in findings if finding.state != "ok"]
    for finding in removed:
        storage.remove(finding.name)
    return removed


def verdict(findings: list[Finding]) -> str:
    """One line: what the run's command would do next."""
    sound = [finding.name for finding in findings if finding.state == "ok"]
    if "result.json" in sound:
        return "the run is complete"
    if "trained.json" in sound:
        return "the training is over; its train command, or `tracking sync` of this folder, brings the rest to MLflow"
    complete = next((name for name in sound if name.startswith("epoch=")), None)
    return f"the run resumes from {complete}" if complete else "the run would start at its first step"


def _checkpoints(storage: RunStorage) -> Iterator[Finding]:
    for name in list_saved(storage):
        try:
            with open_checkpoint(storage, name) as found:
                kind = "best weights" if name.startswith(f"{BEST}/") else "checkpoint"
                top1 = found.metadata.metrics.get("val/top1")
                shown = "" if top1 is None else f", top-1 {top1:.2f} %"
                yield Finding(name, "ok", f"{kind}, recipe {found.metadata.identity.recipe_hash}{shown}")
        except Damaged as damaged:
            yield Finding(name, "damaged", str(damaged))


def _leftovers(storage: RunStorage) -> Iterator[Finding]:
    for name in storage.names():
        if name.startswith(".") and name.endswith(TEMPORARY):
            yield Finding(name, "leftover", "a checkpoint that was not finished")
        if name == RAY_SNAPSHOT:
            yield Finding(name, "leftover", "Ray Train's list of checkpoints; a new start does not use it")


def _small_files(storage: RunStorage) -> Iterator[Finding]:
    for name, what in _SMALL_FILES.items():
        content = storage.read(name)
        if content is None:
            continue
        try:
            parse(content, max_bytes=MAX_SMALL_BYTES, allow_nan=True)
            if name == "result.json":
                read_result(storage)
        except (ValueError, RecursionError, Fault) as error:
            yield Finding(name, "damaged", f"{what}: {error}")
        else:
            yield Finding(name, "ok", what)
