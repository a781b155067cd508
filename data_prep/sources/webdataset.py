"""WebDataset shards: tars in which files of one name with several endings are a sample (`a.jpg`, `a.cls`, `a.json`).

By the format's convention a name ends at its first dot, and the files of a sample lie side by side. The image is the
file with an image's ending; the label the number or text in `.cls`, else `label` in the `.json`. `--image-column` and
`--label-column` name other endings, or another key of the `.json`. `--input` is a folder of tars, one tar, a glob, or a
pattern with braces (`train-{0000..1023}.tar`), local or a URL. The format has no class names: `--labels` may name a
file with one a line.

Every file is a part of a sample, or counted as left out; a sample that is not understood is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.shown import shown
from data_prep.sources.base import MAX_NAMED, Sample, SourceDescription, digest_of, listing_identity, skipped_notes
from data_prep.sources.files.find import place_of
from data_prep.sources.files.listing import FileRanges, PackedStrings, RecordedFile, list_each, record
from data_prep.sources.files.places import HEAD_BYTES, Ends, Reader
from data_prep.sources.files.tar import Member, walk_tar
from data_prep.sources.image_folder import SUFFIXES
from data_prep.sources.imagenet import are_wnids, check_labels, label_map
from data_prep.sources.label_file import read_class_names
from data_prep.sources.labels import (
    Label,
    digits_label,
    exact_label,
    labels_without_samples,
    number_classes,
    require_order,
    text_label,
)
from data_prep.sources.shards import Chosen, choose_shards, find_shards, names_in_keys, refuse_splits_within
from data_prep.sources.splits import SplitRequest

IMAGE_ENDINGS = frozenset(suffix.removeprefix(".") for suffix in SUFFIXES)
LABEL_ENDING, TABLE_ENDING, TABLE_KEY = "cls", "json", "label"
MAX_LABEL_BYTES = 1 << 20
NUMBER_IN_TABLE = re.compile(rb'"label"\s*:\s*([0-9]+)')
"""Where it says what the `.cls` says, as it nearly always does, the `.json` need not be parsed."""
SPLIT_IN_TABLE = re.compile(rb'"split"\s*:\s*"([^"\\]{1,40})"')


class Columns(NamedTuple):
    """What the user said of the samples' files."""

    image: str | None = None
    """Ending of the image."""
    label: str | None = None
    """Ending of the file with the label, or its key in the `.json`."""


class ShardSample(NamedTuple):
    key: str
    offset: int
    num_bytes: int
    label: Label


@dataclass(frozen=True)
class ListedShard:
    samples: list[ShardSample]
    num_left_out: int
    """Files that belong to no sample."""
    left_out: list[str]
    """The first of them."""
    splits: frozenset[str]
    """What the `.json` files say under `split`."""

    def __len__(self) -> int:
        return len(self.samples)


