"""Divides a source's samples into train and val, by a share or as a table says, and makes both betons.

A share is drawn per image, from a hash of its path (its key, where a source has no paths), so that an image's side does
not depend on the others: images that are added later leave the old ones where they are. There are two exceptions. A
class with images on one side only would be useless, so its image nearest to the border is put on the other side. And
files that are equal byte for byte count as one image, that with the largest hash, so that no copy of a training image
is in val.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep.beton.contents import CONTENT, NO_CONTENT, content_of
from data_prep.beton.files import BETON
from data_prep.converter.context import Pool, Progress
from data_prep.converter.convert import ConvertReport, convert_opened, open_pool
from data_prep.converter.output import open_output
from data_prep.converter.plan import UNIT_SAMPLES
from data_prep.converter.settings import BadPolicy, ConvertSettings
from data_prep.converter.source import open_named
from data_prep.errors import UserError
from data_prep.runtime.stop import StopFlag
from data_prep.shown import count_of, few, shown
from data_prep.sources.base import NO_OPTIONS, Source, SourceOptions, UnreadableSample, read_sample, select
from data_prep.sources.files.find import storage_path
from data_prep.sources.label_file import read_split_file
from data_prep.sources.splits import SplitRequest, requested_split

SPLITS = ("train", "val", "test")
TRAIN, VAL = 0, 1
RULE = "split"
"""In `SourceDescription.selected`."""


@dataclass(frozen=True)
class SplitRule:
    """How a source is divided; by default as it is already. UserError for values out of range."""

    val_share: float | None = None
    """Share of each class's images for validation, 0..1 exclusive: expected, since each image is drawn by itself."""
    seed: int = 0
    """With `val_share`: another seed draws other images."""
    table: str | None = None
    """A table of files and splits."""

    def __post_init__(self) -> None:
        if self.val_share is not None and self.table is not None:
            raise UserError("--val-share and --split-from: give only one of them")
        if self.val_share is not None and not 0 < self.val_share < 1:
            raise UserError(f"--val-share {self.val_share:g}: expected a share between 0 and 1, such as 0.2")
        if not 0 <= self.seed < 1 << 64:
            raise UserError(f"--split-seed {self.seed}: expected 0..2**64-1")

    @property
    def is_given(self) -> bool:
        return self.val_share is not None or self.table is not None


def convert_splits(
    source: str,
    folder: str | Path,
    rule: SplitRule = SplitRule(),
    *,
    input: str | None = None,
    split: str | None = None,
    options: SourceOptions = NO_OPTIONS,
    classes: str | None = None,
    skip_unlisted: bool = False,
    settings: ConvertSettings = ConvertSettings(),  # noqa: B008 - frozen
    bad_policy: BadPolicy = BadPolicy(),  # noqa: B008 - frozen
    workers: int | Pool | None = 0,
    progress: Progress | None = None,
    stop: StopFlag | None = None,
) -> dict[str, ConvertReport]:
    """Makes `train.beton` and `val.beton` in `folder` (and `test.beton`, if a table says so), or resumes.

    >>> import data_prep, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     made = data_prep.convert_splits("digits", folder, data_prep.SplitRule(val_share=0.2))
    >>> {name: report.manifest.num_samples for name, report in made.items()}
    {'train': 1422, 'val': 375}

    Args:
        folder: a path, or `s3://bucket/folder`.
        rule: how the source is divided. By default it has splits, and its train and val are taken.
        split: which split of the source to divide; None: the only one, or all of a source without splits.

    The other arguments, and what is raised, are those of `convert`.
    """
    progress, stop = progress or Progress(), stop or StopFlag()
    outputs = {name: f"{str(folder).rstrip('/') or '/'}/{name}{BETON}" for name in SPLITS}
    how: dict[str, Any] = {"settings": settings, "bad_policy": bad_policy, "progress": progress, "stop": stop}
    open_whole = partial(open_named, source, input, options=options, classes=classes, skip_unlisted=skip_unlisted)
    if split is not None and not rule.is_given:
        raise UserError("--split names one split: give --output FILE.beton, or divide it by --val-share")
    with open_pool(workers, progress, stop) as pool:
        parts: dict[str, tuple[Source, Callable[[], Source]]] = {}
        if rule.is_given:
            reopen = partial(open_whole, SplitRequest(split, explicit=split is not None))
            whole = reopen()
            for name, part in divide(whole, rule, pool, progress).items():
                parts[name] = part, partial(_again, reopen, whole, part)
        else:
            for name in ("train", "val"):
                reopen = partial(open_whole, requested_split(None, Path(outputs[name])))
                parts[name] = reopen(), reopen
        return {
            name: convert_opened(part, open_output(outputs[name]), reopen, pool, **how)
            for name, (part, reopen) in parts.items()
        }


