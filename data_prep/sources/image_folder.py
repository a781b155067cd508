"""Samples that are files below one folder, each recorded with its size and time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.shown import few, shown
from data_prep.sources.base import (
    Sample,
    SourceDescription,
    count_of,
    digest_of,
    left_out_notes,
    listing_identity,
    why_empty,
)
from data_prep.sources.files.find import place_of
from data_prep.sources.files.listing import FetchAhead, PackedStrings, list_each
from data_prep.sources.files.local import LocalListing, LocalPlace
from data_prep.sources.files.places import HEAD_BYTES, Ends, FileStatus, ListedFile, Place, empty_ends
from data_prep.sources.imagenet import are_wnids, check_labels, label_map
from data_prep.sources.label_file import Columns, LabelTable, label_files, read_label_file
from data_prep.sources.labels import GIVEN, notes_on_order, order_classes, require_order
from data_prep.sources.splits import (
    FOLDERS_ARE,
    WHOLE,
    Folder,
    SplitRequest,
    choose_split,
    find_splits,
    is_split_name,
    refuse_container,
    refuse_nested,
    split_of_whole,
    splits_in,
)

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".gif", ".tif", ".tiff", ".webp")


def is_image_name(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


@dataclass(frozen=True)
class FolderFiles:
    root: Place
    class_names: tuple[str, ...]
    names: PackedStrings
    """Of the files, under the root."""
    labels: NDArray[np.int64]
    sizes: NDArray[np.int64]
    stamps: NDArray[np.int64]
    description: SourceDescription
    notes: tuple[str, ...] = ()
    """What a person should know of how the folder was understood, one line each."""

    def describe(self) -> SourceDescription:
        return self.description

    def noting(self, notes: list[str]) -> Self:
        """The same, with notes on its labels."""
        checks = [*self.description.label_checks, *notes]
        return replace(self, description=replace(self.description, label_checks=checks))

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, index: int) -> str:
        return self.names[index]

    def __getitem__(self, index: int) -> Sample:
        name = self.names[index]
        data = self._read(index, name) if isinstance(self.root, LocalPlace) else self._ahead[index]
        return Sample(data, int(self.labels[index]), name)

    def ends(self, indices: Sequence[int], max_head_bytes: int = HEAD_BYTES) -> Ends:
        if self._local is None:
            return empty_ends(len(indices), max_head_bytes)
        return self._local.ends(indices, max_head_bytes)

    def read_into(self, indices: Sequence[int], into: memoryview) -> None:
        if self._local is None or not self._local.read_into(indices, into):
            into[:] = b"".join(self[index].data for index in indices)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_ahead", "_local")}

    @cached_property
    def _local(self) -> LocalListing | None:
        if not isinstance(self.root, LocalPlace):
            return None
        return LocalListing(self.root.path, self.names, self.sizes, self.stamps)

    @cached_property
    def _ahead(self) -> FetchAhead:
        return FetchAhead(lambda index: self._read(index, self.names[index]), len(self))

    def _read(self, index: int, name: str) -> bytes:
        return self.root.child(name).read(self._recorded(index))

    def _recorded(self, index: int) -> FileStatus:
        return FileStatus(int(self.sizes[index]), int(self.stamps[index]))


def describe_files(
    name: str,
    root: Place,
    split: str,
    class_names: tuple[str, ...],
    files: Sequence[ListedFile],
    labels: NDArray[np.int64],
    num_left_out: int,
) -> tuple[PackedStrings, NDArray[np.int64], NDArray[np.int64], SourceDescription]:
    """The files' names, sizes and stamps as arrays, and what the manifest says of them."""
    names = [file.name for file in files]
    sizes = np.array([file.num_bytes for file in files], dtype=np.int64)
    stamps = np.array([file.stamp for file in files], dtype=np.int64)
    identity = listing_identity(class_names, names, sizes, labels)
    wnids = label_map(class_names) if are_wnids(class_names) else {}
    description = SourceDescription(
        name,
        root.shown,
        split,
        identity,
        digest_of([identity, stamps.tobytes()]),
        num_left_out,
        label_map=wnids,
        label_checks=check_labels(wnids, labels, names, root.shown),
    )
    return PackedStrings(names), sizes, stamps, description


# Image files in one folder per class, as torchvision's ImageFolder reads them: `<root>/[<split>/]<class>/**/<file>`.


class Root(NamedTuple):
    """The folder that holds the class folders, or the images of a flat set."""

    place: Place
    split: str
    notes: list[str]


