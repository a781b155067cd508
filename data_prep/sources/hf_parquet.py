"""Parquet files as the Hugging Face Hub lays them out, read directly.

Columns: `image` (or `img`), a struct of `bytes` and `path`; `label` (or `fine_label`), a ClassLabel whose names stand
in the schema's metadata under `huggingface`. Files are named `<split>-00000-of-00002.parquet`, or lie in `<split>/`.
`--input` is a folder, one file, or a glob, local or a URL. Where paths end with a wnid, as imagenet-1k's do, labels are
held against it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.sources.base import Sample, SourceDescription, digest_of
from data_prep.sources.find_places import GLOB, find_places, place_of
from data_prep.sources.imagenet import check_labels
from data_prep.sources.places import IS_URL, Place, changed, without_credentials
from data_prep.sources.ranges import record
from data_prep.sources.row_group import LARGE_GROUP_BYTES, RowGroup, column_bytes, open_parquet
from data_prep.sources.splits import SPLIT_WORDS, SplitRequest, choose_split

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "fine_label")
WNID_IN_PATH = r"_(?P<wnid>n\d{8})\.\w+$"
SHARD_NAME = re.compile(r"(?P<split>.+?)-(?P<number>\d+)-of-(?P<count>\d+)")


class HfParquet:
    """Rows in the order of the sorted file names. Keeps its place in the row group read last: reading in order reads
    once."""

    def __init__(self, location: str, split: str, files: Sequence[Place]) -> None:
        self._location = location
        self._split = split
        self._files = tuple(record(file) for file in files)
        self._names = tuple(file.name for file in files)
        group_rows: list[int] = []
        group_files: list[int] = []
        group_numbers: list[int] = []
        group_bytes: list[int] = []
        labels: list[NDArray[np.int64]] = []
        paths: list[Any] = []
        schema: Any = None
        for number, file in enumerate(files):
            with open_parquet(file) as table:
                if schema is None:
                    schema = table.schema_arrow
                    self._image_column = _find_column(schema, IMAGE_COLUMNS, file.shown)
                    self._label_column = _find_column(schema, LABEL_COLUMNS, file.shown)
                    self.class_names = _class_names(schema, self._label_column, file.shown)
                if table.schema_arrow.names != schema.names:
                    raise UserError(f"{file.shown}: has other columns than {self._names[0]}; name one kind with a glob")
                for group in range(table.num_row_groups):
                    group_rows.append(table.metadata.row_group(group).num_rows)
                    group_files.append(number)
                    group_numbers.append(group)
                    group_bytes.append(column_bytes(table.metadata.row_group(group), f"{self._image_column}.bytes"))
                labels.append(_read_labels(table, self._label_column, file.shown))
                paths.append(_read_paths(table, self._image_column))
        self._group_ends = np.cumsum(group_rows, dtype=np.int64)
        self._group_files = np.array(group_files, dtype=np.int64)
        self._group_numbers = np.array(group_numbers, dtype=np.int64)
        self._group_bytes = np.array(group_bytes, dtype=np.int64)
        self.labels = np.concatenate(labels)
        self.sizes: NDArray[np.int64] | None = None
        self._check_labels()
        self._wnids = wnids_in_paths(paths, self.labels, location)
        self._label_checks = check_labels(self._wnids, self.labels, _names_of_val(paths), location)
        self._checked: set[int] = set()
        self._reading: tuple[int, RowGroup] | None = None

    @classmethod
    def open(cls, location: str | None, split: SplitRequest) -> Self:
        if location is None:
            raise UserError("--source hf-parquet needs --input: a folder of parquet files, one file, or a glob")
        try:
            where, is_folder, files = _find_files(location)
            by_split = group_by_split(files)
            if set(by_split) == {"all"} and not split.explicit:
                return cls(where, "all", by_split["all"])
            name = choose_split(sorted(by_split), split, where)
            if is_folder:
                _check_complete([file.name for file in by_split[name]], where)
            return cls(where, name, by_split[name])
        except OSError as error:
            where = without_credentials(location)
            raise UserError(f"{error.filename or where}: cannot be read: {error.strerror or error}") from None

    def describe(self) -> SourceDescription:
        sizes = [str(file.status.num_bytes) for file in self._files]
        identity = digest_of([*self._names, *sizes, self.labels.tobytes(), *self.class_names])
        state = digest_of([identity, *(file.status.stamp for file in self._files)])
        return SourceDescription(
            "hf-parquet",
            self._location,
            self._split,
            identity,
            state,
            label_map=self._wnids,
            label_checks=self._label_checks,
        )

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, index: int) -> str:
        group, _ = self._locate(index)
        file = int(self._group_files[group])
        first_group = int(np.searchsorted(self._group_files, file))
        first = int(self._group_ends[first_group - 1]) if first_group else 0
        return f"{self._names[file]} row {index - first}"

    def __getitem__(self, index: int) -> Sample:
        group, row = self._locate(index)
        data = self._read_row(group, row)
        if data is None:
            raise ValueError("the parquet file holds no bytes for it, only a path")
        return Sample(data, int(self.labels[index]), self.key(index))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_checked": set(), "_reading": None}

    def _locate(self, index: int) -> tuple[int, int]:
        """Row group, and row within it."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        group = int(np.searchsorted(self._group_ends, index, side="right"))
        return group, index - (int(self._group_ends[group - 1]) if group else 0)

    def _read_row(self, group: int, row: int) -> bytes | None:
        reading, self._reading = self._reading, None  # kept only while all goes well
        if reading is None or reading[0] != group or row < reading[1].first:
            if reading is not None:
                reading[1].close()
            number = int(self._group_files[group])
            self._check_unchanged(number)
            is_large = self._group_bytes[group] > LARGE_GROUP_BYTES
            place = self._files[number].place
            reading = group, RowGroup(place, int(self._group_numbers[group]), self._image_column, is_large)
        data = reading[1].image_bytes(row)
        self._reading = reading
        return data

    def _check_unchanged(self, number: int) -> None:
        place, status = self._files[number]
        if number not in self._checked and place.status() != status:
            raise changed(place.shown)
        self._checked.add(number)

    def _check_labels(self) -> None:
        if len(self.labels) and (self.labels.min() < 0 or self.labels.max() >= len(self.class_names)):
            hint = "; hidden test labels are -1: choose another --split" if self.labels.min() < 0 else ""
            raise UserError(
                f"{self._location}: split {self._split} has labels {self.labels.min()}..{self.labels.max()}, "
                f"expected 0..{len(self.class_names) - 1}{hint}"
            )


