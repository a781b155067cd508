"""What an earlier, interrupted run of the same plan left: the parts that are whole."""

from __future__ import annotations

from collections.abc import Callable

from data_prep.convert.output import Output, names_like, read_work_file
from data_prep.convert.part import PART_PREFIX, WHOLE_PREFIX, Part, part_name, read_part
from data_prep.convert.place import NOTE_PREFIX
from data_prep.convert.plan import Plan, WorkUnit
from data_prep.errors import Fault

PLAN_NAME = "plan"


def finished_parts(output: Output, plan: Plan, note: Callable[[str], object]) -> list[Part]:
    """The units that an earlier run finished; parts and notes of another plan are removed, which `note` is told."""
    before = read_work_file(output, PLAN_NAME)
    if before != plan.digest.encode():
        if before is not None:
            note("an unfinished conversion with other settings or files, or of another version, begins again")
        for stale in names_like(output, PART_PREFIX, NOTE_PREFIX, WHOLE_PREFIX):
            output.remove(stale)
        output.write(PLAN_NAME, plan.digest.encode())
    names = output.names()
    found = (whole_part(output, plan, unit) for unit in plan.units if part_name(unit.number) in names)
    return [part for part in found if part is not None]


def whole_part(output: Output, plan: Plan, unit: WorkUnit) -> Part | None:
    """None when it is not there, or not whole."""
    try:
        return read_part(output, plan.digest, unit)
    except Fault:
        return None


def is_part_there(output: Output, unit: WorkUnit) -> bool:
    try:
        return output.size_of(part_name(unit.number)) > 0
    except FileNotFoundError:
        return False
