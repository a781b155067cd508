"""WebDataset shards: tars in which files of one name with several endings are a sample (`a.jpg`, `a.cls`, `a.json`).

The image is the `.jpg`, `.jpeg`, `.png` or `.webp`; the label the number in `.cls`, else `label` in the `.json`.
`--input` is a folder of tars, one tar, a glob, or a pattern with braces (`train-{0000..1023}.tar`), local or a URL. The
format has no class names: `--labels` may name a file with one a line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.sources.base import Sample, SourceDescription, digest_of
from data_prep.sources.ends import HEAD_BYTES, Ends
from data_prep.sources.find_places import find_places, place_of
from data_prep.sources.imagenet import are_wnids, check_labels, label_map
from data_prep.sources.label_file import read_class_names
from data_prep.sources.listing import PackedStrings, listing_identity
from data_prep.sources.parallel import list_each
from data_prep.sources.places import IS_URL, Place, Reader, without_credentials
from data_prep.sources.ranges import FileRanges, RecordedFile, record
from data_prep.sources.splits import SPLIT_WORDS, SplitRequest, choose_split
from data_prep.sources.tar_index import Member, walk_tar

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")
MAX_LABEL_BYTES = 1 << 20
MAX_CLASSES = 1_000_000


class ShardSample(NamedTuple):
    key: str
    offset: int
    num_bytes: int
    label: int


@dataclass(frozen=True)
class ListedShard:
    samples: list[ShardSample]
    num_left_out: int
    """Files that belong to no sample."""

    def __len__(self) -> int:
        return len(self.samples)


class WebDataset:
    """Samples in the order of the shards' names and of the files within."""

    def __init__(
        self, location: str, split: str, shards: Sequence[RecordedFile], class_names: tuple[str, ...] | None
    ) -> None:
        listed = list(list_each(_list_shard, shards))
        samples = [sample for shard in listed for sample in shard.samples]
        if not samples:
            raise UserError(f"{location}: holds no samples")
        names = [sample.key for sample in samples]
        self.labels = np.array([sample.label for sample in samples], dtype=np.int64)
        self.sizes: NDArray[np.int64] = np.array([sample.num_bytes for sample in samples], dtype=np.int64)
        self.class_names = _check_classes(self.labels, class_names, location)
        numbers = np.repeat(np.arange(len(shards), dtype=np.int32), [len(shard) for shard in listed])
        offsets = np.array([sample.offset for sample in samples], dtype=np.int64)
        self._ranges = FileRanges(shards, numbers, offsets, self.sizes)
        self._names = PackedStrings(names)
        label_of = label_map(self.class_names) if are_wnids(self.class_names) else {}
        identity = listing_identity(self.class_names, names, self.sizes, self.labels)
        self._description = SourceDescription(
            "webdataset",
            location,
            split,
            identity,
            digest_of([identity, *(value for shard in shards for value in shard.status)]),
            sum(shard.num_left_out for shard in listed),
            label_map=label_of,
            label_checks=check_labels(label_of, self.labels, names, location),
        )

    @classmethod
    def open(cls, location: str | None, split: SplitRequest, *, labels: str | None = None) -> Self:
        if location is None:
            raise UserError("--source webdataset needs --input: a folder of tars, a glob, or a pattern with braces")
        shown, by_split = _find_shards(location)
        name = (
            "all" if set(by_split) == {"all"} and not split.explicit else choose_split(sorted(by_split), split, shown)
        )
        class_names = read_class_names(place_of(labels)) if labels else None
        try:
            return cls(shown, name, [record(place) for place in by_split[name]], class_names)
        except OSError as error:
            raise UserError(f"{error.filename or shown}: cannot be read: {error.strerror or error}") from None

    def describe(self) -> SourceDescription:
        return self._description

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, index: int) -> str:
        """`<shard>/<file without ending>`."""
        return f"{self._ranges.file_of(index).name}/{self._names[index]}"

    def __getitem__(self, index: int) -> Sample:
        return Sample(self._ranges.read(index), int(self.labels[index]), self.key(index))

    def ends(self, indices: Sequence[int], max_head_bytes: int = HEAD_BYTES) -> Ends:
        return self._ranges.ends(indices, max_head_bytes)

    def read_into(self, indices: Sequence[int], into: memoryview) -> None:
        self._ranges.read_into(indices, into)


