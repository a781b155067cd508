"""Text files that name classes: `<file> <class>` for images in one flat folder, or one class name a line."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.sources.class_order import order_classes
from data_prep.sources.imagenet import WNID, are_wnids
from data_prep.sources.places import Place

HEADERS = frozenset(
    {"image", "imageid", "image_id", "img", "file", "filename", "file_name", "name", "path", "id", "key"}
)


def read_label_file(place: Place) -> dict[str, str]:
    """File name -> class, of lines `<file>,<class>` (comma, tab or blanks; a line with titles may lead)."""
    lines = [line for line in read_text(place).splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{place.shown}: is empty; expected lines of <file>,<class>")
    separator = "," if "," in lines[0] else "\t" if "\t" in lines[0] else None
    rows = list(csv.reader(lines, delimiter=separator)) if separator else [line.split(None, 1) for line in lines]
    if rows[0][0].strip().lower() in HEADERS:
        rows = rows[1:]
    classes: dict[str, str] = {}
    for number, row in enumerate(rows, start=1 + len(lines) - len(rows)):
        if len(row) < 2 or not row[0].strip() or not row[1].strip():
            raise UserError(f"{place.shown}: line {number} should be <file>,<class>")
        name, class_name = row[0].strip().removeprefix("./"), _without_box(row[1].strip())
        if classes.setdefault(name, class_name) != class_name:
            raise UserError(f"{place.shown}: {name} has two classes, {classes[name]} and {class_name}")
    return classes


def label_files(
    names: Sequence[str], classes: dict[str, str], class_order: str | None, where: str
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Class names by label, and the label of each file. A label file may leave out the files' suffixes.

    Classes that are numbers from 0 are the labels themselves. UserError unless every file has a class and every line
    a file.
    """
    by_file = [_class_of(name, classes) for name in names]
    unlabelled = [name for name, (_, class_name) in zip(names, by_file, strict=True) if class_name is None]
    if unlabelled:
        raise UserError(
            f"{where}: names no class for {len(unlabelled):,} of {len(names):,} images, first {unlabelled[0]}"
        )
    unused = classes.keys() - {key for key, _ in by_file}
    if unused or len({key for key, _ in by_file}) != len(by_file):
        name = min(unused, default="one name")
        raise UserError(
            f"{where}: has {len(classes):,} names for {len(names):,} images; {name} is not exactly one file"
        )
    named = [class_name for _, class_name in by_file if class_name is not None]
    distinct = set(named)
    if class_order is None and all(name.isdecimal() and str(int(name)) == name for name in distinct):
        if "0" not in distinct:
            raise UserError(
                f"{where}: labels are numbers from {min(map(int, distinct))}, expected from 0; say --class-order "
                "number to count them from their smallest"
            )
        class_names = tuple(str(label) for label in range(max(map(int, distinct)) + 1))
    else:
        class_names = order_classes(distinct, class_order, where)
    label_of = {name: label for label, name in enumerate(class_names)}
    return class_names, np.array([label_of[name] for name in named], dtype=np.int64)


def read_class_names(place: Place) -> tuple[str, ...]:
    """One class a line, in label order; of `<wnid> <words>`, as in LOC_synset_mapping.txt, the wnid."""
    names = [line.strip() for line in read_text(place).splitlines() if line.strip()]
    wnids = [name.split()[0] for name in names]
    if are_wnids(wnids):
        names = wnids
    if not names or len(set(names)) != len(names):
        raise UserError(f"{place.shown}: expected one class name a line, each once, in label order")
    return tuple(names)


def read_text(place: Place) -> str:
    """UserError when it does not exist or is no text."""
    try:
        return place.read().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{place.shown}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # also UnicodeDecodeError
        raise UserError(f"{place.shown}: cannot be read as text: {error}") from None


def _without_box(class_name: str) -> str:
    """Of `<wnid> <box>`, as in Kaggle's LOC_val_solution.csv, the wnid."""
    first, *rest = class_name.split()
    is_boxed = WNID.fullmatch(first) and rest and all(word.isdecimal() or word == first for word in rest)
    return first if is_boxed else class_name


def _class_of(name: str, classes: dict[str, str]) -> tuple[str, str | None]:
    for key in (name, str(PurePosixPath(name).with_suffix(""))):
        if key in classes:
            return key, classes[key]
    return name, None
