"""Parquet files as the Hugging Face Hub lays them out, read directly.

Columns: `image` (or `img`), a struct of `bytes` and `path`, or the bytes themselves; `label` (or `labels`,
`fine_label`), a ClassLabel whose names are in the schema's metadata under `huggingface`, other whole numbers, or text.
Files are named `<split>-00000-of-00002.parquet`, or have the split elsewhere in their name or their folder's. `--input`
is a folder, one file, a glob or a pattern with braces, local or a URL. Where paths end with a wnid, as imagenet-1k's
do, labels are checked against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.shown import shown
from data_prep.sources.base import NO_OPTIONS, Source, SourceDescription, SourceOptions, digest_of
from data_prep.sources.files.listing import RecordedFile, locate
from data_prep.sources.files.paths import changed
from data_prep.sources.imagenet import NUM_VAL, check_labels
from data_prep.sources.label_file import class_names_in
from data_prep.sources.labels import Label, exact_label, labels_without_samples, number_classes
from data_prep.sources.parquet_file import (
    LARGE_GROUP_BYTES,
    Columns,
    RowGroup,
    compare_columns,
    compare_names,
    find_columns,
    leaf_numbers,
    names_of_classes,
    open_parquet,
    rows_at_once,
    telling_damage,
)
from data_prep.sources.shards import ShardsOfSplit, refuse_splits_within, shards_of_split
from data_prep.sources.splits import SplitRequest

WNID_IN_PATH = r"_(?P<wnid>n\d{8})\.\w+$"
SPLIT_COLUMN = "split"
MAX_SPLITS = 100
TABLE_ROWS = 1 << 16
"""Rows of labels and paths that are read at a time."""
FEW_ROWS = 100_000
"""A file may have as many rows whatever its size; more only if it has a byte for each."""
MAX_LABEL_BYTES, MAX_PATH_BYTES = 1100, 1000
"""Largest average of the labels and of the paths; larger ones are something else."""


class Groups(NamedTuple):
    """The row groups of a file."""

    num_rows: list[int]
    image_bytes: list[int]
    labels_at_once: int
    paths_at_once: int
    """0: they are too long to be worth reading."""


@dataclass(frozen=True)
class FileContents:
    """What is known of a file once it is opened."""

    shown: str
    names: list[str]
    """The names of all columns."""
    columns: Columns
    class_names: tuple[str, ...] | None
    groups: Groups
    values: list[Label]
    """The distinct labels."""
    first_rows: list[int]
    """For each distinct label the first row that has it."""
    codes: NDArray[np.int64]
    """[rows]; index into `values`."""
    wnids: NDArray[np.int64] | None
    """[rows]; the number of the wnid in the path, if every row has one."""
    splits: list[str]
    """The distinct values of the column `split`, if there is one."""
    paths: list[str]
    """Kept for files with few rows: the paths of the validation set tell which image is which."""


class HfParquet(Source):
    """Rows in the order of the sorted file names. Keeps the last row group open, so reading in order reads once."""

    @classmethod
    def open(cls, location: str, split: SplitRequest, options: SourceOptions = NO_OPTIONS) -> Self:
        shards = shards_of_split(location, ".parquet", "parquet files", split)
        class_names = class_names_in(options.labels)
        opened = [read_contents(file, class_names, options) for file in shards.files]
        _require_alike(opened, compares_names=class_names is None)
        splits = sorted({value for file in opened for value in file.splits})
        refuse_splits_within(splits, f"the column {SPLIT_COLUMN}", split, shards.location)
        return cls(shards, opened, class_names, options.class_order)

    def __init__(
        self,
        shards: ShardsOfSplit,
        opened: Sequence[FileContents],
        class_names: tuple[str, ...] | None,
        class_order: str | None,
    ) -> None:
        location, split, files, names, notes = shards
        self._files = tuple(files)
        self._names = tuple(names)
        self._columns = opened[0].columns
        group_rows = [count for file in opened for count in file.groups.num_rows]
        self._group_ends = np.cumsum(group_rows, dtype=np.int64)
        counts = [len(file.groups.num_rows) for file in opened]
        self._group_files = np.repeat(np.arange(len(opened), dtype=np.int64), counts)
        self._group_numbers = np.array([number for count in counts for number in range(count)], dtype=np.int64)
        self._group_bytes = np.array([size for file in opened for size in file.groups.image_bytes], dtype=np.int64)
        if not sum(group_rows):
            raise UserError(f"{location}: holds no samples: none of {len(files):,} files has a row")
        found: dict[Label, str] = {}
        for file, name in zip(opened, names, strict=True):
            for value, row in zip(file.values, file.first_rows, strict=True):
                found.setdefault(value, f"{name} row {row}")
        known = class_names if class_names is not None else opened[0].class_names
        self.class_names, label_of = number_classes(found, known, class_order, location)
        self.labels = np.concatenate(
            [np.array([label_of[value] for value in file.values], dtype=np.int64)[file.codes] for file in opened]
        )
        wnids: dict[str, int] = {}
        if all(file.wnids is not None for file in opened):
            numbers = np.concatenate([file.wnids for file in opened if file.wnids is not None])
            wnids = wnids_with_labels(numbers, self.labels, location)
        paths = [path for file in opened for path in file.paths]
        sizes = [str(file.status.num_bytes) for file in files]
        identity = digest_of([*names, *sizes, self.labels.tobytes(), *self.class_names])
        self.description = SourceDescription(
            "hf-parquet",
            location,
            split,
            identity,
            digest_of([identity, *(file.status.stamp for file in files)]),
            label_map=wnids,
            label_checks=check_labels(wnids, self.labels, paths if len(paths) == len(self.labels) else (), location),
        )
        self.notes = (*notes, *(labels_without_samples(self.labels, self.class_names) if known is None else []))
        self._checked: set[int] = set()
        self._reading: tuple[int, RowGroup] | None = None

    def key(self, index: int) -> str:
        group, _ = locate(self._group_ends, index)
        file = int(self._group_files[group])
        first_group = int(np.searchsorted(self._group_files, file))
        first = int(self._group_ends[first_group - 1]) if first_group else 0
        return f"{self._names[file]} row {index - first}"

    def read(self, index: int) -> bytes:
        data = self._read_row(*locate(self._group_ends, index))
        if data is None:
            raise ValueError("the parquet file has no bytes for it, only a path")
        return data

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_checked": set(), "_reading": None}

    def _read_row(self, group: int, row: int) -> bytes | None:
        reading, self._reading = self._reading, None  # after an error the row group is opened again
        if reading is None or reading[0] != group or row < reading[1].first:
            if reading is not None:
                reading[1].close()
            number = int(self._group_files[group])
            path, status = self._files[number]
            if number not in self._checked and path.status() != status:
                raise changed(path.shown)
            self._checked.add(number)
            is_large = bool(self._group_bytes[group] > LARGE_GROUP_BYTES)
            reading = group, RowGroup(path, int(self._group_numbers[group]), self._columns, is_large=is_large)
        data = reading[1].image_bytes(row)
        self._reading = reading
        return data


def _require_alike(opened: Sequence[FileContents], *, compares_names: bool) -> None:
    """UserError when a file has other columns, types or class names than the first; names that the user gave are
    compared with each file's own when it is opened."""
    first = opened[0]
    for other in opened[1:]:
        compare_columns(first.columns, other.columns, first.shown, other.shown)
        if compares_names:
            compare_names(first.class_names, other.class_names, first.shown, other.shown)
        if other.names != first.names:
            raise UserError(
                f"{other.shown}: has the columns {shown(', '.join(other.names))}, {first.shown} has "
                f"{shown(', '.join(first.names))}; name files of one kind with a glob"
            )


