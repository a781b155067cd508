"""Files of labels: a table with the class of every image, or a list of class names.

Each image has one class: columns of zeros and ones, several labels in a cell, and fractions are recognised and refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.shown import count_of, few, shown
from data_prep.sources.files.find import storage_path
from data_prep.sources.files.paths import StoragePath
from data_prep.sources.files.table import TableRow, read_lines, read_table
from data_prep.sources.imagenet import WNID, are_wnids
from data_prep.sources.labels import (
    GIVEN,
    LIST_CLASSES,
    MAX_CLASSES,
    MAX_NAME_CHARS,
    NOT_SUPPORTED,
    NUMBER,
    Label,
    number_classes,
    several_labels,
    text_label,
)
from data_prep.sources.splits import Split, is_split_name, splits_in

FILE_TITLES = frozenset((
    "image", "imageid", "image_id", "image_name", "image_path", "img", "img_id", "img_name", "img_path", "file",
    "fileid", "file_id", "filename", "file_name", "filepath", "file_path", "fname", "fn", "name", "path", "id", "key",
    "uri",
))  # fmt: skip
LABEL_TITLE = re.compile(
    r"(label|class|category|target|tag|species|breed|y|diagnosis)s?([ _-]?(id|name|idx|index|code|num|number|\d+))?"
)
SPLIT_TITLES = frozenset((
    "split", "set", "subset", "partition", "phase", "usage", "fold", "data_set", "dataset",
))  # fmt: skip
NUM_HEAD_ROWS = 1_000
"""Rows by which columns are recognised."""
FRACTION = re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+(?=e))(e[-+]?\d+)?", re.IGNORECASE)
HIDDEN = re.compile(r"-1(\.0*)?")
WHOLE = re.compile(r"(\d{1,18})\.0*")
"""A whole number as tables of floats write it: 3.0."""
FLAGS = frozenset((
    "0", "1", "0.0", "1.0", "true", "false", "yes", "no", "t", "f", "y", "n",
))  # fmt: skip
"""The cells of tables with one column per class."""


@dataclass(frozen=True)
class LabelTable:
    where: str
    classes: Mapping[str, str]
    """File, as the table names it -> its cell in the column of labels."""
    splits: Mapping[str, str]
    """File -> its cell in the column of splits; empty: there is no such column."""
    first_lines: Mapping[str, int]
    """Label -> the line where it first occurs."""
    notes: tuple[str, ...] = ()


class _ColumnNumbers(NamedTuple):
    """The columns, by number."""

    file: int
    label: int
    split: int | None
    has_titles: bool
    notes: list[str]


def read_label_file(
    path: StoragePath, file_column: str | None, label_column: str | None, files: Iterable[str]
) -> LabelTable:
    """Reads the class, and if there is such a column the split, of every file that a table names.

    Args:
        file_column, label_column: titles, or numbers from 1; None: to be found.
        files: names of the images that exist, to recognise the titles and the column of files.

    Raises:
        UserError: a column is missing or ambiguous, a row has no file or no label, or a file has two.
    """
    rows = read_table(path)
    head = list(islice(rows, NUM_HEAD_ROWS))
    if not head:
        raise UserError(f"{path.shown}: is empty; expected lines of <file>,<class>")
    found = _TableHead(head, _known_cells(head, files), path.shown).find(file_column, label_column)
    classes: dict[str, str] = {}
    splits: dict[str, str] = {}
    first_lines: dict[str, int] = {}
    num_repeated = 0
    for line, cells in chain(head[1:] if found.has_titles else head, rows):
        name, label, split = (_cell(cells, column) for column in found[:3])
        if not name or not label or (found.split is not None and not split):
            missing = "split" if name and label else "class" if name else "file"
            raise UserError(f"{path.shown}: line {line} should be <file>,<class>: it has no {missing}")
        name, label = _file_name(name), _without_box(label)
        if len(label) > MAX_NAME_CHARS:
            raise UserError(f"{path.shown}: line {line}: the class has {len(label):,} characters; expected its name")
        first_lines.setdefault(label, line)
        if len(first_lines) > MAX_CLASSES:
            raise UserError(f"{path.shown}: line {line}: more than {MAX_CLASSES:,} classes; is it the right column?")
        num_repeated += name in classes
        if classes.setdefault(name, label) != label:
            raise UserError(
                f"{path.shown}: {shown(name)} has two classes, {shown(classes[name])} and {shown(label)}; "
                f"{NOT_SUPPORTED}"
            )
        if found.split is not None and splits.setdefault(name, split) != split:
            raise UserError(f"{path.shown}: {shown(name)} is in two splits, {shown(splits[name])} and {shown(split)}")
    notes = [*found.notes, *([count_of(num_repeated, "duplicate line")] if num_repeated else [])]
    return LabelTable(path.shown, classes, splits, first_lines, tuple(f"{path.name}: {note}" for note in notes))


def read_split_file(path: StoragePath, names: Sequence[str]) -> list[Split]:
    """The split of each sample, from a table of files and splits, with or without titles and other columns.

    UserError unless every sample has one split and every line a sample.
    """
    rows = read_table(path)
    head = list(islice(rows, NUM_HEAD_ROWS))
    if not head:
        raise UserError(f"{path.shown}: is empty; expected lines of <file>,<split>")
    table = _TableHead(head, _known_cells(head, names), path.shown)
    file, split = table.find_split()
    splits: dict[str, Split] = {}
    for line, cells in chain(table.rows, rows):
        name, value = _file_name(_cell(cells, file)), _cell(cells, split)
        meant = splits_in(value) if is_split_name(value) else ()
        if not name or not meant:
            what = (
                f"{shown(value, 60)} is no split" if name and value else "it has no split" if name else "it has no file"
            )
            raise UserError(f"{path.shown}: line {line} should be <file>,<train, val or test>: {what}")
        wanted = next(iter(meant))
        if splits.setdefault(name, wanted) != wanted:
            raise UserError(f"{path.shown}: {shown(name)} is in two splits, {splits[name]} and {wanted}")
    keys = [next((key for key in _keys(name) if key in splits), None) for name in names]
    missing = [name for name, key in zip(names, keys, strict=True) if key is None]
    if missing:
        raise UserError(
            f"{path.shown}: names no split for {len(missing):,} of {len(names):,} images, first {shown(missing[0])}"
            f"{_nearly(missing[0], splits) or '; add lines for them'}"
        )
    used = [str(key) for key in keys]
    _require_all_found(used, splits, path.shown)
    return [splits[key] for key in used]


def label_files(
    names: Sequence[str],
    table: LabelTable,
    class_order: str | None,
    *,
    split: str | None,
    folders: Sequence[str],
) -> tuple[tuple[str, ...], NDArray[np.int64], list[int]]:
    """Class names by label, the label of each image in the split, and the indices in `names` of these images.

    The table may leave out file suffixes, and put one of `folders` before the names. The classes are those of all
    splits, so that labels mean the same in each. UserError unless every image has a class and every line of the split
    an image.
    """
    keys = [next((key for key in _keys(name, folders) if key in table.classes), None) for name in names]
    _require_all_labelled(names, keys, table)
    chosen = [number for number, key in enumerate(keys) if split is None or table.splits[str(key)] == split]
    wanted = table.classes.keys() if split is None else {key for key, its in table.splits.items() if its == split}
    _require_all_found([str(keys[number]) for number in chosen], wanted, table.where)
    class_names, label_of = _number_labels(table, class_order)
    labels = [label_of[table.classes[str(keys[number])]] for number in chosen]
    return class_names, np.array(labels, dtype=np.int64), chosen


INDEXED = re.compile(r"(.*\S)\s*\t\s*(\d{1,9})", re.ASCII)
"""A class and its label."""
INDEXED_WNID = re.compile(r"(n\d{8})\s+(\d{1,9})", re.ASCII)
INDEXED_BY_COMMA = re.compile(r".*\S\s*,\s*(\d{1,9})|(\d{1,9})\s*,\s*\S.*", re.ASCII)


def read_class_names(path: StoragePath) -> tuple[str, ...]:
    """Class names by label, from a file with one per line, in label order, or with its label after a tab.

    Of `<wnid> <words>`, as in LOC_synset_mapping.txt, the wnid is the name. UserError when a name is too long or occurs
    twice, or the labels are not 0, 1, 2, ..., each once.
    """
    lines = read_lines(path)
    names = [cells[0] for _, cells in lines]
    if not names:
        raise UserError(f"{path.shown}: is empty; expected one class name per line, in label order")
    if len(names) > MAX_CLASSES:
        raise UserError(f"{path.shown}: lists {len(names):,} classes; expected at most {MAX_CLASSES:,}")
    wnids = [name.split()[0] for name in names]
    indexed = [INDEXED.fullmatch(name) or INDEXED_WNID.fullmatch(name) for name in names]
    labels = None
    if all(indexed):
        names, labels = [match[1] for match in indexed if match], [int(match[2]) for match in indexed if match]
        wnids = [name.split()[0] for name in names]
    elif not are_wnids(wnids):
        _refuse_columns(path, lines)
    if are_wnids(wnids):
        names = wnids
    first: dict[str, int] = {}
    for (line, _), name in zip(lines, names, strict=True):
        if len(name) > MAX_NAME_CHARS:
            raise UserError(f"{path.shown}: line {line} has {len(name):,} characters; expected the name of a class")
        if first.setdefault(name, line) != line:
            raise UserError(
                f"{path.shown}: {shown(name)} is in line {first[name]} and in line {line}; expected one class name "
                "per line, each once, in label order"
            )
    return tuple(names) if labels is None else _by_label(path, names, labels, [line for line, _ in lines])


def _by_label(path: StoragePath, names: Sequence[str], labels: Sequence[int], lines: Sequence[int]) -> tuple[str, ...]:
    first: dict[int, int] = {}
    for label, line in zip(labels, lines, strict=True):
        if first.setdefault(label, line) != line:
            raise UserError(
                f"{path.shown}: label {label} is in line {first[label]} and in line {line}; each is of one class"
            )
    gap = next((label for label in range(len(labels)) if label not in first), None)
    if gap is not None:
        hint = ": they count from 1" if min(labels) == 1 and max(labels) == len(labels) else ""
        raise UserError(
            f"{path.shown}: no class has label {gap}{hint}; expected each of 0..{len(labels) - 1} once, or no labels, "
            "and the classes in their order"
        )
    return tuple(name for _, name in sorted(zip(labels, names, strict=True)))


def _refuse_columns(path: StoragePath, lines: Sequence[TableRow]) -> None:
    """UserError when lines have several columns that are not a class, a tab and its label."""
    odd = next(((line, text) for line, (text,) in lines if "\t" in text and not INDEXED.fullmatch(text)), None)
    if odd is None and any("\t" in text for _, (text,) in lines):
        odd = next((line, text) for line, (text,) in lines if "\t" not in text)
    if odd is not None:
        raise UserError(
            f"{path.shown}: line {odd[0]} is {shown(odd[1], 60)}; expected a class, and after a tab its label in every "
            "line or in none"
        )
    by_comma = [INDEXED_BY_COMMA.fullmatch(text) for _, (text,) in lines]
    if len(lines) > 1 and all(by_comma):
        numbers = sorted(int(match[1] or match[2]) for match in by_comma if match)
        if [number - numbers[0] for number in numbers] == list(range(len(lines))):
            raise UserError(
                f"{path.shown}: line {lines[0].line} is {shown(lines[0].cells[0], 60)}: a class and its label are "
                "separated by a tab, the class first"
            )


def class_names_in(labels: str | None) -> tuple[str, ...] | None:
    """The class names in the file that `--labels` names, if it is given."""
    return None if labels is None else read_class_names(storage_path(labels))


# --- columns ----------------------------------------------------------------------------------------------------------


class _TableHead:
    """The first rows of a table, by which its columns are recognised.

    `known`: of its cells those that name images, with a weight, see `_known_cells`.
    """

    def __init__(self, head: Sequence[TableRow], known: Mapping[str, int], where: str) -> None:
        self.where = where
        self.known = known
        self.titles = _titles(head, known)
        """Empty: the table has none."""
        self.rows = head[1:] if self.titles else head
        width = len(head[0].cells)
        if not self.rows:
            raise UserError(f"{where}: has titles but no lines of <file>,<class>")
        if width < 2:
            raise UserError(f"{where}: line {head[0].line} should be <file>,<class>: it has one column")
        self.columns = [[_cell(row.cells, number) for row in self.rows] for number in range(width)]
        self.names = self.titles or [f"number {number + 1}" for number in range(width)]
        self.low = [title.lower() for title in self.titles] or [""] * width

    def find(self, file_column: str | None, label_column: str | None) -> _ColumnNumbers:
        file = self._asked(file_column, "--file-column")
        label = self._asked(label_column, "--label-column")
        if file is None:
            file = self._file_column(label)
        split = self._split_column({file, label})
        if label is None:
            label = self._label_column([n for n in range(len(self.columns)) if n not in (file, split)])
        if file == label:
            raise UserError(f"{self.where}: the column {shown(self.names[file])} cannot have both files and classes")
        if not self.titles and len(self.columns) == 2 and not _is_table_of_two(self.rows, label):
            raise UserError(
                f"{self.where}: its lines have several values after the file; put commas or tabs between columns"
            )
        ignored = [title for number, title in enumerate(self.titles) if number not in (file, label, split)]
        columns = f"files are in the column {shown(self.names[file])}, classes in {shown(self.names[label])}"
        return _ColumnNumbers(
            file, label, split, bool(self.titles), [columns, f"not used: {few(ignored)}"] if ignored else []
        )

    def find_split(self) -> tuple[int, int]:
        """The columns of files and of splits. UserError when there is none, or two."""
        file = self._file_column(None)
        found = [
            n for n, cells in enumerate(self.columns) if n != file and 2 * sum(map(is_split_name, cells)) > len(cells)
        ]
        titled = [number for number in found if self.low[number] in SPLIT_TITLES or splits_in(self.low[number])]
        found = titled if len(titled) == 1 else found
        if len(found) == 1:
            return file, found[0]
        names = ", ".join(map(shown, self.names))
        which = f"{few([self.names[n] for n in found])} all name" if found else "none of them names"
        raise UserError(
            f"{self.where}: has the columns {names}; {which} the split, as one called split with train, val or test in "
            "every line would"
        )

    def _asked(self, title: str | None, option: str) -> int | None:
        """The column that the user named, by title or by number from 1."""
        if title is None:
            return None
        exact = [number for number, other in enumerate(self.titles) if other == title]
        found = exact or [number for number, other in enumerate(self.low) if self.titles and other == title.lower()]
        if len(found) > 1:
            raise UserError(
                f"{self.where}: {len(found)} columns are called {shown(title)}; {option} 2 means the second column"
            )
        if found:
            return found[0]
        if title.isascii() and title.isdigit() and len(title) < 6 and 1 <= int(title) <= len(self.columns):
            return int(title) - 1
        listed = ", ".join(map(shown, self.titles))
        there = f"the columns {listed}" if self.titles else f"{len(self.columns)} columns without titles"
        raise UserError(f"{self.where}: {option} {shown(title)}: there is no such column; it has {there}")

    def _file_column(self, taken: int | None) -> int:
        """The column with the most names of images; else the one titled so; else the first. UserError when it could be
        two titled ones."""
        free = [number for number in range(len(self.columns)) if number != taken]
        hits = {number: sum(self.known.get(_file_name(cell), 0) for cell in self.columns[number]) for number in free}
        titled = [number for number in free if self.low[number] in FILE_TITLES]
        # Names of images count more than a title: tables have columns called `id` or `name` for other things.
        best = max(free, key=lambda number: (hits[number], number in titled, -number))
        equal = [n for n in free if hits[n] == hits[best] > 0 and (n in titled) == (best in titled)]
        if self.titles and len(self.columns) > 2 and any(self.columns[n] != self.columns[best] for n in equal):
            names = few([self.names[number] for number in equal])
            raise UserError(f"{self.where}: the columns {names} all name images; say which is meant with --file-column")
        return best

    def _split_column(self, taken: set[int | None]) -> int | None:
        """The column with the split. UserError when there are two, or when one is titled so and not understood."""
        found = []
        for number, title in enumerate(self.low if self.titles else []):
            if number in taken:
                continue
            values = sorted(set(self.columns[number]) - {""})
            understood = bool(values) and all(len(splits_in(value)) == 1 for value in values)
            if understood and (title in SPLIT_TITLES or splits_in(title) or LABEL_TITLE.fullmatch(title) is None):
                found.append(number)
            elif title == "split" or (splits_in(title) and len(values) <= 2):
                raise UserError(
                    f"{self.where}: the column {shown(self.names[number])} seems to name the split, by {few(values)}; "
                    "write train, val or test into it, or remove it"
                )
        if len(found) > 1:
            raise UserError(f"{self.where}: {few([self.names[n] for n in found])} both name the split; remove one")
        return found[0] if found else None

    def _label_column(self, free: Sequence[int]) -> int:
        """The only column left, or the only one titled so. UserError when there is none, or it is ambiguous."""
        candidates = [number for number in free if not self._has_row_numbers(number)]
        titled = [number for number in candidates if LABEL_TITLE.fullmatch(self.low[number])]
        for only in (candidates, titled):
            if len(only) == 1:
                return only[0]
        if candidates and not titled and all({cell.lower() for cell in self.columns[n]} <= FLAGS for n in candidates):
            raise UserError(
                f"{self.where}: the columns {few([self.names[number] for number in candidates])} hold 0 and 1, or "
                f"words for them, one for each class: {NOT_SUPPORTED}; write the name of the one class into one "
                "column, or, if one of these has the classes, name it with --label-column"
            )
        hint = "say which has the classes with --label-column" if candidates else "none of them has classes"
        raise UserError(f"{self.where}: has the columns {', '.join(map(shown, self.names))}; {hint}")

    def _has_row_numbers(self, number: int) -> bool:
        """Whether it is the untitled column in which tables count their rows."""
        cells = self.columns[number]
        counts = ([str(row + start) for row in range(len(cells))] for start in (0, 1))
        return bool(self.titles) and self.low[number] in ("", "unnamed: 0", "index") and cells in counts


def _cell(cells: Sequence[str], column: int | None) -> str:
    return cells[column] if column is not None and column < len(cells) else ""


def _titles(head: Sequence[TableRow], known: Mapping[str, int]) -> list[str]:
    """The first row, if it has titles: it names no image, and either later rows do or it looks like titles."""
    first = head[0].cells
    if any(_file_name(cell) in known for cell in first):
        return []
    later = any(_file_name(cell) in known for row in head[1:] for cell in row.cells)
    looks = any(cell.lower() in FILE_TITLES or LABEL_TITLE.fullmatch(cell.lower()) for cell in first)
    return first if looks or (later and not re.search(r"\.\w{2,4}$", first[0])) else []


def _is_table_of_two(rows: Sequence[TableRow], label: int) -> bool:
    """False when each line has words after the class that are all numbers or all splits: columns without a comma."""
    tails = [row.cells[label].split()[1:] for row in rows if label < len(row.cells)]
    if not all(tails) or WNID.fullmatch(rows[0].cells[label].split()[0]):
        return True
    return not all(tail[-1].isdecimal() or splits_in(tail[-1]) for tail in tails)


# --- files ------------------------------------------------------------------------------------------------------------


def _file_name(cell: str) -> str:
    return cell.removeprefix("./")


def _keys(name: str, folders: Sequence[str] = ()) -> tuple[str, ...]:
    """The names that a table may use for a file."""
    stem = name[: name.rindex(".")] if "." in name.rpartition("/")[2] else name
    return (name, stem, *(f"{folder}/{key}" for folder in folders for key in (name, stem)))


def _known_cells(head: Sequence[TableRow], files: Iterable[str]) -> dict[str, int]:
    """The cells that are names of images or ends of their paths (2), or the same without a suffix (1), as a number can
    be by chance."""
    wanted = {_file_name(cell) for row in head for cell in row.cells}
    ends: dict[str, set[str]] = {}
    for cell in wanted:
        ends.setdefault(cell.rpartition("/")[2], set()).add(cell)
    found: dict[str, int] = {}
    for name in files:
        for key, weight in zip(_keys(name.rpartition("/")[2]), (2, 1), strict=True):
            for cell in ends.get(key, ()):
                found[cell] = max(weight, found.get(cell, 0))
    return found


def _require_all_labelled(names: Sequence[str], keys: Sequence[str | None], table: LabelTable) -> None:
    missing = [name for name, key in zip(names, keys, strict=True) if key is None]
    if not missing:
        return
    hint = _nearly(missing[0], table.classes) or (
        "; remove them, or give them another split in a column `split`" if len(missing) < len(names) else ""
    )
    raise UserError(
        f"{table.where}: names no class for {len(missing):,} of {len(names):,} images, first {shown(missing[0])}{hint}"
    )


def _nearly(name: str, listed: Iterable[str]) -> str:
    """A hint when the table names the file differently."""
    ends = {key.lower() for key in _keys(name.rpartition("/")[2])}
    for other in listed:
        end = other.replace("\\", "/").rpartition("/")[2]
        if end.lower() in ends:
            what = "in upper and lower case" if end not in _keys(name.rpartition("/")[2]) else "in its folder"
            return f"; it names {shown(other)}, which differs {what}: names must be as they are in --input"
    return ""


def _require_all_found(used: Sequence[str], wanted: Iterable[str], where: str) -> None:
    doubled = next((key for key, count in Counter(used).items() if count > 1), None)
    if doubled is not None:
        raise UserError(f"{where}: {shown(doubled)} is not exactly one file: several images have this name")
    unused = sorted(set(wanted) - set(used))
    if unused:
        raise UserError(
            f"{where}: names {len(used) + len(unused):,} images, of which {len(unused):,} do not exist: {few(unused)}"
        )


# --- labels -----------------------------------------------------------------------------------------------------------


def _number_labels(table: LabelTable, class_order: str | None) -> tuple[tuple[str, ...], dict[str, int]]:
    """The class names, and the label of each text in the column of labels."""
    plain = _whole_numbers(table.first_lines)
    if class_order == GIVEN:  # whatever the labels look like, `--classes` lists them as classes
        names = tuple(sorted(set(plain.values())))
        by_name = {name: label for label, name in enumerate(names)}
        return names, {text: by_name[name] for text, name in plain.items()}
    _refuse_fractions(plain.values(), table)
    _refuse_several(table)
    found: dict[Label, str] = {}
    label_of: dict[str, Label] = {}
    for text, name in plain.items():
        line = f"line {table.first_lines[text]}"
        try:
            label_of[text] = text_label(name)
        except ValueError as error:
            raise UserError(f"{table.where}: {line}: {error}") from None
        found.setdefault(label_of[text], line)
    numbers = [label for label in found if isinstance(label, int)]
    if class_order is None and len(numbers) == len(found):
        _require_from_zero(numbers, table.where)
    class_names, numbers_of = number_classes(found, None, class_order, table.where)
    return class_names, {text: numbers_of[label] for text, label in label_of.items()}


def _require_from_zero(numbers: Sequence[int], where: str) -> None:
    if min(numbers) > 0:
        raise UserError(
            f"{where}: labels are numbers from {min(numbers)}, expected from 0; if they are classes, say --class-order "
            "number to count them from their smallest, else name another column with --label-column"
        )
    if max(numbers) >= max(1_000, 10 * len(numbers)):
        raise UserError(
            f"{where}: labels are {len(numbers):,} different numbers up to {max(numbers):,}; if they are classes, say "
            "--class-order number to count them, else name another column with --label-column"
        )


def _whole_numbers(texts: Iterable[str]) -> dict[str, str]:
    """Each text -> itself, but if all are whole numbers, `3.0` (from a table of floats) -> `3`."""
    # A missing value makes pandas store a column of whole numbers as floats.
    whole = {text: WHOLE.fullmatch(text) for text in texts}
    if not all(match or NUMBER.fullmatch(text) for text, match in whole.items()):
        return {text: text for text in whole}
    return {text: str(int(match[1])) if match else text for text, match in whole.items()}


def _refuse_fractions(texts: Collection[str], table: LabelTable) -> None:
    """UserError when all labels are numbers and some have a fraction."""
    odd = next((text for text in texts if FRACTION.fullmatch(text) and not HIDDEN.fullmatch(text)), None)
    if odd is not None and all(FRACTION.fullmatch(text) or NUMBER.fullmatch(text) for text in texts):
        raise UserError(
            f"{table.where}: labels are numbers with fractions, {shown(odd)} in line {table.first_lines[odd]}: "
            f"{NOT_SUPPORTED}; name a column of classes with --label-column"
        )


def _refuse_several(table: LabelTable) -> None:
    """UserError when cells hold several labels: `0 3`, `cat|dog`, `['cat']`."""
    text = several_labels(table.first_lines)
    if text is not None:
        raise UserError(
            f"{table.where}: line {table.first_lines[text]} has several labels, {shown(text)}: {NOT_SUPPORTED}; "
            f"{LIST_CLASSES}"
        )


def _without_box(class_name: str) -> str:
    """The wnid of `<wnid> <box>`, as in Kaggle's LOC_val_solution.csv; other names as they are."""
    first, *rest = class_name.split()
    is_boxed = WNID.fullmatch(first) and rest and all(word.isdecimal() or word == first for word in rest)
    return first if is_boxed else class_name
