"""Image files in one folder per class, as torchvision's ImageFolder reads them: `<root>/[<split>/]<class>/**/<file>`.

Classes are the folder names, sorted as text. Hidden files are passed over; files without an image's suffix are left out
and counted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.sources.base import Sample, SourceDescription, digest_of
from data_prep.sources.listing import PackedStrings
from data_prep.sources.splits import ALIASES, SplitRequest, choose_split

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".gif", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class ImageFolder:
    root: Path
    class_names: tuple[str, ...]
    names: PackedStrings
    """Of the files, under the root, sorted within each class."""
    labels: NDArray[np.int64]
    description: SourceDescription

    @classmethod
    def open(cls, location: str | None, split: SplitRequest) -> Self:
        if location is None:
            raise UserError("--source image-folder needs --input: the folder that holds one folder per class")
        given = Path(location).expanduser().resolve()
        if not given.is_dir():
            raise UserError(f"--input {location}: is not a folder; expected one that holds one folder per class")
        try:
            return cls._scan(*_choose_root(given, split))
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be listed: {error.strerror}") from None

    @classmethod
    def _scan(cls, root: Path, split: str) -> Self:
        class_names = tuple(_subfolders(root))
        if not class_names:
            raise UserError(f"{root}: holds no class folders; expected {root.name}/<class>/<image files>")
        names: list[str] = []
        labels: list[int] = []
        status: list[tuple[int, int]] = []
        num_left_out = 0
        for label, class_name in enumerate(class_names):
            files = sorted(_files(root / class_name, class_name))
            images = [file for file in files if file[0].lower().endswith(SUFFIXES)]
            if not images:
                raise UserError(f"{root / class_name}: this class folder holds no images; fill or remove it")
            num_left_out += len(files) - len(images)
            names += [name for name, _, _ in images]
            status += [(size, time_ns) for _, size, time_ns in images]
            labels += [label] * len(images)
        sizes, times = np.array(status, dtype=np.int64).T
        identity = digest_of([*class_names, os.fsencode("\0".join(names)), sizes.tobytes()])
        description = SourceDescription(
            "image-folder", str(root), split, identity, digest_of([identity, times.tobytes()]), num_left_out
        )
        return cls(root, class_names, PackedStrings(names), np.array(labels, dtype=np.int64), description)

    def describe(self) -> SourceDescription:
        return self.description

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, index: int) -> str:
        return self.names[index]

    def __getitem__(self, index: int) -> Sample:
        name = self.names[index]
        return Sample((self.root / name).read_bytes(), int(self.labels[index]), name)


def _choose_root(given: Path, split: SplitRequest) -> tuple[Path, str]:
    """The folder that holds the class folders, and the split's name."""
    splits = [name for name in _subfolders(given) if name in ALIASES and _subfolders(given / name)]
    if not splits:
        if split.explicit:
            raise UserError(f"--split {split.name}: {given} has no folder of that name with class folders in it")
        return given, split.name or "all"
    name = choose_split(splits, split, str(given))
    return given / name, name


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())


def _files(folder: Path, prefix: str) -> Iterator[tuple[str, int, int]]:
    """Name under the root, bytes, and time of change in ns of every file below `folder` that is not hidden."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            name = f"{prefix}/{entry.name}"
            if entry.is_dir():
                yield from _files(Path(entry.path), name)
            else:
                status = entry.stat()
                yield name, status.st_size, status.st_mtime_ns
