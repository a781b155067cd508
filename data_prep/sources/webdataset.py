"""WebDataset shards: tars in which files of one name with several extensions are a sample (`a.jpg`, `a.cls`, `a.json`).

By the format's convention a name ends at its first dot, and the files of a sample are adjacent. The image is the file
with an image's extension; the label is the number or text in `.cls`, else `label` in the `.json`. `--image-column` and
`--label-column` name other extensions, or another key of the `.json`. `--input` is a folder of tars, one tar, a glob,
or a pattern with braces (`train-{0000..1023}.tar`), local or a URL. The format has no class names: `--labels` may name
a file with one per line.

Every file is part of a sample, or counted as left out; a sample that is not understood is refused.
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

from data_prep.errors import UserError
from data_prep.shown import shown
from data_prep.sources.base import NO_OPTIONS, SourceOptions
from data_prep.sources.file_source import MAX_NAMED, SUFFIXES, ArchiveSource, FileListing, skipped_notes
from data_prep.sources.files.listing import FileRanges, RecordedFile, list_each
from data_prep.sources.files.paths import RangeReader
from data_prep.sources.files.tar import TarEntry, walk_tar
from data_prep.sources.label_file import class_names_in
from data_prep.sources.labels import (
    Label,
    digits_label,
    exact_label,
    labels_without_samples,
    number_classes,
    text_label,
)
from data_prep.sources.shards import ShardsOfSplit, refuse_splits_within, shards_of_split
from data_prep.sources.splits import SplitRequest

IMAGE_EXTENSIONS = frozenset(suffix.removeprefix(".") for suffix in SUFFIXES)
LABEL_EXTENSION, TABLE_EXTENSION, TABLE_KEY = "cls", "json", "label"
MAX_LABEL_BYTES = 1 << 20
NUMBER_IN_TABLE = re.compile(rb'"label"\s*:\s*([0-9]+)')
"""If it has the same number as the `.cls`, as it nearly always does, the `.json` need not be parsed."""
SPLIT_IN_TABLE = re.compile(rb'"split"\s*:\s*"([^"\\]{1,40})"')


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
    splits: set[str]
    """The values of `split` in the `.json` files."""

    def __len__(self) -> int:
        return len(self.samples)


class WebDataset(ArchiveSource):
    """Samples in the order of the shards' names and of the files within."""

    @classmethod
    def open(cls, location: str, split: SplitRequest, options: SourceOptions = NO_OPTIONS) -> Self:
        shards = shards_of_split(location, ".tar", "tars", split)
        class_names = class_names_in(options.labels)
        image_extension = None if options.image_column is None else _extension(options.image_column)
        listed = list(list_each(lambda file: list_shard(file, image_extension, options.label_column), shards.files))
        _require_samples(listed, shards.names, shards.location)
        keys = {sample.key.rpartition("/")[0] for shard in listed for sample in shard.samples}
        folders = {folder for parent in keys for folder in parent.split("/")}
        refuse_splits_within(sorted(folders), "the folders", split, shards.location)
        splits = sorted({value for shard in listed for value in shard.splits})
        refuse_splits_within(splits, "the key split in .json", split, shards.location)
        return cls(shards, listed, class_names, options.class_order)

    def __init__(
        self,
        shards: ShardsOfSplit,
        listed: Sequence[ListedShard],
        class_names: tuple[str, ...] | None,
        class_order: str | None,
    ) -> None:
        location, split, files, shard_names, notes = shards
        samples = [sample for shard in listed for sample in shard.samples]
        found: dict[Label, str] = {}
        for shard, shard_name in zip(listed, shard_names, strict=True):
            for sample in shard.samples:
                if sample.label not in found:
                    found[sample.label] = f"{shard_name}/{shown(sample.key)}"
        class_names, label_of = number_classes(found, class_names, class_order, location)
        labels = np.array([label_of[sample.label] for sample in samples], dtype=np.int64)
        sizes = np.array([sample.num_bytes for sample in samples], dtype=np.int64)
        numbers = np.repeat(np.arange(len(files), dtype=np.int32), [len(shard) for shard in listed])
        offsets = np.array([sample.offset for sample in samples], dtype=np.int64)
        super().__init__(
            "webdataset",
            location,
            split,
            FileListing(class_names, [sample.key for sample in samples], labels, sizes),
            FileRanges(files, numbers, offsets, sizes),
            sum(shard.num_left_out for shard in listed),
            [f"{shard}/{name}" for shard, its in zip(shard_names, listed, strict=True) for name in its.left_out],
        )
        self._shard_names = tuple(shard_names)
        without = labels_without_samples(labels, class_names)
        self.notes = (*notes, *without, *skipped_notes(self.description))

    def key(self, index: int) -> str:
        """`<shard>/<file without extension>`."""
        return f"{self._shard_names[self._ranges.file_numbers[index]]}/{self._names[index]}"


