"""Any source with a list of classes that is given: labels count in that list, and mean the same in every split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.shown import few
from data_prep.sources.base import Sample, Source, SourceDescription, SourceWithEnds, digest_of, notes_of
from data_prep.sources.ends import HEAD_BYTES, Ends
from data_prep.sources.imagenet import are_wnids, check_labels, label_map


def with_classes(source: Source, class_names: tuple[str, ...], where: str) -> Source:
    """The same samples, with labels by that list; the source itself if its classes are those already.

    `where` names the list. Classes without samples are noted. UserError when samples are of a class that is not listed.
    """
    if tuple(source.class_names) == class_names:
        return source
    return (
        FixedClassesWithEnds(source, class_names, where)
        if isinstance(source, SourceWithEnds)
        else FixedClasses(source, class_names, where)
    )


class FixedClasses:
    def __init__(self, source: Source, class_names: tuple[str, ...], where: str) -> None:
        described = source.describe()
        label_of = {name: label for label, name in enumerate(class_names)}
        counts = np.bincount(source.labels, minlength=len(source.class_names))
        used = [name for name, count in zip(source.class_names, counts.tolist(), strict=True) if count]
        unknown = [name for name in used if name not in label_of]
        if unknown:
            raise UserError(
                f"{described.location}: has images of {few(unknown)}, which {where} does not list; add the name there, "
                "or leave these images out"
            )
        new_labels = np.array([label_of.get(name, -1) for name in source.class_names], dtype=np.int64)
        self._source = source
        self.class_names = class_names
        self.labels: NDArray[np.int64] = new_labels[source.labels]
        found = set(source.class_names)
        missing = [name for name in class_names if name not in found]
        note = f"{len(missing):,} of the {len(class_names):,} classes of {where} are not here: {few(missing)}"
        self.notes = (*notes_of(source), *([note] if missing else []))
        wnids = label_map(class_names) if are_wnids(class_names) else {}
        keys = (source.key(index) for index in range(len(source)))
        self._description = replace(
            described,
            identity=digest_of([described.identity, "classes", *class_names]),
            state=digest_of([described.state, "classes", *class_names]),
            label_map=wnids,
            label_checks=check_labels(wnids, self.labels, keys, described.location),
        )

    @property
    def sizes(self) -> NDArray[np.int64] | None:
        return self._source.sizes

    def describe(self) -> SourceDescription:
        return self._description

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, index: int) -> str:
        return self._source.key(index)

    def __getitem__(self, index: int) -> Sample:
        return replace(self._source[index], label=int(self.labels[index]))


class FixedClassesWithEnds(FixedClasses):
    _source: SourceWithEnds

    def ends(self, indices: Sequence[int], max_head_bytes: int = HEAD_BYTES) -> Ends:
        return self._source.ends(indices, max_head_bytes)

    def read_into(self, indices: Sequence[int], into: memoryview) -> None:
        self._source.read_into(indices, into)
