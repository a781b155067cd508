"""The files of a data set in shards (tars, parquet), and those of one split, by their names.

A name that is not understood is refused: if it were taken for another split, or for all of them, it would change the
training data.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import NamedTuple

from data_prep.errors import UserError
from data_prep.shown import few, shown
from data_prep.sources.files.find import GLOB, find_paths, storage_path
from data_prep.sources.files.listing import RecordedFile, record
from data_prep.sources.files.paths import IS_URL, NO_FILE, StoragePath, without_credentials
from data_prep.sources.files.tar import COMPRESSED_SUFFIXES
from data_prep.sources.splits import SplitRequest, choose_split, is_split_name, split_of_whole, splits_in

COUNTED = re.compile(r"(?P<set>.*?)(?P<number>\d+)-of-(?P<count>\d+)(?P<rest>.*)")
HASH = re.compile(r"[-_.][0-9a-f]{6,64}$")
"""What the Hub adds to the names of uploaded shards."""
NUMBER = re.compile(r"(?<![^\W_])\d+(?![^\W_])")
"""The number of a shard, between separators; `2017` in `train2017` is not one."""
UNFINISHED_SUFFIXES = (".part", ".partial", ".incomplete", ".crdownload", ".download", ".tmp", ".aria2")


@dataclass(frozen=True)
class Shards:
    """Files in the order of their names."""

    shown: str
    """The location, without credentials."""
    root: str | None
    """Name of the folder that was given; None for files, globs and patterns, which name what is wanted themselves."""
    paths: tuple[StoragePath, ...]
    names: tuple[str, ...]
    """Paths below the folder; `<folder>/<file>` where single files are given."""


class ChosenShards(NamedTuple):
    split: str
    indices: list[int]
    """Which of the shards."""
    notes: list[str]


class ShardsOfSplit(NamedTuple):
    location: str
    """Without credentials."""
    split: str
    files: list[RecordedFile]
    names: list[str]
    """How keys of samples name the files: by the file's name alone where that is unique."""
    notes: list[str]


@dataclass(frozen=True)
class _Name:
    group: str
    """What the shards of one split have in common."""
    readable: str
    """The same, as messages show it."""
    number: int | None = None
    count: int | None = None

    @property
    def words(self) -> list[str]:
        """Words that mean a split, in lower case."""
        return [word.lower() for word in re.split(r"[\W_]+", self.readable) if splits_in(word)]


def shards_of_split(location: str, suffix: str, kind: str, split: SplitRequest) -> ShardsOfSplit:
    """The files of the split that is meant. UserError when there are none, some are missing, or names do not tell."""
    shards = find_shards(location, suffix, kind)
    chosen = choose_shards(shards, split)
    files = [record(shards.paths[index]) for index in chosen.indices]
    return ShardsOfSplit(shards.shown, chosen.split, files, names_in_keys(shards, chosen.indices), chosen.notes)


def find_shards(location: str, suffix: str, kind: str) -> Shards:
    """`suffix`: of the files looked for in a folder (`.tar`); `kind`: what they are called. UserError when there are
    none, or some that cannot be read as they are."""
    try:
        paths = find_paths(location)
    except ValueError as error:
        raise UserError(f"--input: {error}") from None
    is_pattern = len(paths) != 1 or GLOB.search(location) is not None
    pattern = without_credentials(location) if IS_URL.match(location) else storage_path(location).shown
    where = pattern if is_pattern else paths[0].shown
    if not is_pattern and paths[0].kind() == "folder":
        names = _names_in_folder(paths[0], suffix)
        shards = Shards(where, paths[0].name, tuple(map(paths[0].child, names)), tuple(names))
    else:
        _require_files(paths, where)
        shards = Shards(where, None, tuple(paths), tuple(f"{path.parent().name}/{path.name}" for path in paths))
    if not shards.paths:
        raise UserError(
            f"--input {where}: no {kind} there; expected a folder of {kind}, a file, a glob, or a pattern with braces"
        )
    return shards


def _names_in_folder(folder: StoragePath, suffix: str) -> list[str]:
    """The shards' names. UserError for one that is not a file, is compressed, or was not downloaded completely."""
    names = []
    for name, _, stamp in sorted(folder.files().files):
        low = name.lower()
        if stamp == NO_FILE and suffix in low:
            raise UserError(f"{folder.shown}: {shown(name)} is not a file, nor a link to one; remove it")
        if low.endswith(suffix):
            names.append(name)
            continue
        is_shard = f"{suffix}." in low or low.endswith((".tgz", ".tbz", ".tbz2", ".txz"))
        if low.endswith(COMPRESSED_SUFFIXES) and is_shard:
            raise UserError(
                f"{folder.shown}: {shown(name)} is compressed, and pieces of it cannot be read in place; unpack it "
                "first (gunzip, unxz, unzstd), or name the files you want with a glob"
            )
        if low.endswith(UNFINISHED_SUFFIXES) and suffix in low:
            raise UserError(
                f"{folder.shown}: {shown(name)} is an unfinished download; finish it, or name the files you want with "
                "a glob"
            )
    return names