def _again(reopen: Callable[[], Source], whole: Source, part: Source) -> Source:
    """`part`, if its source has not changed since."""
    opened = reopen()
    return part if opened.description == whole.description else opened


def divide(source: Source, rule: SplitRule, pool: Pool, progress: Progress) -> dict[str, Source]:
    """The parts of a source by split. UserError when one would be empty, or the table does not fit the source."""
    if len(source) == 0:
        raise UserError(f"{source.description.location}: holds no samples")
    keys = [source.key(index) for index in range(len(source))]
    values: dict[str, Any] = {"of": source.description.split}
    notes: list[str] = []
    if rule.table is not None:
        path = storage_path(rule.table)
        found = read_split_file(path, keys)
        sides = np.array([SPLITS.index(name) for name in found], dtype=np.int8)
        values["table"] = path.shown
    else:
        assert rule.val_share is not None
        first = find_copies(source, pool, progress)
        sides = draw_val(keys, source.labels, first, rule.val_share, rule.seed).astype(np.int8)
        (copies,) = np.nonzero(first != np.arange(len(first)))
        if len(copies):
            pair = f"{shown(keys[copies[0]])} is {shown(keys[first[copies[0]]])}"
            notes.append(f"{count_of(len(copies), 'file')} equal to others, all on the side of these: {pair}")
            labels = np.asarray(source.labels)
            (torn,) = np.nonzero(labels != labels[first])
            if len(torn):
                pair = f"{shown(keys[torn[0]])} is {shown(keys[first[torn[0]]])}"
                notes.append(f"warning: {count_of(len(torn), 'picture')} in two classes, which one is right? {pair}")
        values |= {"val_share": rule.val_share, "seed": rule.seed, "copies": len(copies)}
    parts: dict[str, Source] = {}
    for side, name in enumerate(SPLITS):
        indices = np.flatnonzero(sides == side)
        if not len(indices) and name == "test":
            continue
        if not len(indices):
            reason = f"{rule.table} names none" if rule.table else f"there are {len(source):,}, too few"
            raise UserError(f"{source.description.location}: no image would be in {name}: {reason}")
        part = select(source, indices, RULE, {**values, "split": name})
        part.description = replace(part.description, split=name)
        parts[name] = part
    counts = {name: np.bincount(part.labels, minlength=len(source.class_names)) for name, part in parts.items()}
    shares = ", ".join(f"{name} {len(part):,} ({len(part) / len(source):.1%})" for name, part in parts.items())
    notes.insert(0, f"{source.description.location}: {len(source):,} images: {shares}")
    for name, of_part in counts.items():
        lacking = [source.class_names[label] for label in np.flatnonzero((of_part == 0) & (sum(counts.values()) > 0))]
        if lacking:
            notes.append(f"{count_of(len(lacking), 'class', 'classes')} without images in {name}: {few(lacking)}")
    for name, part in parts.items():
        part.notes = (*source.notes, *notes) if name == "train" else ()
    return parts


def source_split(manifest_source: Mapping[str, Any]) -> str | None:
    """The source's own split that a beton is of, or is a part of."""
    values = (manifest_source.get("selected") or {}).get(RULE) or {}
    return values.get("of") or manifest_source.get("split")


