"""Which split of a source is meant: asked for by `--split`, implied by the output's name, or not said at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import UserError

ALIASES = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "test"),
    "validation": ("validation", "val", "valid"),
    "valid": ("valid", "val", "validation"),
    "test": ("test",),
}
"""Names a split may have in a source, best first. Data sets of the Hub without a validation split call theirs test."""


@dataclass(frozen=True)
class SplitRequest:
    name: str | None
    explicit: bool
    """False when the name was taken from the output (`train.beton`): then a source without splits is taken whole."""


def requested_split(option: str | None, output: Path) -> SplitRequest:
    """From `--split` and `--output`."""
    if option is not None:
        return SplitRequest(option, explicit=True)
    return SplitRequest(output.stem if output.stem in ALIASES else None, explicit=False)


def choose_split(available: Sequence[str], request: SplitRequest, where: str) -> str:
    """The source's name of the split that was meant. UserError, naming all of them, when that is not clear.

    `available` holds the splits of the source, at least one; `where` names the source in errors.
    """
    listed = ", ".join(available)
    if request.name is None:
        if len(available) == 1:
            return available[0]
        raise UserError(f"{where}: holds the splits {listed}; say which with --split")
    for name in ALIASES.get(request.name, (request.name,)):
        if name in available:
            return name
    asked = f"--split {request.name}" if request.explicit else f"the output's name ({request.name})"
    raise UserError(
        f"{where}: holds the splits {listed}, none of which is what {asked} asks for; say which with --split"
    )
