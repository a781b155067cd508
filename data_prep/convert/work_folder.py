"""`<output>.work/`: the parts of an unfinished conversion, owned by one driver at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.convert.part import Part, part_path, read_part
from data_prep.convert.plan import Plan, WorkUnit
from data_prep.errors import Fault, UserError

PLAN_FILE = "plan"


class WorkFolder:
    def __init__(self, path: Path, plan: Plan) -> None:
        self.path = path
        self._plan = plan

    def finished_parts(self) -> list[Part]:
        """The units that an earlier run of this same plan finished; what another plan left in the folder is removed."""
        plan_file = self.path / PLAN_FILE
        if not plan_file.exists() or plan_file.read_text() != self._plan.digest:
            for stale in [*self.path.glob("unit-*"), *self.path.glob("range-*"), *self.path.glob("*.unfinished")]:
                stale.unlink(missing_ok=True)
            plan_file.write_text(self._plan.digest)
        for scrap in self.path.glob("*.tmp"):
            scrap.unlink(missing_ok=True)
        names = {entry.name for entry in self.path.iterdir()}
        found = (self.part(u) for u in self._plan.units if part_path(self.path, u.number).name in names)
        return [part for part in found if part is not None]

    def part(self, unit: WorkUnit) -> Part | None:
        """None when it is not there, or not whole."""
        try:
            return read_part(part_path(self.path, unit.number), self._plan.digest, unit)
        except Fault:
            return None

    def target(self, layout_digest: str) -> Path:
        """The unfinished beton. Others, which an earlier run began from other parts, are removed."""
        target = self.path / f"beton-{layout_digest[:16]}.unfinished"
        for stale in self.path.glob("*.unfinished"):
            if stale != target:
                stale.unlink(missing_ok=True)
        return target


def work_path(output: Path) -> Path:
    return output.with_name(output.name + ".work")


def remove_work(output: Path) -> None:
    """At the end, when the beton and its manifest stand."""
    shutil.rmtree(work_path(output), ignore_errors=True)


@contextmanager
def work_folder(output: Path, plan: Plan) -> Iterator[WorkFolder]:
    """Takes the folder for this process. UserError when another one has it, or it cannot be written.

    The lock goes with the process, however that ends.
    """
    path = work_path(output)
    try:
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}; choose another --output") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(f"{output}: another data-prep is writing it; wait for that one or stop it") from None
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):  # a file system without locks
                raise
        yield WorkFolder(path, plan)
    finally:
        os.close(descriptor)