class ImageFolder(FolderFiles):
    @classmethod
    def open(
        cls,
        location: str | None,
        split: SplitRequest,
        *,
        labels: str | None = None,
        file_column: str | None = None,
        label_column: str | None = None,
        class_order: str | None = None,
        folders_are: str | None = None,
    ) -> Self:
        if location is None:
            raise UserError("--source image-folder needs --input: the folder that holds one folder per class")
        require_order(class_order)
        if folders_are not in (None, *FOLDERS_ARE):
            raise UserError(f"--folders-are {folders_are}: expected one of {', '.join(FOLDERS_ARE)}")
        if labels is None and (file_column or label_column):
            raise UserError("--file-column and --label-column are of the table that --labels names; add that")
        given = place_of(location)
        try:
            if given.kind() != "folder":
                raise UserError(f"--input {given.shown}: is not a folder; expected one that holds one folder per class")
            if labels is not None:
                columns = Columns(file_column, label_column)
                return cls._with_labels(given, split, place_of(labels), columns, class_order)
            root = _choose_root(given, split, folders_are)
            opened = cls._scan(root, class_order, folders_are)
            return opened.noting(_differences(given, root.place, opened.class_names))
        except OSError as error:
            raise UserError(f"{error.filename or given.shown}: cannot be listed: {error.strerror or error}") from None

    @classmethod
    def _scan(cls, root: Root, class_order: str | None, folders_are: str | None) -> Self:
        hidden: list[str] = []
        folders = root.place.subfolders(hidden)
        _require_folders(root.place, folders)
        files, left_out, counts = list_classes(root.place, folders, hidden)
        if folders_are != "classes":
            refuse_nested([file.name for file in files], root.place.shown)
        if folders_are != "classes" and class_order != GIVEN:
            refuse_container(folders, root.place.shown)
        class_names = order_classes(folders, class_order, root.place.shown)
        if class_order != GIVEN:
            _require_no_empty(root.place, class_names, counts, left_out)
        number = {name: label for label, name in enumerate(class_names)}
        by_label = sorted(range(len(folders)), key=lambda place: number[folders[place]])
        ends = np.cumsum([0, *(counts[name] for name in folders)])
        ordered = [file for place in by_label for file in files[ends[place] : ends[place + 1]]]
        labels = np.repeat(np.arange(len(class_names), dtype=np.int64), [counts[name] for name in class_names])
        beside = [file.name for file in root.place.files(deep=False) if is_image_name(file.name)]
        notes = [
            *root.notes,
            *(
                [f"{count_of(len(beside), 'image')} skipped, in no class folder: {few(sorted(beside))}"]
                if beside
                else []
            ),
            *left_out_notes(left_out, hidden),
            *_order_notes(class_names, class_order),
        ]
        return cls._of(root, class_names, ordered, labels, len(left_out), notes)

    @classmethod
    def _with_labels(
        cls, given: Place, split: SplitRequest, label_file: Place, columns: Columns, class_order: str | None
    ) -> Self:
        hidden: list[str] = []
        listed = sorted(given.files(hidden=hidden))
        names = [file.name for file in listed if is_image_name(file.name)]
        table = read_label_file(label_file, columns, names)
        root, wanted = _choose_labelled(given, split, table)
        if root.place != given:
            prefix = f"{root.place.name}/"
            listed = [file._replace(name=file.name[len(prefix) :]) for file in listed if file.name.startswith(prefix)]
        files = [file for file in listed if is_image_name(file.name)]
        left_out = [file.name for file in listed if not is_image_name(file.name)]
        if not files:
            raise UserError(f"{root.place.shown}: holds no images{why_empty(left_out)}")
        names = [file.name for file in files]
        folders = (root.place.name, root.place.shown)
        class_names, labels, chosen = label_files(names, table, class_order, split=wanted, folders=folders)
        notes = [*root.notes, *table.notes, *left_out_notes(left_out, hidden), *_order_notes(class_names, class_order)]
        return cls._of(root, class_names, [files[number] for number in chosen], labels, len(left_out), notes)

    @classmethod
    def _of(
        cls,
        root: Root,
        class_names: tuple[str, ...],
        files: Sequence[ListedFile],
        labels: NDArray[np.int64],
        num_left_out: int,
        notes: Sequence[str],
    ) -> Self:
        names, sizes, stamps, description = describe_files(
            "image-folder", root.place, root.split, class_names, files, labels, num_left_out
        )
        counts = np.bincount(labels, minlength=len(class_names))
        empty = [class_names[label] for label in np.flatnonzero(counts == 0)]
        all_notes = [*notes, *([f"classes without images: {few(empty)}"] if empty else [])]
        if len(class_names) == 1:
            all_notes.append(f"there is one class only, {shown(class_names[0])}: a net has nothing to tell apart")
        return cls(root.place, class_names, names, labels, sizes, stamps, description, tuple(all_notes))


def list_classes(
    root: Place, folders: Sequence[str], hidden: list[str]
) -> tuple[list[ListedFile], list[str], dict[str, int]]:
    """The images in these folders, by folder and then by name; the other files; how many images each folder has."""

    def list_class(folder: str) -> list[ListedFile]:
        return sorted(root.child(folder).files(f"{folder}/", hidden=hidden))

    files: list[ListedFile] = []
    left_out: list[str] = []
    counts: dict[str, int] = {}
    for folder, listed in zip(folders, list_each(list_class, folders), strict=True):
        images = [file for file in listed if is_image_name(file.name)]
        files += images
        counts[folder] = len(images)
        if len(images) < len(listed):
            left_out += [file.name for file in listed if not is_image_name(file.name)]
    return files, left_out, counts


