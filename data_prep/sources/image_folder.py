"""Image files in one folder per class, as torchvision's ImageFolder reads them: `<root>/[<split>/]<class>/**/<file>`.

Classes are the folder names, sorted as text. With a label file (`--labels`) the folders have no meaning: the file gives
the class of every image, and its split if it has a column of splits. Files without an image's suffix are left out and
reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.shown import count_of, few, shown
from data_prep.sources.base import NO_OPTIONS, SourceOptions
from data_prep.sources.file_source import (
    FileListing,
    FileSource,
    is_image_name,
    left_out_notes,
    why_empty,
)
from data_prep.sources.files.find import storage_path
from data_prep.sources.files.listing import FetchAhead, list_each
from data_prep.sources.files.local import LocalListing, LocalPath
from data_prep.sources.files.paths import HEAD_BYTES, Ends, FileStatus, ListedFile, StoragePath, empty_ends
from data_prep.sources.label_file import LabelTable, label_files, read_label_file
from data_prep.sources.labels import GIVEN, notes_on_order, order_classes
from data_prep.sources.splits import (
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


class FolderContents(NamedTuple):
    class_names: tuple[str, ...]
    files: list[ListedFile]
    """The images, in the order of samples."""
    labels: NDArray[np.int64]
    num_left_out: int
    notes: list[str]


class FolderFiles(FileSource):
    """Samples that are files below one folder, each recorded with its size and time."""

    def __init__(self, name: str, root: StoragePath, split: str, contents: FolderContents) -> None:
        class_names, files, labels, num_left_out, notes = contents
        self._root = root
        self._stamps = np.array([file.stamp for file in files], dtype=np.int64)
        sizes = np.array([file.num_bytes for file in files], dtype=np.int64)
        listing = FileListing(class_names, [file.name for file in files], labels, sizes)
        super().__init__(name, root.shown, split, listing, [self._stamps.tobytes()], num_left_out)
        self.notes = tuple(notes)

    def select(self, indices: NDArray[np.int64]) -> Self:
        chosen = super().select(indices)
        chosen._stamps = self._stamps[indices]
        return chosen

    def key(self, index: int) -> str:
        return self._names[index]

    def read(self, index: int) -> bytes:
        return self._fetch(index) if isinstance(self._root, LocalPath) else self._ahead[index]

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
        if not isinstance(self._root, LocalPath):
            return None
        return LocalListing(self._root.os_path, self._names, self.sizes, self._stamps)

    @cached_property
    def _ahead(self) -> FetchAhead:
        return FetchAhead(self._fetch, len(self))

    def _fetch(self, index: int) -> bytes:
        return self._root.child(self._names[index]).read(FileStatus(int(self.sizes[index]), int(self._stamps[index])))


class Root(NamedTuple):
    """The folder that contains the class folders, or the images of a flat set."""

    path: StoragePath
    split: str
    notes: Sequence[str] = ()


class ImageFolder(FolderFiles):
    @classmethod
    def open(cls, location: str, split: SplitRequest, options: SourceOptions = NO_OPTIONS) -> Self:
        if options.labels is None and (options.file_column or options.label_column):
            raise UserError("--file-column and --label-column are of the table that --labels names; add that")
        given = storage_path(location)
        if given.kind() != "folder":
            raise UserError(f"--input {given.shown}: is not a folder; expected one with a folder for each class")
        if options.labels is None:
            root = _choose_root(given, split, options.folders_are)
            contents = _list_by_folders(root.path, options)
        else:
            root, contents = _list_by_table(given, split, options.labels, options)
        class_names, labels, notes = contents.class_names, contents.labels, [*root.notes, *contents.notes]
        if options.class_order is None:
            notes += notes_on_order(class_names)
        empty = [class_names[label] for label in np.flatnonzero(np.bincount(labels, minlength=len(class_names)) == 0)]
        if empty:
            notes.append(f"classes without images: {few(empty)}")
        if len(class_names) == 1:
            notes.append(f"there is only one class, {shown(class_names[0])}: a model has nothing to tell apart")
        opened = cls("image-folder", root.path, root.split, contents._replace(notes=notes))
        if options.labels is None:
            opened.description.label_checks.extend(_differences(given, root.path, class_names))
        return opened


def _list_by_folders(root: StoragePath, options: SourceOptions) -> FolderContents:
    are_listed = options.class_order == GIVEN
    folders = root.subfolders()
    _require_folders(root, folders)
    found = list_classes(root, folders)
    if options.folders_are != "classes":
        refuse_nested(found.names, root.shown)
        if not are_listed:
            refuse_container(folders, root.shown)
    class_names = order_classes(folders, options.class_order, root.shown)
    if not are_listed:
        found.require_no_empty(
            root,
            "fill or remove it, or give the names of all classes, in order, with --classes FILE (a list, or the beton "
            "of the training set)",
        )
    files, hidden = root.files(deep=False)
    found.hidden.extend(hidden)
    contents = found.in_order(class_names)
    beside = sorted(file.name for file in files if is_image_name(file.name))
    note = [f"{count_of(len(beside), 'image')} skipped, in no class folder: {few(beside)}"] if beside else []
    return contents._replace(notes=[*note, *contents.notes])


def _list_by_table(
    given: StoragePath, split: SplitRequest, label_file: str, options: SourceOptions
) -> tuple[Root, FolderContents]:
    listed, hidden = given.files()
    listed.sort()
    names = [file.name for file in listed if is_image_name(file.name)]
    table = read_label_file(storage_path(label_file), options.file_column, options.label_column, names)
    root, wanted = _choose_labelled(given, split, table)
    if root.path != given:
        prefix = f"{root.path.name}/"
        listed = [file._replace(name=file.name[len(prefix) :]) for file in listed if file.name.startswith(prefix)]
    files = [file for file in listed if is_image_name(file.name)]
    left_out = [file.name for file in listed if not is_image_name(file.name)]
    if not files:
        raise UserError(f"{root.path.shown}: holds no images{why_empty(left_out)}")
    class_names, labels, chosen = label_files(
        [file.name for file in files],
        table,
        options.class_order,
        split=wanted,
        folders=(root.path.name, root.path.shown),
    )
    notes = [*table.notes, *left_out_notes(left_out, hidden)]
    return root, FolderContents(class_names, [files[number] for number in chosen], labels, len(left_out), notes)


class ClassFolders(NamedTuple):
    images: dict[str, list[ListedFile]]
    """Folder -> its images, by name."""
    left_out: list[str]
    """Names of the other files."""
    hidden: list[str]

    @property
    def names(self) -> list[str]:
        return [file.name for files in self.images.values() for file in files]

    def require_no_empty(self, root: StoragePath, remedy: str) -> None:
        empty = min((name for name, files in self.images.items() if not files), default=None)
        if empty is not None:
            inside = [name.partition("/")[2] for name in self.left_out if name.startswith(f"{empty}/")]
            raise UserError(
                f"{root.child(empty).shown}: this class folder holds no images{why_empty(inside)}; {remedy}"
            )

    def in_order(self, class_names: tuple[str, ...]) -> FolderContents:
        """Samples by class, and by name within one."""
        counts = [len(self.images[name]) for name in class_names]
        labels = np.repeat(np.arange(len(class_names), dtype=np.int64), counts)
        files = [file for name in class_names for file in self.images[name]]
        notes = left_out_notes(self.left_out, self.hidden)
        return FolderContents(class_names, files, labels, len(self.left_out), notes)


def list_classes(root: StoragePath, folders: Sequence[str]) -> ClassFolders:
    found = ClassFolders({}, [], [])
    listings = list_each(lambda folder: root.child(folder).files(f"{folder}/"), folders)
    for folder, (files, hidden) in zip(folders, listings, strict=True):
        found.images[folder] = sorted(file for file in files if is_image_name(file.name))
        if len(found.images[folder]) < len(files):
            found.left_out.extend(sorted(file.name for file in files if not is_image_name(file.name)))
        found.hidden.extend(hidden)
    return found


def _require_folders(root: StoragePath, folders: Sequence[str]) -> None:
    if not folders:
        raise UserError(
            f"{root.shown}: holds no class folders; expected {root.name}/<class>/<image files>, or name a file of "
            "labels with --labels"
        )


def _differences(given: StoragePath, root: StoragePath, class_names: Sequence[str]) -> list[str]:
    """A note when another split has other class folders, so that its labels mean something else."""
    notes = []
    for name in given.subfolders() if root != given else []:
        others = given.child(name).subfolders() if is_split_name(name) and name != root.name else []
        odd = set(others) ^ set(class_names)
        if others and odd:
            notes.append(f"{name} has other classes, so other labels: {min(odd)} is not in both")
    return notes


def _choose_root(given: StoragePath, split: SplitRequest, folders_are: str | None) -> Root:
    """The folder that contains the class folders. UserError when folders may be splits or classes."""
    folders = given.subfolders()
    splits = _split_folders(given, folders, folders_are, split)
    if not splits and len(folders) == 1 and folders_are is None:  # one folder around train/ and val/
        inner = given.child(folders[0])
        splits = _split_folders(inner, inner.subfolders(), folders_are, split)
        if splits:
            given, folders = inner, inner.subfolders()
    if splits:
        flat = [name for name in folders if name not in splits and splits_in(name)]
        beside = f" (beside {few(flat)}, without class folders)" if flat else ""
        name = choose_split(splits, split, given.shown + beside)
        others = [folder for folder in folders if folder not in splits]
        return Root(given.child(name), name, [f"left out, not splits: {few(others)}"] if others else [])
    if split.explicit and not split.is_whole and folders_are is None:
        _refuse_split(given, folders, str(split.name))
    _require_folders(given, folders)
    try:
        return Root(given, split_of_whole(split, given.shown, [given.name, given.parent().name]))
    except UserError:
        if folders_are is None:  # its folders may look like splits, which is the better reason
            refuse_nested(list_classes(given, folders).names, given.shown)
        raise


def _refuse_split(given: StoragePath, folders: Sequence[str], asked: str) -> None:
    """UserError when a split is requested of a folder without splits whose own name does not say that split."""
    called = [folder for folder in folders if folder.lower() == asked.lower()]
    if called:
        raise UserError(
            f"--split {shown(asked)}: {given.child(called[0]).shown} holds no class folders: it is a class, not a split"
        )
    if not is_split_name(given.name):
        known = ", ".join(map(shown, folders[:10])) + (", ..." if len(folders) > 10 else "")
        raise UserError(
            f"--split {shown(asked)}: {given.shown} is not divided into splits, its folders ({known}) are classes; "
            "--split all takes all of it"
        )


def _split_folders(
    given: StoragePath, folders: Sequence[str], folders_are: str | None, split: SplitRequest
) -> list[str]:
    """The folders that contain a split, and the one that `--split` names, if it contains folders."""

    def has_folders(name: str) -> bool:
        return bool(given.child(name).subfolders())

    if folders_are == "classes":
        return []
    if folders_are == "splits":
        return [name for name in folders if has_folders(name)]
    named = split.name if split.explicit and not split.is_whole else None
    asked = [name for name in folders if named is not None and name.lower() == named.lower() and has_folders(name)]
    if asked:
        return [*asked, *(name for name in folders if name not in asked and is_split_name(name) and has_folders(name))]
    return find_splits([Folder(name, bool(splits_in(name)) and has_folders(name)) for name in folders], given.shown)


def _choose_labelled(given: StoragePath, split: SplitRequest, table: LabelTable) -> tuple[Root, str | None]:
    """The folder that contains the images, and the split as the table calls it; None: all of its lines are meant."""
    if table.splits and split.is_whole:
        return Root(given, WHOLE), None
    if table.splits:
        name = choose_split(sorted(set(table.splits.values())), split, table.where)
        return Root(given, name), name
    folders = [] if split.is_whole else given.subfolders()
    splits = find_splits([Folder(name, bool(splits_in(name))) for name in folders], given.shown)
    if splits:
        name = choose_split(splits, split, given.shown)
        return Root(given.child(name), name), None
    names = [table.where.rpartition("/")[2].rpartition(".")[0], given.name, given.parent().name]
    return Root(given, split_of_whole(split, table.where, names)), None
