"""Image files in one folder per class, as torchvision's ImageFolder reads them: `<root>/[<split>/]<class>/**/<file>`.

Classes are the folder names, sorted as text. With a label file (`labels`) the folders mean nothing: it names the class
of every file. Hidden files are passed over; files without an image's suffix are left out and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.sources.class_order import CLASS_ORDERS, order_classes
from data_prep.sources.find_places import place_of
from data_prep.sources.folder_files import FolderFiles, describe_files, is_image_name
from data_prep.sources.label_file import label_files, read_label_file
from data_prep.sources.parallel import list_each
from data_prep.sources.places import ListedFile, Place
from data_prep.sources.splits import SplitRequest, choose_split, is_split_name


class ImageFolder(FolderFiles):
    @classmethod
    def open(
        cls, location: str | None, split: SplitRequest, *, labels: str | None = None, class_order: str | None = None
    ) -> Self:
        if location is None:
            raise UserError("--source image-folder needs --input: the folder that holds one folder per class")
        if class_order not in (None, *CLASS_ORDERS):
            raise UserError(f"--class-order {class_order}: expected one of {', '.join(CLASS_ORDERS)}")
        given = place_of(location)
        try:
            if given.kind() != "folder":
                raise UserError(f"--input {given.shown}: is not a folder; expected one that holds one folder per class")
            if labels is not None:
                return cls._with_labels(*_choose_flat_root(given, split), place_of(labels), class_order)
            root, name = _choose_root(given, split)
            opened = cls._scan(root, name, class_order)
            return opened.noting(_differences(given, root, opened.class_names))
        except OSError as error:
            raise UserError(f"{error.filename or given.shown}: cannot be listed: {error.strerror or error}") from None

    @classmethod
    def _scan(cls, root: Place, split: str, class_order: str | None) -> Self:
        folders = root.subfolders()
        if not folders:
            raise UserError(
                f"{root.shown}: holds no class folders; expected {root.name}/<class>/<image files>, or name a file of "
                "labels with --labels"
            )
        class_names = order_classes(folders, class_order, root.shown)
        files, counts, num_left_out = list_classes(root, class_names)
        if 0 in counts:
            empty = root.child(class_names[counts.index(0)])
            raise UserError(f"{empty.shown}: this class folder holds no images; fill or remove it")
        labels = np.repeat(np.arange(len(class_names), dtype=np.int64), counts)
        return cls._of(root, split, class_names, files, labels, num_left_out)

    @classmethod
    def _with_labels(cls, root: Place, split: str, label_file: Place, class_order: str | None) -> Self:
        listed = sorted(root.files())
        files = [file for file in listed if is_image_name(file.name)]
        if not files:
            raise UserError(f"{root.shown}: holds no images")
        names = [file.name for file in files]
        class_names, labels = label_files(names, read_label_file(label_file), class_order, label_file.shown)
        num_left_out = len(listed) - len(files)
        return cls._of(root, split, class_names, files, labels, num_left_out)

    @classmethod
    def _of(
        cls,
        root: Place,
        split: str,
        class_names: tuple[str, ...],
        files: Sequence[ListedFile],
        labels: NDArray[np.int64],
        num_left_out: int,
    ) -> Self:
        names, sizes, stamps, description = describe_files(
            "image-folder", root, split, class_names, files, labels, num_left_out
        )
        return cls(root, class_names, names, labels, sizes, stamps, description)


def list_classes(root: Place, class_names: Sequence[str]) -> tuple[list[ListedFile], list[int], int]:
    """The images in these folders, by class and then by name; how many each has; how many other files there are."""

    def list_class(class_name: str) -> list[ListedFile]:
        return sorted(root.child(class_name).files(f"{class_name}/"))

    files: list[ListedFile] = []
    counts: list[int] = []
    num_listed = 0
    for listed in list_each(list_class, class_names):
        images = [file for file in listed if is_image_name(file.name)]
        files += images
        counts.append(len(images))
        num_listed += len(listed)
    return files, counts, num_listed - len(files)


def _differences(given: Place, root: Place, class_names: Sequence[str]) -> list[str]:
    """A note when another split has other class folders, so that its labels mean something else."""
    notes = []
    for name in given.subfolders() if root != given else []:
        others = given.child(name).subfolders() if is_split_name(name) and name != root.name else []
        odd = set(others) ^ set(class_names)
        if others and odd:
            notes.append(f"{name} has other classes, so other labels: {min(odd)} is not in both")
    return notes


def _choose_root(given: Place, split: SplitRequest) -> tuple[Place, str]:
    """The folder that holds the class folders, and the split's name."""
    splits = [name for name in given.subfolders() if is_split_name(name) and given.child(name).subfolders()]
    return _choose(given, splits, split, "with class folders in it")


def _choose_flat_root(given: Place, split: SplitRequest) -> tuple[Place, str]:
    """The folder that holds the images."""
    return _choose(given, [name for name in given.subfolders() if is_split_name(name)], split, "with images in it")


def _choose(given: Place, splits: list[str], split: SplitRequest, expected: str) -> tuple[Place, str]:
    if not splits:
        if split.explicit:
            raise UserError(f"--split {split.name}: {given.shown} has no folder of that name {expected}")
        return given, split.name or "all"
    name = choose_split(splits, split, given.shown)
    return given.child(name), name