def _require_folders(root: Place, folders: Sequence[str]) -> None:
    if not folders:
        raise UserError(
            f"{root.shown}: holds no class folders; expected {root.name}/<class>/<image files>, or name a file of "
            "labels with --labels"
        )


def _require_no_empty(root: Place, class_names: Sequence[str], counts: dict[str, int], left_out: list[str]) -> None:
    empty = next((name for name in class_names if not counts[name]), None)
    if empty is not None:
        inside = [name.partition("/")[2] for name in left_out if name.startswith(f"{empty}/")]
        raise UserError(
            f"{root.child(empty).shown}: this class folder holds no images{why_empty(inside)}; fill or remove it, or "
            "give the names of all classes, in order, with --classes FILE (a list, or the beton of the training set)"
        )


def _order_notes(class_names: Sequence[str], class_order: str | None) -> list[str]:
    return notes_on_order(class_names) if class_order is None else []


def _differences(given: Place, root: Place, class_names: Sequence[str]) -> list[str]:
    """A note when another split has other class folders, so that its labels mean something else."""
    notes = []
    for name in given.subfolders() if root != given else []:
        others = given.child(name).subfolders() if is_split_name(name) and name != root.name else []
        odd = set(others) ^ set(class_names)
        if others and odd:
            notes.append(f"{name} has other classes, so other labels: {min(odd)} is not in both")
    return notes


def _choose_root(given: Place, split: SplitRequest, folders_are: str | None) -> Root:
    """The folder that holds the class folders."""
    folders = given.subfolders()
    splits = _split_folders(given, folders, folders_are, split)
    if not splits and len(folders) == 1 and folders_are is None:  # data/ around train/ and val/
        inner = given.child(folders[0])
        splits = _split_folders(inner, inner.subfolders(), folders_are, split)
        if splits:
            given, folders = inner, inner.subfolders()
    if splits:
        flat = [name for name in folders if name not in splits and splits_in(name)]
        beside = f" (beside {few(flat)}, without class folders)" if flat else ""
        name = choose_split(splits, split, given.shown + beside)
        others = [folder for folder in folders if folder not in splits]
        notes = [f"no splits, and left out: {few(others)}"] if others else []
        return Root(given.child(name), name, notes)
    if split.explicit and not split.is_whole and folders_are is None:
        known = ", ".join(map(shown, folders[:10])) + (", ..." if len(folders) > 10 else "")
        called = [folder for folder in folders if folder.lower() == str(split.name).lower()]
        if called:
            raise UserError(
                f"--split {shown(split.name)}: {given.child(called[0]).shown} holds no class folders: it is a class, "
                "not a split"
            )
        if not is_split_name(given.name):
            raise UserError(
                f"--split {shown(split.name)}: {given.shown} is not divided into splits, its folders ({known}) are "
                "classes; --split all takes all of it"
            )
    _require_folders(given, folders)
    try:
        return Root(given, split_of_whole(split, given.shown, [given.name, given.parent().name]), [])
    except UserError:
        if folders_are is None:  # a better reason, if there is one: it may hold splits after all
            refuse_nested([file.name for file in list_classes(given, folders, [])[0]], given.shown)
        raise


def _split_folders(given: Place, folders: Sequence[str], folders_are: str | None, split: SplitRequest) -> list[str]:
    """Those that hold a split, and the one that `--split` names, if it holds folders."""
    if folders_are == "classes":
        return []

    def has_folders(name: str) -> bool:
        return bool(given.child(name).subfolders())

    if folders_are == "splits":
        return [name for name in folders if has_folders(name)]
    named = split.name if split.explicit and not split.is_whole else None
    asked = [name for name in folders if named is not None and name.lower() == named.lower() and has_folders(name)]
    if asked:
        return [*asked, *(name for name in folders if name not in asked and is_split_name(name) and has_folders(name))]
    return find_splits([Folder(name, bool(splits_in(name)) and has_folders(name)) for name in folders], given.shown)


def _choose_labelled(given: Place, split: SplitRequest, table: LabelTable) -> tuple[Root, str | None]:
    """The folder that holds the images, and the split as the table calls it; None: all of its lines are meant."""
    names = [table.where.rpartition("/")[2].rpartition(".")[0], given.name, given.parent().name]
    if table.splits:
        if split.is_whole:
            return Root(given, WHOLE, []), None
        name = choose_split(sorted(set(table.splits.values())), split, table.where)
        return Root(given, name, []), name
    folders = [] if split.is_whole else given.subfolders()
    splits = find_splits([Folder(name, bool(splits_in(name))) for name in folders], given.shown)
    if splits:
        name = choose_split(splits, split, given.shown)
        return Root(given.child(name), name, []), None
    return Root(given, split_of_whole(split, table.where, names), []), None