class WebDataset:
    """Samples in the order of the shards' names and of the files within."""

    def __init__(
        self,
        location: str,
        split: SplitRequest,
        chosen: Chosen,
        shards: Sequence[RecordedFile],
        shard_names: Sequence[str],
        class_names: tuple[str, ...] | None,
        class_order: str | None,
        columns: Columns,
    ) -> None:
        listed = list(list_each(lambda shard: list_shard(shard, columns), shards))
        samples = [sample for shard in listed for sample in shard.samples]
        found: dict[Label, str] = {}
        for shard, shard_name in zip(listed, shard_names, strict=True):
            if not shard.samples and not shard.num_left_out:
                raise UserError(
                    f"{location}: {shard_name} holds no files: an empty archive, or a download that was not finished; "
                    "remove it or download it again"
                )
            for sample in shard.samples:
                if sample.label not in found:
                    found[sample.label] = f"{shard_name}/{shown(sample.key)}"
        if not samples:
            raise UserError(f"{location}: holds no samples")
        names = [sample.key for sample in samples]
        folders = {folder for parent in {name.rpartition("/")[0] for name in names} for folder in parent.split("/")}
        refuse_splits_within(sorted(folders), "the folders", split, location)
        said = sorted({value for shard in listed for value in shard.splits})
        refuse_splits_within(said, "the key split in .json", split, location)
        self.class_names, label_of = number_classes(found, class_names, class_order, location)
        self.labels = np.array([label_of[sample.label] for sample in samples], dtype=np.int64)
        self.sizes: NDArray[np.int64] = np.array([sample.num_bytes for sample in samples], dtype=np.int64)
        numbers = np.repeat(np.arange(len(shards), dtype=np.int32), [len(shard) for shard in listed])
        offsets = np.array([sample.offset for sample in samples], dtype=np.int64)
        self._ranges = FileRanges(shards, numbers, offsets, self.sizes)
        self._shard_names = tuple(shard_names)
        self._names = PackedStrings(names)
        wnids = label_map(self.class_names) if are_wnids(self.class_names) else {}
        identity = listing_identity(self.class_names, names, self.sizes, self.labels)
        self._description = SourceDescription(
            "webdataset",
            location,
            chosen.split,
            identity,
            digest_of([identity, *(value for shard in shards for value in shard.status)]),
            sum(shard.num_left_out for shard in listed),
            label_map=wnids,
            label_checks=check_labels(wnids, self.labels, names, location),
            left_out=[f"{n}/{name}" for n, s in zip(shard_names, listed, strict=True) for name in s.left_out][
                :MAX_NAMED
            ],
        )
        self.notes = (
            *chosen.notes,
            *labels_without_samples(self.labels, self.class_names),
            *skipped_notes(self._description),
        )

    @classmethod
    def open(
        cls,
        location: str | None,
        split: SplitRequest,
        *,
        labels: str | None = None,
        class_order: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
    ) -> Self:
        if location is None:
            raise UserError("--source webdataset needs --input: a folder of tars, a glob, or a pattern with braces")
        require_order(class_order)
        shards = find_shards(location, ".tar", "tars")
        chosen = choose_shards(shards, split)
        class_names = read_class_names(place_of(labels)) if labels else None
        columns = Columns(_ending(image_column), label_column)
        try:
            files = [record(shards.places[index]) for index in chosen.indices]
            names = names_in_keys(shards, chosen.indices)
            return cls(shards.shown, split, chosen, files, names, class_names, class_order, columns)
        except OSError as error:
            raise UserError(f"{error.filename or shards.shown}: cannot be read: {error.strerror or error}") from None

    def describe(self) -> SourceDescription:
        return self._description

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, index: int) -> str:
        """`<shard>/<file without ending>`."""
        return f"{self._shard_names[self._ranges.file_numbers[index]]}/{self._names[index]}"

    def __getitem__(self, index: int) -> Sample:
        return Sample(self._ranges.read(index), int(self.labels[index]), self.key(index))

    def ends(self, indices: Sequence[int], max_head_bytes: int = HEAD_BYTES) -> Ends:
        return self._ranges.ends(indices, max_head_bytes)

    def read_into(self, indices: Sequence[int], into: memoryview) -> None:
        self._ranges.read_into(indices, into)


class _NotUnderstood(ValueError):
    """What is wrong with a sample, to follow its name: `.cls: holds no text`, `: has 2 images`."""


def list_shard(shard: RecordedFile, columns: Columns) -> ListedShard:
    where = shard.place.shown
    samples: list[ShardSample] = []
    keys: set[str] = set()
    num_left_out = 0
    left_out: list[str] = []
    splits: set[str] = set()
    with closing(shard.place.reader(shard.status)) as reader:
        members = walk_tar(reader.read_at, 0, shard.status.num_bytes, where)
        for key, group in groupby(_with_endings(members), key=itemgetter(0)):
            files: dict[str, Member] = {}
            for _, ending, member in group:
                if ending in files:
                    raise UserError(f"{where}: {shown(member.name)} is there twice; remove the one that is not meant")
                files[ending] = member
            if key in keys:
                raise UserError(
                    f"{where}: the files of the sample {shown(key)} are there twice, or not side by side; write the "
                    "shard with `tar --sort=name`"
                )
            keys.add(key)
            try:
                image = _image(files, columns)
                if image is None:
                    num_left_out += len(files)
                    left_out += [shown(member.name) for member in files.values()][: MAX_NAMED - len(left_out)]
                else:
                    label = _label(files, columns.label, reader, splits)
                    samples.append(ShardSample(key, image.offset, image.num_bytes, label))
            except _NotUnderstood as error:
                raise UserError(f"{where}: {shown(key)}{error}") from None
    return ListedShard(samples, num_left_out, left_out, frozenset(splits))


def _with_endings(members: Iterator[Member]) -> Iterator[tuple[str, str, Member]]:
    """(key, ending, member): the key ends at the first dot of the file's name. A hidden file is on its own, and those
    that macOS puts beside each file are passed over."""
    for member in members:
        folder, slash, name = member.name.rpartition("/")
        stem, _, ending = name.partition(".")
        if stem:
            yield f"{folder}{slash}{stem}", ending.lower(), member
        elif not name.startswith(("._", ".DS_Store")):
            yield member.name, "", member