def divided_as(manifest_source: Mapping[str, Any], source: Source) -> Source:
    """The part of an undivided source that a manifest describes."""
    values = (manifest_source.get("selected") or {}).get(RULE)
    if values is None:
        return source
    try:
        rule = SplitRule(values.get("val_share"), values.get("seed", 0), values.get("table"))
        name = values["split"]
        return divide(source, rule, open_pool(0, Progress(), StopFlag()), Progress())[name]
    except (KeyError, TypeError, AttributeError):
        raise UserError(
            "the manifest's source.selected.split is not what data-prep writes; make the beton again"
        ) from None


# --- by a share -------------------------------------------------------------------------------------------------------


def draw_val(
    keys: Sequence[str], labels: NDArray[np.int64], first: NDArray[np.int64], share: float, seed: int
) -> NDArray[np.bool_]:
    """[samples] whether each is for validation.

    Args:
        keys: names of the samples, as stable as the split shall be.
        first: [samples] the first sample that is equal to each; its own index if there is none before it.
    """
    hashes = np.array([_hash(key, seed) for key in keys], dtype=np.uint64)
    of_copies = np.zeros_like(hashes)
    np.maximum.at(of_copies, first, hashes)
    (images,) = np.nonzero(first == np.arange(len(first)))
    is_val = of_copies < np.uint64(share * 2.0**64)
    by_class = images[np.argsort(labels[images], kind="stable")]
    for members in np.split(by_class, np.flatnonzero(np.diff(labels[by_class])) + 1):
        if len(members) < 2:
            is_val[members] = False
        elif is_val[members].all():
            is_val[members[np.argmax(of_copies[members])]] = False
        elif not is_val[members].any():
            is_val[members[np.argmin(of_copies[members])]] = True
    return is_val[first]


def _hash(key: str, seed: int) -> int:
    return xxhash.xxh3_64_intdigest(key.encode("utf-8", errors="surrogateescape"), seed=seed)


# --- equal files ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FilesToCompare:
    number: int
    indices: NDArray[np.int64]

    def __str__(self) -> str:
        return f"{len(self.indices):,} files to compare"


def find_copies(source: Source, pool: Pool, progress: Progress) -> NDArray[np.int64]:
    """[samples] the first sample whose file has the same bytes; its own index if there is none before it.

    Reads the files of which another has the same size, or all if sizes are not known.
    """
    first = np.arange(len(source), dtype=np.int64)
    asked = _maybe_equal(source)
    if not len(asked):
        return first
    progress.log(f"comparing {count_of(len(asked), 'file')}, so that equal ones are on the same side")
    digests = np.zeros(len(asked), dtype=CONTENT)
    with closing(pool.run(digest_files, source, _tasks(asked))) as reports:
        for number, found in reports:
            start = number * UNIT_SAMPLES
            digests[start : start + UNIT_SAMPLES] = np.frombuffer(found, dtype=CONTENT)
    seen: dict[bytes, int] = {}
    for index, digest in zip(asked.tolist(), digests.tolist(), strict=True):
        if digest != NO_CONTENT:
            first[index] = seen.setdefault(digest, index)
    return first


def _maybe_equal(source: Source) -> NDArray[np.int64]:
    """Indices of samples that may be equal to others, by the sizes of their files."""
    sizes = source.sizes
    if sizes is None or (sizes < 0).any():
        return np.arange(len(source), dtype=np.int64)
    _, numbers, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    return np.flatnonzero((counts[numbers] > 1) & (sizes > 0))


def _tasks(asked: NDArray[np.int64]) -> Iterator[FilesToCompare]:
    for number, start in enumerate(range(0, len(asked), UNIT_SAMPLES)):
        yield FilesToCompare(number, asked[start : start + UNIT_SAMPLES])


def digest_files(source: Source, task: FilesToCompare) -> tuple[int, bytes]:
    """The task's number, and a `CONTENT` for each of its files, `NO_CONTENT` for those that cannot be read: conversion
    will report them. In a worker."""
    digests = bytearray()
    for index in task.indices.tolist():
        try:
            digests += content_of(read_sample(source, index).data)
        except UnreadableSample:
            digests += NO_CONTENT
    return task.number, bytes(digests)
