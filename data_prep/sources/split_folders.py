"""Which folders of a tree are splits and which are classes: decided by names and shape, or refused with a way out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from data_prep.errors import UserError
from data_prep.shown import few, shown
from data_prep.sources.splits import is_container_name, is_split_name, splits_in

FOLDERS_ARE = ("classes", "splits")
AS_CLASSES = "--folders-are classes takes each folder as a class, with all images below it"


class Folder(NamedTuple):
    name: str
    has_folders: bool


def find_splits(folders: Collection[Folder], where: str) -> list[str]:
    """The folders that are splits; empty: they are classes. UserError when neither is clear.

    Splits hold class folders, and there are several of them, or their name says nothing but the split. A class called
    `train` beside others, without folders in it, is a class.
    """
    named = [folder for folder in folders if splits_in(folder.name)]
    deep = [folder.name for folder in named if folder.has_folders]
    num_kinds = len({split for name in deep for split in splits_in(name)})
    is_most = 2 * len(deep) >= len(folders) and all(map(is_split_name, deep))
    if deep and (num_kinds > 1 or is_most):
        return deep
    if deep:
        raise UserError(
            f"{where}: {few(deep)} may be a split or a class; say --split {shown(deep[0])} to convert what is in "
            f"it; {AS_CLASSES}"
        )
    kinds = {split for folder in named for split in splits_in(folder.name)}
    if named and (len(kinds) > 1 or len(named) == len(folders)):
        raise UserError(
            f"{where}: {few([folder.name for folder in named])}: splits by name, but without class "
            f"folders; expected <split>/<class>/<image>; --labels FILE names the class of each image; {AS_CLASSES}"
        )
    return []


def refuse_nested(names: Collection[str], where: str) -> None:
    """UserError when the folders taken as classes look like something above them.

    `names`: `<class>/.../<file>` of all images. What is told apart: one folder around the classes, splits within each
    class, and splits or versions of the same data, which hold the same folders.
    """
    inner: dict[str, set[str]] = {}
    direct: set[str] = set()
    if not all(name.count("/") == 1 for name in names):  # mostly; and there may be a million
        for name in names:
            top, _, rest = name.partition("/")
            folder, slash, _ = rest.partition("/")
            if slash:
                inner.setdefault(top, set()).add(folder)
            else:
                direct.add(top)
    for top, below in inner.items():
        kinds = [split for name in below if is_split_name(name) for split in splits_in(name)]
        if len(set(kinds)) > 1 or (top not in direct and len(kinds) == len(below)):
            raise UserError(
                f"{where}: {shown(top)} holds {few(sorted(below))}: splits below a class are not understood; expected "
                f"<split>/<class>/<image>; if {shown(top)} is no class, say --input {where}/{shown(top)}; {AS_CLASSES}"
            )
    if direct or not inner:
        return
    if len(inner) == 1:
        top, below = next(iter(inner.items()))
        raise UserError(
            f"{where}: holds images in one folder only, {shown(top)}, and there in {few(sorted(below))}: if these "
            f"are the classes, say --input {where}/{shown(top)}; {AS_CLASSES}"
        )
    shared = _shared(inner)
    if shared is not None:
        tops = sorted(top for top, below in inner.items() if shared in below)
        raise UserError(
            f"{where}: {few(tops)} each hold a folder {shown(shared)}, so they may be splits, or versions of the "
            f"same images; say --split {shown(tops[0])} if these hold the classes; {AS_CLASSES}"
        )


def refuse_container(folders: Collection[str], where: str) -> None:
    """UserError when the only class would be a folder called `images`, or the like."""
    name = next(iter(folders), "")
    if len(folders) == 1 and is_container_name(name):
        raise UserError(
            f"{where}: its only folder is {shown(name)}; expected one folder for each class; --labels FILE names the "
            f"class of each image; {AS_CLASSES}"
        )


def _shared(inner: Mapping[str, set[str]]) -> str | None:
    """A folder that at least half of the classes hold; not if it is the only one there is, as `<class>/images/`."""
    counts: dict[str, int] = {}
    for below in inner.values():
        for name in below:
            counts[name] = counts.get(name, 0) + 1
    name = max(sorted(counts), key=lambda name: counts[name])
    return name if len(counts) > 1 and counts[name] > 1 and 2 * counts[name] >= len(inner) else None
