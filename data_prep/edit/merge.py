"""`data-prep merge`: betons of the same classes, one behind the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from data_prep.beton.digest import combine
from data_prep.beton.manifest import Manifest
from data_prep.edit.copy_samples import Chosen, Input, copy_samples, open_input
from data_prep.errors import UserError


def merge(betons: Sequence[Path], output: Path, on_written: Callable[[int, int], None] = lambda *_: None) -> Manifest:
    """All samples of the first, then all of the second, ... UserError when their class names differ."""
    if len(betons) < 2:
        raise UserError("merge needs at least two betons")
    inputs = [open_input(beton) for beton in betons]
    _require_same_classes(inputs)
    chosen = Chosen(
        inputs=np.concatenate([np.full(len(item.reader), number) for number, item in enumerate(inputs)]),
        samples=np.concatenate([np.arange(len(item.reader)) for item in inputs]),
        labels=np.concatenate([item.reader.labels for item in inputs]),
        class_names=inputs[0].manifest.class_names,
    )
    identity = combine([item.manifest.digest.partition(":")[2] for item in inputs]).whole
    source = {"name": "merge", "location": "", "split": inputs[0].manifest.source.get("split", "all")}
    return copy_samples(inputs, chosen, output, source={**source, "identity": identity}, on_written=on_written)


def _require_same_classes(inputs: Sequence[Input]) -> None:
    first = inputs[0]
    for other in inputs[1:]:
        mine, theirs = first.manifest.class_names, other.manifest.class_names
        if mine != theirs:
            where = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), None)
            what = (
                f"{len(mine)} and {len(theirs)} of them"
                if where is None
                else f"class {where} is {mine[where]} in the first, {theirs[where]} in the other"
            )
            raise UserError(
                f"{first.reader.path} and {other.reader.path}: have different classes ({what}), so their labels do not "
                "mean the same; convert them with the same class folders"
            )