def _require_files(paths: Sequence[StoragePath], where: str) -> None:
    """UserError unless these are files that exist, each named once."""
    kinds = [path.kind() for path in paths]
    missing = [path.shown for path, kind in zip(paths, kinds, strict=True) if kind is None]
    if missing:
        raise UserError(f"--input {missing[0]}: does not exist; {len(missing):,} of {len(paths):,} files are missing")
    folder = next((path.shown for path, kind in zip(paths, kinds, strict=True) if kind == "folder"), None)
    if folder is not None:
        raise UserError(f"--input {folder}: is a folder, one of {len(paths):,} paths named; name files, or one folder")
    twice = next((name for name, count in Counter(path.shown for path in paths).items() if count > 1), None)
    if twice is not None:
        raise UserError(f"--input {where}: names {twice} twice, so its samples would be there twice")


def choose_shards(shards: Shards, split: SplitRequest) -> ChosenShards:
    """The split that is meant, and its shards. UserError when names do not tell."""
    where = shards.shown
    named = [_read_name(name, is_below=shards.root is not None) for name in shards.names]
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(named):
        groups.setdefault(name.group, []).append(index)
    by_group = {group: named[indices[0]] for group, indices in groups.items()}
    without = [group for group, name in by_group.items() if not splits_in(name.readable)]
    # Every name says its split, or all are counted sets (`labelled-0-of-2`), whose name is then the split's.
    if not without or (len(groups) > 1 and all(name.count is not None for name in by_group.values())):
        available = _short_names(by_group)
    elif len(without) == len(groups):  # no name says a split: all of them are one
        available = {by_group[without[0]].readable: without[0]} if len(groups) == 1 else {}
        if split.name not in available or not split.explicit:
            return _all_of(shards, named, split)
    else:
        odd = shards.names[groups[without[0]][0]]
        clear = next(index for group, indices in groups.items() if group not in without for index in indices)
        raise UserError(
            f"{where}: the name of {shown(odd)} says no split, that of {shown(shards.names[clear])} does; name the "
            "files of one split with a glob"
        )
    chosen = choose_split(sorted(available), split, where)
    indices = groups[available[chosen]]
    _check_set(shards, named, indices)
    alike = [other for other in sorted(available) if other != chosen and splits_in(other) == splits_in(chosen)]
    if not split.explicit:
        _refuse_numbered_alike(shards, indices[0], [groups[available[other]][0] for other in alike])
    notes = [f"{few(alike)} of {where} not taken, only {shown(chosen)}"] if alike else []
    return ChosenShards(chosen, indices, [*notes, *_gaps(shards, indices)])


def _all_of(shards: Shards, named: Sequence[_Name], split: SplitRequest) -> ChosenShards:
    """All shards, whose names say no split; the folder around them may."""
    above = [shards.root] if shards.root is not None else sorted({path.split("/")[0] for path in shards.names})
    name = split_of_whole(split, shards.shown, above if len(above) == 1 else ())
    indices = list(range(len(named)))
    _check_set(shards, named, indices)
    return ChosenShards(name, indices, _gaps(shards, indices))


def refuse_splits_within(values: Iterable[str], kind: str, split: SplitRequest, where: str) -> None:
    """UserError when values of a column, or names of folders (`kind` says which), mean several splits, unless all are
    asked for."""
    by_split: dict[str, str] = {}
    for value in values:
        if is_split_name(value):
            by_split.setdefault(next(iter(splits_in(value))), value)
    if len(by_split) > 1 and not split.is_whole:
        raise UserError(
            f"{where}: samples of several splits, by {kind} {few(sorted(by_split.values()))}: train.beton and "
            "val.beton would both have all of them; write each split into separate files, or say --split all"
        )


def names_in_keys(shards: Shards, indices: Sequence[int]) -> list[str]:
    """The names of the chosen shards in the keys of samples."""
    names = [PurePosixPath(shards.names[index]).name for index in indices]
    return names if len(set(names)) == len(names) else [shards.names[index] for index in indices]