def _require_samples(listed: Sequence[ListedShard], names: Sequence[str], where: str) -> None:
    for shard, name in zip(listed, names, strict=True):
        if not shard.samples and not shard.num_left_out:
            raise UserError(
                f"{where}: {name} holds no files: an empty archive, or a download that was not finished; remove it or "
                "download it again"
            )
    if not any(listed):
        raise UserError(f"{where}: holds no samples")


class _NotUnderstood(ValueError):
    """What is wrong with a sample; the message continues its name: `.cls: is not text`, `: has 2 images`."""


def list_shard(shard: RecordedFile, image_extension: str | None, label_column: str | None) -> ListedShard:
    """`image_extension`, `label_column`: as the user named them."""
    where = shard.path.shown
    samples: list[ShardSample] = []
    keys: set[str] = set()
    num_left_out = 0
    left_out: list[str] = []
    splits: set[str] = set()
    with closing(shard.path.reader(shard.status)) as reader:
        members = walk_tar(reader.read_at, 0, shard.status.num_bytes, where)
        for key, group in groupby(_with_extensions(members), key=itemgetter(0)):
            files: dict[str, TarEntry] = {}
            for _, extension, member in group:
                if extension in files:
                    raise UserError(f"{where}: {shown(member.name)} occurs twice; remove the wrong one")
                files[extension] = member
            if key in keys:
                raise UserError(
                    f"{where}: the files of the sample {shown(key)} occur twice, or are not adjacent; write the shard "
                    "with `tar --sort=name`"
                )
            keys.add(key)
            try:
                image = _image(files, image_extension)
                if image is None:
                    num_left_out += len(files)
                    left_out += [shown(member.name) for member in files.values()][: MAX_NAMED - len(left_out)]
                else:
                    label = _label(files, label_column, reader, splits)
                    samples.append(ShardSample(key, image.offset, image.num_bytes, label))
            except _NotUnderstood as error:
                raise UserError(f"{where}: {shown(key)}{error}") from None
    return ListedShard(samples, num_left_out, left_out, splits)


def _with_extensions(members: Iterator[TarEntry]) -> Iterator[tuple[str, str, TarEntry]]:
    """(key, extension, member): the key ends at the first dot of the file's name. Hidden files are on their own, and
    those that macOS puts beside each file are skipped."""
    for member in members:
        folder, slash, name = member.name.rpartition("/")
        stem, _, extension = name.partition(".")
        if stem:
            yield f"{folder}{slash}{stem}", extension.lower(), member
        elif not name.startswith(("._", ".DS_Store")):
            yield member.name, "", member


def _image(files: Mapping[str, TarEntry], asked: str | None) -> TarEntry | None:
    """None: these files are not a sample. _NotUnderstood when they are one whose image is ambiguous."""
    images = [extension for extension in files if extension.rpartition(".")[2] in IMAGE_EXTENSIONS]
    if asked is not None:
        if asked not in files and (images or LABEL_EXTENSION in files):
            raise _NotUnderstood(f": has no .{shown(asked)} (--image-column), only .{_listed(files)}")
        return files.get(asked)
    plain = [extension for extension in images if "." not in extension]
    if len(plain) > 1:
        raise _NotUnderstood(f": has {len(plain)} images, .{_listed(plain)}; say which with --image-column EXTENSION")
    odd = next((extension for extension in images if "." in extension), None)
    if odd is not None:
        raise _NotUnderstood(
            f".{shown(odd)}: a sample's name ends at its first dot, so this file is not the image of a sample "
            "of its own; use no other dots in names, or say with --image-column which extension is the image, such as "
            f"{shown(plain[0] if plain else odd)}"
        )
    if not images and (LABEL_EXTENSION in files or (TABLE_EXTENSION in files and len(files) > 1)):
        raise _NotUnderstood(
            f": has a label but no image that can be read, only .{_listed(files)}; convert it to JPEG or PNG, "
            "or say with --image-column which extension is the image"
        )
    return files[plain[0]] if plain else None