def split_of_shard(name: str, folder: str) -> str:
    """`imagenet1k-validation-0001.tar` -> `validation`; else the folder's name if that is a split; else `all`."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((word for word in [*words, folder] if word in SPLIT_WORDS), "all")


def _find_shards(location: str) -> tuple[str, dict[str, list[Place]]]:
    """What to show of the location, and the shards of each split."""
    try:
        places = find_places(location)
        if len(places) == 1 and places[0].kind() == "folder":
            folder = places[0]
            names = sorted(file.name for file in folder.files() if file.name.endswith(".tar"))
            places = [folder.child(name) for name in names]
            shown = folder.shown
        else:
            shown = places[0].shown if len(places) == 1 else _show_pattern(location)
            missing = [place for place in places if place.kind() != "file"]
            if missing:
                raise UserError(
                    f"{missing[0].shown}: does not exist; {len(missing):,} of {len(places):,} shards are missing"
                )
    except OSError as error:
        raise UserError(f"{error.filename or '--input'}: cannot be listed: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"--input: {error}") from None
    if not places:
        raise UserError(f"--input {shown}: no tars there; expected a folder of tars, a glob, or a pattern with braces")
    by_split: dict[str, list[Place]] = {}
    for place in places:
        by_split.setdefault(split_of_shard(place.name, place.parent().name), []).append(place)
    return shown, by_split


def _show_pattern(location: str) -> str:
    return without_credentials(location) if IS_URL.match(location) else place_of(location).shown


def _list_shard(shard: RecordedFile) -> ListedShard:
    shown = shard.place.shown
    samples: list[ShardSample] = []
    num_left_out = 0
    with closing(shard.place.reader(shard.status)) as reader:
        members = walk_tar(reader.read_at, 0, shard.status.num_bytes, shown)
        for key, group in groupby(_with_endings(members), key=lambda item: item[0]):
            files = {ending: member for _, ending, member in group}
            image = next((files[ending] for ending in IMAGE_ENDINGS if ending in files), None)
            if image is None:
                num_left_out += len(files)
                continue
            samples.append(ShardSample(key, image.offset, image.num_bytes, _label(files, reader, f"{shown}: {key}")))
    return ListedShard(samples, num_left_out)


def _with_endings(members: Iterator[Member]) -> Iterator[tuple[str, str, Member]]:
    """(key, ending, member): the key ends at the first dot of the file's name. Hidden files are passed over."""
    for member in members:
        folder, slash, name = member.name.rpartition("/")
        stem, _, ending = name.partition(".")
        if stem:
            yield f"{folder}{slash}{stem}", ending.lower(), member


def _label(files: dict[str, Member], reader: Reader, where: str) -> int:
    """UserError when the sample has no label or no number as one."""
    member = files.get("cls", files.get("json"))
    if member is None:
        raise UserError(f"{where}: has neither .cls nor .json, so no label")
    ending = "cls" if "cls" in files else "json"
    if member.num_bytes > MAX_LABEL_BYTES:
        raise UserError(f"{where}.{ending}: has {member.num_bytes:,} bytes, expected a label")
    text = reader.read_at(member.offset, member.num_bytes)
    try:
        return int(text) if ending == "cls" else int(json.loads(text)["label"])
    except (KeyError, RecursionError, TypeError, ValueError):
        raise UserError(f"{where}.{ending}: holds no label; expected a number, in json under the key label") from None


def _check_classes(labels: NDArray[np.int64], names: tuple[str, ...] | None, where: str) -> tuple[str, ...]:
    smallest, largest = int(labels.min()), int(labels.max())
    if smallest < 0 or (names is not None and largest >= len(names)):
        expected = f"0..{len(names) - 1}" if names is not None else "from 0"
        hint = "; hidden test labels are -1: choose another --split" if smallest < 0 else ""
        raise UserError(f"{where}: has labels {smallest}..{largest}, expected {expected}{hint}")
    if largest >= MAX_CLASSES:
        raise UserError(f"{where}: has labels up to {largest}; expected numbers of classes, below {MAX_CLASSES:,}")
    return names if names is not None else tuple(str(label) for label in range(largest + 1))
