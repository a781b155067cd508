"""Parquet files as the Hugging Face Hub lays them out, read directly.

Columns: `image` (or `img`), a struct of `bytes` and `path`; `label` (or `fine_label`), a ClassLabel whose names stand
in the schema's metadata under `huggingface`. Files are named `<split>-00000-of-00002.parquet`, or lie in `<split>/`.
`--input` is a folder, one file, or a glob.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.sources.base import Sample, SourceDescription, digest_of
from data_prep.sources.splits import ALIASES, SplitRequest, choose_split

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "fine_label")
SHARD_NAME = re.compile(r"(?P<split>.+?)-(?P<number>\d+)-of-(?P<count>\d+)")


class HfParquet:
    """Rows in the order of the sorted file names. Keeps the row group read last, so reading in order reads once."""

    def __init__(self, location: str, split: str, files: Sequence[Path]) -> None:
        self._location = location
        self._split = split
        self._files = tuple(files)
        tables = [_open(file) for file in self._files]
        self._image_column = _find_column(tables[0].schema_arrow, IMAGE_COLUMNS, self._files[0])
        self._label_column = _find_column(tables[0].schema_arrow, LABEL_COLUMNS, self._files[0])
        self.class_names = _class_names(tables[0].schema_arrow, self._label_column, self._files[0])
        group_rows: list[int] = []
        group_files: list[int] = []
        group_numbers: list[int] = []
        labels: list[NDArray[np.int64]] = []
        for number, (file, table) in enumerate(zip(self._files, tables, strict=True)):
            if table.schema_arrow.names != tables[0].schema_arrow.names:
                raise UserError(f"{file}: has other columns than {self._files[0].name}; name one kind with a glob")
            for group in range(table.num_row_groups):
                group_rows.append(table.metadata.row_group(group).num_rows)
                group_files.append(number)
                group_numbers.append(group)
            labels.append(_read_labels(file, self._label_column))
            table.close()
        self._group_ends = np.cumsum(group_rows, dtype=np.int64)
        self._group_files = np.array(group_files, dtype=np.int64)
        self._group_numbers = np.array(group_numbers, dtype=np.int64)
        self._labels = np.concatenate(labels)
        self._check_labels()
        self._cached: tuple[int, Any] | None = None

    @classmethod
    def open(cls, location: str | None, split: SplitRequest) -> Self:
        if location is None:
            raise UserError("--source hf-parquet needs --input: a folder of parquet files, one file, or a glob")
        by_split = group_by_split(_find_files(location))
        where = str(Path(location).expanduser().resolve())
        is_folder = Path(location).expanduser().is_dir()
        if set(by_split) == {"all"} and not split.explicit:
            return cls(where, "all", by_split["all"])
        name = choose_split(sorted(by_split), split, where)
        if is_folder:
            _check_complete(by_split[name], where)
        return cls(where, name, by_split[name])

    def describe(self) -> SourceDescription:
        status = [file.stat() for file in self._files]
        sizes = [str(s.st_size) for s in status]
        identity = digest_of([*(file.name for file in self._files), *sizes, self._labels.tobytes(), *self.class_names])
        state = digest_of([identity, *(s.st_mtime_ns for s in status)])
        return SourceDescription("hf-parquet", self._location, self._split, identity, state)

    def __len__(self) -> int:
        return len(self._labels)

    def key(self, index: int) -> str:
        group, _ = self._locate(index)
        file = int(self._group_files[group])
        first_group = int(np.searchsorted(self._group_files, file))
        first = int(self._group_ends[first_group - 1]) if first_group else 0
        return f"{self._files[file].name} row {index - first}"

    def __getitem__(self, index: int) -> Sample:
        group, row = self._locate(index)
        data = self._read_group(group)[row].as_py()
        if data is None:
            raise ValueError("the parquet file holds no bytes for it, only a path")
        return Sample(data, int(self._labels[index]), self.key(index))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None}

    def _locate(self, index: int) -> tuple[int, int]:
        """Row group, and row within it."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        group = int(np.searchsorted(self._group_ends, index, side="right"))
        return group, index - (int(self._group_ends[group - 1]) if group else 0)

    def _read_group(self, group: int) -> Any:
        if self._cached is None or self._cached[0] != group:
            file = self._files[int(self._group_files[group])]
            with _open(file) as table:
                column = table.read_row_group(int(self._group_numbers[group]), columns=[self._image_column])
            images = column.column(self._image_column).combine_chunks()
            self._cached = (group, images.field("bytes"))
        return self._cached[1]

    def _check_labels(self) -> None:
        if len(self._labels) and (self._labels.min() < 0 or self._labels.max() >= len(self.class_names)):
            hint = "; hidden test labels are -1: choose another --split" if self._labels.min() < 0 else ""
            raise UserError(
                f"{self._location}: split {self._split} has labels {self._labels.min()}..{self._labels.max()}, "
                f"expected 0..{len(self.class_names) - 1}{hint}"
            )


def group_by_split(files: Sequence[Path]) -> dict[str, list[Path]]:
    """Files by the split in their name, else by the name of their folder if that is a split, else under `all`."""
    groups: dict[str, list[Path]] = {}
    for file in sorted(files):
        shard = SHARD_NAME.fullmatch(file.stem)
        name = shard["split"] if shard else next((n for n in (file.stem, file.parent.name) if n in ALIASES), "all")
        groups.setdefault(name, []).append(file)
    return groups


def _check_complete(files: Sequence[Path], where: str) -> None:
    """UserError when the names say that there are more files, which were not downloaded."""
    shards = [match for file in files if (match := SHARD_NAME.fullmatch(file.stem))]
    for count in {int(shard["count"]) for shard in shards}:
        found = {int(shard["number"]) for shard in shards if int(shard["count"]) == count}
        missing = sorted(set(range(count)) - found)
        if missing:
            raise UserError(
                f"{where}: {len(missing)} of {count} parquet files are missing, the first is number {missing[0]}; "
                "download them, or name those you want with a glob"
            )


def _find_files(location: str) -> list[Path]:
    path = Path(location).expanduser()
    if path.is_file():
        found = [path]
    elif path.is_dir():
        found = list(path.rglob("*.parquet"))
    else:
        found = [Path(name) for name in glob.glob(str(path), recursive=True)]  # noqa: PTH207  # absolute patterns
    if not found:
        raise UserError(f"--input {location}: no parquet files there; expected a folder, a file or a glob")
    return sorted(file.resolve() for file in found)


def _open(file: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file, memory_map=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file}: cannot be read as parquet: {error}") from None


def _read_labels(file: Path, column: str) -> NDArray[np.int64]:
    with _open(file) as table:
        labels = table.read(columns=[column]).column(column)
    if labels.null_count:
        raise UserError(f"{file}: {labels.null_count} rows have no {column}")
    return labels.to_numpy().astype(np.int64)


def _find_column(schema: Any, candidates: Sequence[str], file: Path) -> str:
    for name in candidates:
        if name in schema.names:
            return name
    raise UserError(f"{file}: has the columns {', '.join(schema.names)}, expected one named {' or '.join(candidates)}")


def _class_names(schema: Any, label_column: str, file: Path) -> tuple[str, ...]:
    """From the schema's metadata, as the `datasets` library writes it."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        names = features[label_column]["names"]
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{file}: the schema's metadata (key huggingface) does not say the class names of {label_column}"
        ) from None
    return tuple(str(name) for name in names)