def _image(files: Mapping[str, Member], columns: Columns) -> Member | None:
    """None: these files are no sample. _NotUnderstood when they are one whose image is not clear."""
    if columns.image is not None and columns.image in files:
        return files[columns.image]
    images = [ending for ending in files if ending.rpartition(".")[2] in IMAGE_ENDINGS]
    if columns.image is None and len(images) == 1 and "." not in images[0]:
        return files[images[0]]
    plain = [ending for ending in images if "." not in ending]
    if columns.image is not None:
        if images or LABEL_ENDING in files:
            raise _NotUnderstood(f": has no .{shown(columns.image)} (--image-column), only .{_listed(files)}")
        return None
    if len(plain) > 1:
        raise _NotUnderstood(
            f": has {len(plain)} images, .{_listed(plain)}; say with --image-column which ending is meant"
        )
    if images:
        odd = next(ending for ending in images if "." in ending)
        raise _NotUnderstood(
            f".{shown(odd)}: a sample's name ends at its first dot, so this file is not the image of a sample "
            "of its own; use no other dots in names, or say with --image-column which ending is the image, such as "
            f"{shown(plain[0] if plain else odd)}"
        )
    if LABEL_ENDING in files or (TABLE_ENDING in files and len(files) > 1):
        raise _NotUnderstood(
            f": has a label but no image that can be read, only .{_listed(files)}; convert it to JPEG or PNG, "
            "or say with --image-column which ending is the image"
        )
    return None


def _label(files: Mapping[str, Member], column: str | None, reader: Reader, splits: set[str]) -> Label:
    """What the `.json` says of the split is added to `splits`. _NotUnderstood when the sample has no label, something
    else for one, or two that differ."""
    if column is not None:
        ending = column.removeprefix(".").lower()
        if ending in files and ending != TABLE_ENDING:
            return _text_label(files[ending], reader, ending)
        if TABLE_ENDING in files:
            return _table_label(files[TABLE_ENDING], column, reader, splits)
        raise _NotUnderstood(f": has no .{shown(ending)} (--label-column) and no .json, so no label")
    if LABEL_ENDING not in files:
        if TABLE_ENDING not in files:
            raise _NotUnderstood(
                ": has neither .cls nor .json next to it, so no label; files of a sample lie side by side; "
                "--label-column says which other ending holds it"
            )
        return _table_label(files[TABLE_ENDING], TABLE_KEY, reader, splits)
    label = _text_label(files[LABEL_ENDING], reader, LABEL_ENDING)
    if TABLE_ENDING in files and files[TABLE_ENDING].num_bytes <= MAX_LABEL_BYTES:
        table = _read_small(files[TABLE_ENDING], reader)
        splits |= _splits_in(table)
        _compare(label, table)
    return label


def _compare(label: Label, table: bytes) -> None:
    """_NotUnderstood when a sample's `.json` has another label, of the same kind, than its `.cls`."""
    number = NUMBER_IN_TABLE.search(table)
    if number is not None and number[1] == str(label).encode() and table.count(b'"label"') == 1:
        return
    try:
        other = exact_label(_parse(table).get(TABLE_KEY))
    except (RecursionError, ValueError):  # it says something else
        return
    if type(other) is type(label) and other != label:
        raise _NotUnderstood(
            f": .cls says {shown(label)}, and {TABLE_KEY} in .json {shown(other)}; say which is meant with "
            "--label-column cls or label"
        )


def _text_label(member: Member, reader: Reader, ending: str) -> Label:
    try:
        data = _read_small(member, reader).strip()
        if data.isdigit():
            return digits_label(data.decode("ascii"))
        return text_label(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise _NotUnderstood(f".{shown(ending)}: holds no text; expected the number or the name of a class") from None
    except ValueError as error:
        raise _NotUnderstood(f".{shown(ending)}: {error}") from None


def _table_label(member: Member, column: str, reader: Reader, splits: set[str]) -> Label:
    try:
        text = _read_small(member, reader)
        splits |= _splits_in(text)
        table = _parse(text)
        if column not in table:
            raise ValueError(f"has no label under the key {shown(column)}; say with --label-column which key is meant")
        return exact_label(table[column])
    except RecursionError:
        raise _NotUnderstood(f".{TABLE_ENDING}: holds JSON nested too deeply") from None
    except ValueError as error:
        raise _NotUnderstood(f".{TABLE_ENDING}: {error}") from None


def _splits_in(table: bytes) -> set[str]:
    return {text.decode("utf-8", "replace") for text in SPLIT_IN_TABLE.findall(table)} if b'"split"' in table else set()


def _parse(text: bytes) -> dict[str, Any]:
    """ValueError, with the reason, when it is no JSON object with each key once."""
    try:
        table = json.loads(text, object_pairs_hook=_each_key_once)
    except json.JSONDecodeError as error:
        raise ValueError(f"holds no JSON: {error}") from None
    except UnicodeDecodeError:
        raise ValueError("holds no JSON, which is UTF-8") from None
    if not isinstance(table, dict):
        raise ValueError("holds no JSON object with the label under a key")
    return table


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("has a key twice")
    return table


def _read_small(member: Member, reader: Reader) -> bytes:
    if member.num_bytes > MAX_LABEL_BYTES:
        raise ValueError(f"has {member.num_bytes:,} bytes, expected a label")
    return reader.read_at(member.offset, member.num_bytes)


def _ending(option: str | None) -> str | None:
    return None if option is None else option.removeprefix(".").lower()


def _listed(endings: Iterable[str]) -> str:
    return shown(", .".join(endings))