def _label(files: Mapping[str, TarEntry], column: str | None, reader: RangeReader, splits: set[str]) -> Label:
    """Adds the split that the `.json` names to `splits`. _NotUnderstood when the sample has no label, something that is
    not a label, or two that differ."""
    table = files.get(TABLE_EXTENSION)
    if column is not None:
        extension = _extension(column)
        if extension in files and extension != TABLE_EXTENSION:
            return _text_label(files[extension], reader, extension)
        if table is None:
            raise _NotUnderstood(f": has no .{shown(extension)} (--label-column) and no .json, so no label")
        return _table_label(table, column, reader, splits)
    if LABEL_EXTENSION in files:
        label = _text_label(files[LABEL_EXTENSION], reader, LABEL_EXTENSION)
        if table is not None and table.num_bytes <= MAX_LABEL_BYTES:
            text = _read_small(table, reader)
            splits |= _splits_in(text)
            _compare(label, text)
        return label
    if table is None:
        raise _NotUnderstood(
            ": has neither .cls nor .json next to it, so no label; files of a sample are adjacent; --label-column says "
            "which other extension has it"
        )
    return _table_label(table, TABLE_KEY, reader, splits)


def _compare(label: Label, table: bytes) -> None:
    """_NotUnderstood when a sample's `.json` has another label, of the same kind, than its `.cls`."""
    number = NUMBER_IN_TABLE.search(table)
    if number is not None and number[1] == str(label).encode() and table.count(b'"label"') == 1:
        return
    try:
        other = exact_label(_parse(table).get(TABLE_KEY))
    except (RecursionError, ValueError):  # the key is used for something else there
        return
    if type(other) is type(label) and other != label:
        raise _NotUnderstood(
            f": .cls says {shown(label)}, and {TABLE_KEY} in .json {shown(other)}; say which is meant with "
            "--label-column cls or label"
        )


def _text_label(member: TarEntry, reader: RangeReader, extension: str) -> Label:
    try:
        data = _read_small(member, reader).strip()
        if data.isdigit():
            return digits_label(data.decode("ascii"))
        return text_label(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise _NotUnderstood(f".{shown(extension)}: is not text; expected the number or the name of a class") from None
    except ValueError as error:
        raise _NotUnderstood(f".{shown(extension)}: {error}") from None


def _table_label(member: TarEntry, column: str, reader: RangeReader, splits: set[str]) -> Label:
    try:
        text = _read_small(member, reader)
        splits |= _splits_in(text)
        table = _parse(text)
        if column not in table:
            raise ValueError(f"has no label under the key {shown(column)}; say with --label-column which key is meant")
        return exact_label(table[column])
    except RecursionError:
        raise _NotUnderstood(f".{TABLE_EXTENSION}: holds JSON nested too deeply") from None
    except ValueError as error:
        raise _NotUnderstood(f".{TABLE_EXTENSION}: {error}") from None


def _splits_in(table: bytes) -> set[str]:
    return {text.decode("utf-8", "replace") for text in SPLIT_IN_TABLE.findall(table)} if b'"split"' in table else set()


def _parse(text: bytes) -> dict[str, Any]:
    """ValueError, with the reason, when it is not a JSON object with each key once."""
    try:
        table = json.loads(text, object_pairs_hook=_each_key_once)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error}") from None
    except UnicodeDecodeError:
        raise ValueError("is not JSON, which is UTF-8") from None
    if not isinstance(table, dict):
        raise ValueError("is not a JSON object with the label under a key")
    return table


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("has a key twice")
    return table


def _read_small(member: TarEntry, reader: RangeReader) -> bytes:
    if member.num_bytes > MAX_LABEL_BYTES:
        raise ValueError(f"has {member.num_bytes:,} bytes, expected a label")
    return reader.read_at(member.offset, member.num_bytes)


def _extension(option: str) -> str:
    return option.removeprefix(".").lower()


def _listed(extensions: Iterable[str]) -> str:
    return shown(", .".join(extensions))