def read_contents(file: RecordedFile, given_names: tuple[str, ...] | None, options: SourceOptions) -> FileContents:
    """UserError when the file is not a parquet file of images and labels, or contradicts itself."""
    path, where = file.path, file.path.shown
    with open_parquet(path) as table, telling_damage(path):
        columns = find_columns(table.schema_arrow, options.image_column, options.label_column, where)
        class_names = _class_names(table.schema_arrow, columns.label, given_names, where)
        groups = _read_groups(table.metadata, columns, file.status.num_bytes, where)
        num_rows = sum(groups.num_rows)
        values, first_rows, codes = _read_labels(table, columns.label, groups.labels_at_once, where)
        if len(codes) != num_rows:
            raise UserError(f"{where}: has {num_rows:,} rows and {len(codes):,} labels; copy or download it again")
        wnids: NDArray[np.int64] | None = None
        paths: list[str] = []
        if columns.path_leaf is not None and groups.paths_at_once:
            wnids, paths = _read_paths(table, columns.path_leaf, groups.paths_at_once, num_rows)
        names = table.schema_arrow.names
        splits = _read_splits(table) if SPLIT_COLUMN not in (columns.label, columns.image) else []
    return FileContents(where, names, columns, class_names, groups, values, first_rows, codes, wnids, splits, paths)


