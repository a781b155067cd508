"""`data-prep subset`: some classes, every k-th sample, the first ones, or those of a list."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.beton.manifest import Manifest
from data_prep.edit.copy_samples import Chosen, Input, copy_samples, open_input
from data_prep.errors import UserError
from data_prep.shown import few


@dataclass(frozen=True)
class Selection:
    """At most one of `every`, `first` and `indices`; it is applied to the samples of `classes`. UserError otherwise."""

    classes: tuple[str, ...] = ()
    """Empty: all. Only these stay, in the order they had, and the labels are numbered from 0 again."""
    every: int | None = None
    """Every k-th sample, beginning with the first."""
    first: int | None = None
    indices: tuple[int, ...] | None = None
    """Ids in the beton, in the order wanted; not together with `classes`."""

    def __post_init__(self) -> None:
        given = [name for name in ("every", "first", "indices") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(f"--{given[0]} and --{given[1]}: only one of them can be meant")
        if not given and not self.classes:
            raise UserError("say what to keep: --classes, --every, --first or --indices")
        if self.indices is not None and self.classes:
            raise UserError("--indices and --classes: only one of them can be meant")
        for name in ("every", "first"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} {value}: expected at least 1")

    def as_dict(self) -> Mapping[str, Any]:
        """What was given; of a list of indices only their number, for they may be a million."""
        values = {name: value for name, value in asdict(self).items() if value}
        return values | ({"indices": len(self.indices)} if self.indices is not None else {})


def subset(
    beton: Path, selection: Selection, output: Path, on_written: Callable[[int, int], None] = lambda *_: None
) -> Manifest:
    item = open_input(beton)
    class_names, new_labels = _keep_classes(item, selection)
    samples = _choose(item, selection, new_labels)
    chosen = Chosen(np.zeros(len(samples), np.int64), samples, new_labels[item.reader.labels[samples]], class_names)
    source = {
        "name": "subset",
        "location": "",
        "split": item.manifest.source.get("split", "all"),
        "selection": selection.as_dict(),
    }
    return copy_samples([item], chosen, output, source=source, on_written=on_written)


def _keep_classes(item: Input, selection: Selection) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Names of the classes that stay, and the new label of each old one, -1 for those that go."""
    names = item.manifest.class_names
    if not selection.classes:
        return names, np.arange(len(names))
    unknown = sorted(set(selection.classes) - set(names))
    if unknown:
        raise UserError(f"--classes: {item.reader.path} has no class {few(unknown)}; it has {few(names)}")
    kept = [label for label, name in enumerate(names) if name in set(selection.classes)]
    new_labels = np.full(len(names), -1, dtype=np.int64)
    new_labels[kept] = np.arange(len(kept))
    return tuple(names[label] for label in kept), new_labels


def _choose(item: Input, selection: Selection, new_labels: NDArray[np.int64]) -> NDArray[np.int64]:
    if selection.indices is not None:
        largest = max(selection.indices, default=0)
        if largest >= len(item.reader):
            raise UserError(
                f"--indices: {item.reader.path} has the samples 0..{len(item.reader) - 1}, asked for {largest}"
            )
        return np.array(selection.indices, dtype=np.int64)
    samples = np.flatnonzero(new_labels[item.reader.labels] >= 0)
    return samples[:: selection.every][: selection.first]