def group_by_split(files: Sequence[Place]) -> dict[str, list[Place]]:
    """Files by the split in their name, else by the name of their folder if that is a split, else under `all`."""
    groups: dict[str, list[Place]] = {}
    for file in files:
        stem = PurePosixPath(file.name).stem
        shard = SHARD_NAME.fullmatch(stem)
        name = shard["split"] if shard else next((n for n in (stem, file.parent().name) if n in SPLIT_WORDS), "all")
        groups.setdefault(name, []).append(file)
    return groups


def wnids_in_paths(paths: Sequence[Any], labels: NDArray[np.int64], where: str) -> dict[str, int]:
    """wnid -> label when every path ends with a wnid (`n01440764_10026_n01440764.JPEG`), else empty.

    UserError when a wnid has two labels, or a label two wnids.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if not paths or any(column is None for column in paths):
        return {}
    column = pa.chunked_array(paths)
    wnids = pc.struct_field(pc.extract_regex(column, WNID_IN_PATH), "wnid")
    if wnids.null_count or not len(wnids):
        return {}
    numbers = pc.cast(pc.utf8_slice_codeunits(wnids, 1), pa.int64()).to_numpy()
    pairs = np.unique(np.stack([labels, numbers]), axis=1).T
    for column_number, what in enumerate(("label", "wnid")):
        values, counts = np.unique(pairs[:, column_number], return_counts=True)
        if (counts > 1).any():
            value = int(values[counts > 1][0])
            raise UserError(f"{where}: the paths' wnids contradict the labels: {what} {value} goes with several")
    return {f"n{number:08d}": int(label) for label, number in pairs}


def _names_of_val(paths: Sequence[Any]) -> Iterator[str]:
    for column in paths:
        if column is not None:
            yield from (str(path) for path in column.to_pylist())


def _check_complete(names: Sequence[str], where: str) -> None:
    """UserError when the names say that there are more files, which were not downloaded."""
    shards = [match for name in names if (match := SHARD_NAME.fullmatch(PurePosixPath(name).stem))]
    for count in {int(shard["count"]) for shard in shards}:
        found = {int(shard["number"]) for shard in shards if int(shard["count"]) == count}
        missing = sorted(set(range(count)) - found)
        if missing:
            raise UserError(
                f"{where}: {len(missing)} of {count} parquet files are missing, the first is number {missing[0]}; "
                "download them, or name those you want with a glob"
            )


def _find_files(location: str) -> tuple[str, bool, list[Place]]:
    """What to show of the location, whether it is a folder, and the parquet files in order."""
    places = find_places(location)
    is_pattern = len(places) != 1 or GLOB.search(location) is not None
    shown = places[0].shown if not is_pattern else location if IS_URL.match(location) else place_of(location).shown
    shown = without_credentials(shown)
    kinds = [place.kind() for place in places]
    is_folder = kinds == ["folder"]
    if is_folder:
        names = sorted(file.name for file in places[0].files() if file.name.endswith(".parquet"))
        places = [places[0].child(name) for name in names]
    if not places or None in kinds:
        raise UserError(f"--input {shown}: no parquet files there; expected a folder, a file or a glob")
    return shown, is_folder, places


def _read_labels(table: Any, column: str, where: str) -> NDArray[np.int64]:
    labels = table.read(columns=[column]).column(column)
    if labels.null_count:
        raise UserError(f"{where}: {labels.null_count} rows have no {column}")
    return labels.to_numpy().astype(np.int64)


def _read_paths(table: Any, column: str) -> Any:
    """None where there is no column of paths."""
    if f"{column}.path" not in [table.schema.column(i).path for i in range(len(table.schema))]:
        return None
    read = table.read(columns=[f"{column}.path"]).column(column).combine_chunks()
    return read.field("path")


def _find_column(schema: Any, candidates: Sequence[str], where: str) -> str:
    for name in candidates:
        if name in schema.names:
            return name
    raise UserError(f"{where}: has the columns {', '.join(schema.names)}, expected one named {' or '.join(candidates)}")


def _class_names(schema: Any, label_column: str, where: str) -> tuple[str, ...]:
    """From the schema's metadata, as the `datasets` library writes it."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        names = features[label_column]["names"]
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{where}: the schema's metadata (key huggingface) does not say the class names of {label_column}"
        ) from None
    return tuple(str(name) for name in names)