def wnids_with_labels(numbers: NDArray[np.int64], labels: NDArray[np.int64], where: str) -> dict[str, int]:
    """wnid -> label. `numbers`: of the wnid (`n01440764_10026_n01440764.JPEG`) in each sample's path.

    UserError when a wnid has two labels, or a label has two wnids.
    """
    pairs = np.unique(np.stack([labels, numbers]), axis=1).T
    for column_number, what in enumerate(("label", "wnid")):
        values, counts = np.unique(pairs[:, column_number], return_counts=True)
        if (counts > 1).any():
            value = int(values[counts > 1][0])
            raise UserError(f"{where}: the paths' wnids contradict the labels: {what} {value} goes with several")
    return {f"n{number:08d}": int(label) for label, number in pairs}


def _read_groups(metadata: Any, columns: Columns, num_bytes: int, where: str) -> Groups:
    """UserError when the file contradicts itself, or claims more than it can have."""
    numbers = leaf_numbers(metadata)
    num_rows: list[int] = []
    image_bytes: list[int] = []
    labels_at_once = paths_at_once = TABLE_ROWS
    label_bytes = path_bytes = 0
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        image, label = (row_group.column(numbers[leaf]) for leaf in (columns.image_leaf, columns.label))
        if not 0 <= row_group.num_rows == image.num_values == label.num_values:
            raise UserError(
                f"{where}: row group {group} has {row_group.num_rows:,} rows, {image.num_values:,} images and "
                f"{label.num_values:,} labels; copy or download it again"
            )
        num_rows.append(row_group.num_rows)
        image_bytes.append(image.total_uncompressed_size)
        label_bytes += label.total_uncompressed_size
        if columns.has_text_labels:
            labels_at_once = min(labels_at_once, rows_at_once(label, TABLE_ROWS))
        if columns.path_leaf is not None:
            path = row_group.column(numbers[columns.path_leaf])
            path_bytes += path.total_uncompressed_size
            paths_at_once = min(paths_at_once, rows_at_once(path, TABLE_ROWS))
    total = sum(num_rows)
    if total != metadata.num_rows:
        raise UserError(
            f"{where}: claims {metadata.num_rows:,} rows, its row groups have {total:,}; copy or download it again"
        )
    if total > max(FEW_ROWS, num_bytes):  # an image has bytes; lists of as many labels would exhaust the memory
        raise UserError(
            f"{where}: claims {total:,} rows in {num_bytes:,} bytes, so no images; it is damaged or hostile"
        )
    if label_bytes > MAX_LABEL_BYTES * (total + 1000):
        raise UserError(
            f"{where}: the labels in {shown(columns.label)} take {label_bytes:,} bytes for {total:,} rows; expected "
            "numbers or the names of classes"
        )
    return Groups(num_rows, image_bytes, labels_at_once, paths_at_once if path_bytes <= MAX_PATH_BYTES * total else 0)


