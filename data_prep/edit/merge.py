"""`data-prep merge`: betons of the same classes, one behind the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from data_prep.beton.class_names import difference
from data_prep.beton.digest import digest_bytes
from data_prep.beton.manifest import Manifest
from data_prep.edit.copy_samples import Chosen, Input, copy_samples, open_input
from data_prep.errors import UserError


def merge(betons: Sequence[Path], output: Path, on_written: Callable[[int, int], None] = lambda *_: None) -> Manifest:
    """All samples of the first, then all of the second, ... UserError when their class names differ, or the same images
    are given twice."""
    if len(betons) < 2:
        raise UserError("merge needs at least two betons")
    inputs = [open_input(beton) for beton in betons]
    _require_different(inputs)
    _require_same_classes(inputs)
    chosen = Chosen(
        inputs=np.concatenate([np.full(len(item.reader), number) for number, item in enumerate(inputs)]),
        samples=np.concatenate([np.arange(len(item.reader)) for item in inputs]),
        labels=np.concatenate([item.reader.labels for item in inputs]),
        class_names=inputs[0].manifest.class_names,
    )
    identity = digest_bytes(" ".join(item.manifest.digest for item in inputs).encode())
    source = {"name": "merge", "location": "", "split": inputs[0].manifest.source.get("split", "all")}
    return copy_samples(inputs, chosen, output, source={**source, "identity": identity}, on_written=on_written)


def _require_different(inputs: Sequence[Input]) -> None:
    """By content, whatever their names: each of its samples would be there twice."""
    first: dict[str, Input] = {}
    for item in inputs:
        same = first.setdefault(item.manifest.digest, item)
        if same is not item:
            raise UserError(
                f"merge: {same.reader.path} and {item.reader.path} hold the same images; name them once (samples are "
                "repeated on purpose with `data-prep subset BETON --output FILE --indices FILE`)"
            )


def _require_same_classes(inputs: Sequence[Input]) -> None:
    first = inputs[0]
    for other in inputs[1:]:
        differ = difference(
            first.manifest.class_names,
            other.manifest.class_names,
            str(first.reader.path),
            str(other.reader.path),
        )
        if differ is not None:
            raise UserError(
                f"merge: the betons have different classes, so their labels do not mean the same: {differ}; convert "
                "them with the same class folders"
            )