def _read_name(path: str, *, is_below: bool) -> _Name:
    """`data/train-00000-of-00002-0123abcd.parquet`: number 0 of 2 of the group `train`.

    If the file's own name says no split, the group is the nearest folder whose name does; one that is not below the
    given folder (not `is_below`) has to be named like a split and nothing else.
    """
    file = PurePosixPath(path)
    stem = file.stem
    counted = COUNTED.fullmatch(stem)
    if counted:
        text = f"{counted['set']}#{HASH.sub('', counted['rest'])}"
        number, count = int(counted["number"]), int(counted["count"])
    else:
        text, number, count = NUMBER.sub("#", stem), None, None
    readable = re.sub(r"[-_.\s]*#[-_.\s]*", "-", text).strip("-_. ")
    if not splits_in(readable):  # `train/0000.parquet`: the folder says it
        folders = list(file.parents)[:-1]
        folder = next((f for f in folders if (splits_in if is_below else is_split_name)(f.name)), None)
        if folder is not None:
            return _Name(f"{folder}/", folder.name, number, count)
    return _Name(text, readable, number, count)


def _short_names(by_group: dict[str, _Name]) -> dict[str, str]:
    """Name of a split -> its group. `in1k-validation` is `validation` unless another one is, too."""
    words = Counter(word for name in by_group.values() for word in set(name.words))
    counts = Counter(name.readable for name in by_group.values())
    names: dict[str, str] = {}
    for group, name in by_group.items():
        is_clear = len(name.words) == 1 and words[name.words[0]] == 1
        names[name.words[0] if is_clear else name.readable if counts[name.readable] == 1 else group.strip("/")] = group
    return names


def _check_set(shards: Shards, named: Sequence[_Name], indices: Sequence[int]) -> None:
    """UserError when the files of a folder cannot be one set: some are missing, or two sets are mixed."""
    if shards.root is None:
        return
    where = shards.shown
    first_in: dict[str, str] = {}
    for index in indices:
        path = PurePosixPath(shards.names[index])
        other = first_in.setdefault(path.name, str(path))
        if other != str(path):
            raise UserError(
                f"{where}: holds {shown(other)} and {shown(path)}, so perhaps two data sets; name the folder of one, "
                "or all files with a glob"
            )
    by_number: dict[tuple[int, int], str] = {}
    for index in indices:
        name = named[index]
        if name.number is None or name.count is None:
            continue
        other = by_number.setdefault((name.count, name.number), shards.names[index])
        if other != shards.names[index]:
            raise UserError(
                f"{where}: {shown(other)} and {shown(shards.names[index])} are both number {name.number} of "
                f"{name.count}, so of two data sets; name the files of one with a glob"
            )
    counts = sorted({count for count, _ in by_number})
    if len(counts) > 1:
        raise UserError(
            f"{where}: {shown(by_number[min(by_number)])} and {shown(by_number[max(by_number)])} are of sets of "
            f"{counts[0]} and of {counts[-1]} files; name the files of one with a glob"
        )
    if not counts:
        return
    found = {number for _, number in by_number}
    first = 1 if 0 not in found and counts[0] in found else 0  # some writers count from 1
    missing = counts[0] - sum(first <= number < first + counts[0] for number in found)
    if missing:
        gap = next(number for number in range(first, first + counts[0]) if number not in found)
        raise UserError(
            f"{where}: {missing:,} of {counts[0]:,} files are missing, the first is number {gap}; download them, or "
            "name those you want with a glob"
        )
    if len(found) > counts[0]:
        odd = by_number[max(by_number)]
        raise UserError(f"{where}: {shown(odd)} is beyond its own count; name the files you want with a glob")


def _refuse_numbered_alike(shards: Shards, index: int, others: Iterable[int]) -> None:
    """UserError when names of two groups differ only in numbers: `train.tar` and `train_2.tar`, `train (1).tar`."""
    name = shards.names[index]
    other = next((shards.names[o] for o in others if _letters(shards.names[o]) == _letters(name)), None)
    if other is not None:
        raise UserError(
            f"{shards.shown}: {shown(name)} and {shown(other)} may be parts of one split, or copies; name those "
            "that are meant with a glob or a pattern with braces, or remove the others"
        )


def _letters(path: str) -> str:
    return re.sub(r"[\W\d_]+", "", PurePosixPath(path).with_suffix("").as_posix())


def _gaps(shards: Shards, indices: Sequence[int]) -> list[str]:
    """A note when files of a folder are numbered and a number between the first and the last is missing."""
    if shards.root is None:
        return []
    by_set: dict[str, dict[int, str]] = {}
    for index in indices:
        path = shards.names[index]
        stem = path[: -len(PurePosixPath(path).suffix)]
        numbers = list(NUMBER.finditer(stem))
        if len(numbers) == 1 and (found := numbers[0]):
            key = f"{stem[: found.start()]}#{stem[found.end() :]}"
            by_set.setdefault(key, {})[int(found[0])] = path
    for numbered in by_set.values():
        first, last = min(numbered), max(numbered)
        gap = next((number for number in range(first, last) if number not in numbered), None)
        if gap is not None and last - first < 2 * len(numbered) + 2:  # sparser numbers are dates or ids
            return [f"files are numbered, and {gap} is missing after {shown(numbered[gap - 1])}: is the set complete?"]
    return []