def _read_labels(
    table: Any, column: str, num_rows_at_once: int, where: str
) -> tuple[list[Label], list[int], NDArray[np.int64]]:
    """The distinct labels, the first row with each, and the index of every row's label among them."""
    import pyarrow as pa

    code_of: dict[Label, int] = {}
    first_rows: list[int] = []
    codes: list[NDArray[np.int64]] = []
    row = 0
    for batch in table.iter_batches(batch_size=num_rows_at_once, columns=[column], use_threads=False):
        cells = batch.column(0)
        if cells.null_count:
            missing = int(np.flatnonzero(cells.is_null().to_numpy(zero_copy_only=False))[0])
            raise UserError(f"{where}: row {row + missing} has no {shown(column)}")
        # Each distinct value becomes a Python object once, not once a row.
        encoded = cells if isinstance(cells, pa.DictionaryArray) else cells.dictionary_encode()
        found, first, inverse = np.unique(encoded.indices.to_numpy(), return_index=True, return_inverse=True)
        its_codes = np.empty(len(found), dtype=np.int64)
        for number, (index, at) in enumerate(zip(found.tolist(), first.tolist(), strict=True)):
            try:
                label = exact_label(encoded.dictionary[index].as_py())
            except ValueError as error:
                raise UserError(f"{where}: row {row + at}: {shown(column)}: {error}") from None
            if label not in code_of:
                code_of[label] = len(code_of)
                first_rows.append(row + at)
            its_codes[number] = code_of[label]
        codes.append(its_codes[inverse])
        row += len(cells)
    return list(code_of), first_rows, np.concatenate(codes) if codes else np.empty(0, dtype=np.int64)


def _read_paths(
    table: Any, leaf: str, num_rows_at_once: int, num_rows: int
) -> tuple[NDArray[np.int64] | None, list[str]]:
    """The wnids' numbers, None unless every path ends with one; the paths themselves if there are few rows."""
    import pyarrow as pa
    import pyarrow.compute as pc

    numbers: list[NDArray[np.int64]] = []
    paths: list[str] = []
    for batch in table.iter_batches(batch_size=num_rows_at_once, columns=[leaf], use_threads=False):
        cells = batch.column(0).field("path").cast(pa.large_string())
        wnids = pc.struct_field(pc.extract_regex(cells, WNID_IN_PATH), "wnid")
        if wnids.null_count:  # some paths without a wnid: nothing can be proved
            return None, []
        numbers.append(pc.cast(pc.utf8_slice_codeunits(wnids, 1), pa.int64()).to_numpy())
        paths += cells.to_pylist() if num_rows <= NUM_VAL else []
    return np.concatenate(numbers) if numbers else None, paths


def _read_splits(table: Any) -> list[str]:
    """The distinct texts in a column of splits; none if there is no such column, or it has too many to be splits."""
    import pyarrow as pa

    field = table.schema_arrow.field(SPLIT_COLUMN) if table.schema_arrow.names.count(SPLIT_COLUMN) == 1 else None
    if field is None or not (pa.types.is_string(field.type) or pa.types.is_large_string(field.type)):
        return []
    number = leaf_numbers(table.metadata)[SPLIT_COLUMN]
    chunks = (table.metadata.row_group(group).column(number) for group in range(table.num_row_groups))
    num_rows_at_once = min((rows_at_once(chunk, TABLE_ROWS) for chunk in chunks), default=1)
    found: set[str] = set()
    for batch in table.iter_batches(batch_size=num_rows_at_once, columns=[SPLIT_COLUMN], use_threads=False):
        found |= set(batch.column(0).unique().to_pylist()) - {None}
        if len(found) > MAX_SPLITS:  # it names something else
            return []
    return list(found)


def _class_names(schema: Any, label: str, given: tuple[str, ...] | None, where: str) -> tuple[str, ...] | None:
    """The file's own class names, None if it has none. UserError when they differ from those the user gave."""
    try:
        class_names = names_of_classes(schema, label, where)
    except UserError:
        if given is None:
            raise
        return None
    if class_names is not None and given is not None:
        compare_names(class_names, given, where, "--labels")
    return class_names
