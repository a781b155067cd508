"""Sources whose samples are files or byte ranges of files, and notes on the files that were left out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import replace
from importlib.util import find_spec
from pathlib import PurePosixPath
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.shown import count_of, few, shown
from data_prep.sources.base import Source, SourceDescription, digest_of, select
from data_prep.sources.files.listing import FileRanges, PackedStrings
from data_prep.sources.files.paths import HEAD_BYTES, Ends
from data_prep.sources.imagenet import are_wnids, check_labels, label_map

MAX_NAMED = 3
"""Left-out files that a description names."""
HEIC_SUFFIXES = (".heic", ".heif")
SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif"),
    *(HEIC_SUFFIXES if find_spec("pillow_heif") else ()),
)
"""Of images that are read; of HEIC pictures only where a plugin of Pillow's is installed."""
OTHER_IMAGES = frozenset((
    ".heic", ".heif", ".jxl", ".jp2", ".j2k", ".jpx", ".jfif", ".jpe", ".svg", ".ico", ".psd", ".tga",
    ".dds", ".exr", ".hdr", ".dcm", ".nii", ".npy", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2",
))  # fmt: skip
"""Suffixes of images that are not read."""
NUM_SUFFIXES = 6


def is_image_name(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


class FileListing(NamedTuple):
    """The samples of a split, in order."""

    class_names: tuple[str, ...]
    names: Sequence[str]
    """File names, below the folder or archive."""
    labels: NDArray[np.int64]
    sizes: NDArray[np.int64]
    """In bytes."""


class FileSource(Source):
    """Samples are files, or byte ranges of files, so a part of one can be read, and many into memory at a time.

    Args:
        name: of the source, for the manifest, as are `location` and `split`.
        stamps: values that change when a file is replaced by another of the same name and size.
        num_left_out: files that are not images, by name; `left_out` names the first of them.

    Raises:
        UserError: the labels contradict what is known of ImageNet.
    """

    sizes: NDArray[np.int64]

    def __init__(
        self,
        name: str,
        location: str,
        split: str,
        listing: FileListing,
        stamps: Iterable[bytes | int],
        num_left_out: int,
        left_out: Sequence[str] = (),
    ) -> None:
        self.class_names, names, self.labels, self.sizes = listing
        self._names = PackedStrings(names)
        wnids = label_map(self.class_names) if are_wnids(self.class_names) else {}
        # The same for the same files in a folder and in an archive.
        packed = os.fsencode("\0".join(names))
        identity = digest_of(
            [len(self.class_names), *self.class_names, packed, self.sizes.tobytes(), self.labels.tobytes()]
        )
        self.description = SourceDescription(
            name,
            location,
            split,
            identity,
            digest_of([identity, *stamps]),
            num_left_out,
            wnids,
            check_labels(wnids, self.labels, names, location),
            list(left_out[:MAX_NAMED]),
        )

    def select(self, indices: NDArray[np.int64]) -> Self:
        chosen = copy(self)
        chosen._names = PackedStrings([self._names[index] for index in indices.tolist()])
        chosen.labels, chosen.sizes = self.labels[indices], self.sizes[indices]
        return chosen

    def ends(self, indices: Sequence[int], max_head_bytes: int = HEAD_BYTES) -> Ends:
        """The first and last bytes of the samples that can be read. Raises Fault as `read` does."""
        raise NotImplementedError

    def read_into(self, indices: Sequence[int], into: memoryview) -> None:
        """Writes these samples into `into`, back to back; they fill it exactly. Raises as `read` does."""
        raise NotImplementedError


class ArchiveSource(FileSource):
    """Samples are byte ranges of a few large files."""

    def __init__(
        self,
        name: str,
        location: str,
        split: str,
        listing: FileListing,
        ranges: FileRanges,
        num_left_out: int,
        left_out: Sequence[str],
    ) -> None:
        self._ranges = ranges
        stamps = [value for file in ranges.files for value in file.status]
        super().__init__(name, location, split, listing, stamps, num_left_out, left_out)

    def select(self, indices: NDArray[np.int64]) -> Self:
        chosen, ranges = super().select(indices), self._ranges
        chosen._ranges = FileRanges(ranges.files, ranges.file_numbers[indices], ranges.offsets[indices], chosen.sizes)
        return chosen

    def read(self, index: int) -> bytes:
        return self._ranges.read(index)

    def ends(self, indices: Sequence[int], max_head_bytes: int = HEAD_BYTES) -> Ends:
        return self._ranges.ends(indices, max_head_bytes)

    def read_into(self, indices: Sequence[int], into: memoryview) -> None:
        self._ranges.read_into(indices, into)


def with_classes(source: Source, class_names: tuple[str, ...], where: str, *, skip_unlisted: bool = False) -> Source:
    """The samples of these classes, labelled by position in `class_names`, so that labels mean the same in every split.

    A source that knows its classes' wnids is also understood by these. Classes without samples become a note, and so do
    those that `skip_unlisted` leaves out.

    Args:
        where: names the list in messages.
        skip_unlisted: leave out samples of classes that are not listed; otherwise they are an error.

    Raises:
        UserError: samples are of a class that is not listed, or of none that is; names are ambiguous.
    """
    if source.class_names == class_names:
        return source
    described = source.description
    label_of = label_map(class_names)
    if len(label_of) < len(class_names):
        raise UserError(f"{where}: {shown(_twice(class_names))} is the name of two classes; list wnids, or rename one")
    wnids_here = {label: wnid for wnid, label in described.label_map.items()} if are_wnids(class_names) else {}
    names = [wnids_here.get(label, name) for label, name in enumerate(source.class_names)]
    new_labels = np.array([label_of.get(name, -1) for name in names], dtype=np.int64)
    counts = np.bincount(source.labels, minlength=len(names))
    present = [label for label, count in enumerate(counts) if count]
    if ambiguous := _twice([names[label] for label in present if new_labels[label] >= 0]):
        raise UserError(
            f"{described.location}: {shown(ambiguous)} is the name of two classes here; list wnids in {where}"
        )
    unlisted = [label for label in present if new_labels[label] < 0]
    num_unlisted = int(counts[unlisted].sum())
    if unlisted and not skip_unlisted:
        raise UserError(
            f"{described.location}: has images of {few([names[label] for label in unlisted])}, which {where} does not "
            f"list{_hint(names[unlisted[0]], class_names, described.name)}; add the name there, or leave these "
            f"{num_unlisted:,} images out with --skip-unlisted"
        )
    if num_unlisted == len(source):
        raise UserError(
            f"{described.location}: none of its classes ({few([names[label] for label in present])}) is listed in "
            f"{where}{_hint(names[present[0]], class_names, described.name)}"
        )
    notes = []
    if unlisted:
        left_out = {"classes": len(unlisted), "samples": num_unlisted}
        source = select(source, np.flatnonzero(new_labels[source.labels] >= 0), "unlisted", left_out)
        images, classes = count_of(num_unlisted, "image"), count_of(len(unlisted), "class", "classes")
        notes.append(
            f"{images} of {classes} left out, which {where} does not list: {few([names[label] for label in unlisted])}"
        )
    there = {names[label] for label in present}
    if missing := [name for name in class_names if name not in there]:
        notes.append(
            f"{len(missing):,} of the {len(class_names):,} classes of {where} have no images here: {few(missing)}"
        )
    relabelled = copy(source)
    relabelled.class_names = class_names
    relabelled.labels = new_labels[source.labels]
    relabelled.notes = (*source.notes, *notes)
    wnids = label_of if are_wnids(class_names) else {}
    keys = (source.key(index) for index in range(len(source)))
    relabelled.description = replace(
        source.description,
        identity=digest_of([source.description.identity, "classes", *class_names]),
        state=digest_of([source.description.state, "classes", *class_names]),
        label_map=wnids,
        label_checks=check_labels(wnids, relabelled.labels, keys, described.location),
    )
    return relabelled


def _twice(names: Sequence[str]) -> str:
    """The first name that occurs again; empty if none does."""
    return next((name for name, count in Counter(names).items() if count > 1), "")


def _hint(name: str, listed: Sequence[str], source: str) -> str:
    """Why a class may not be listed."""
    alike = next((other for other in listed if "".join(other.split()).lower() == "".join(name.split()).lower()), None)
    if alike is not None:
        return f" (it lists {shown(alike)!r}, and names must be exactly the same)"
    if name.isdecimal() and source in ("hf-parquet", "webdataset"):
        return " (labels are numbers here: --labels FILE gives the names of all, in label order)"
    return ""


# --- what was left out ------------------------------------------------------------------------------------------------


def left_out_notes(names: Sequence[str], hidden: Sequence[str]) -> list[str]:
    """Notes on files whose names are not those of images, and on files and folders whose names begin with a dot."""
    notes = []
    if names:
        suffixes = Counter(PurePosixPath(name).suffix.lower() for name in names).most_common()
        kinds = ", ".join(f"{shown(suffix, 20) or 'no suffix'} {count:,}" for suffix, count in suffixes[:NUM_SUFFIXES])
        unread = _unread_note([suffix for suffix, _ in suffixes if suffix in OTHER_IMAGES])
        skipped = f"{count_of(len(names), 'file')} skipped, not an image suffix ({kinds}): {few(sorted(names))}"
        notes.append(f"{skipped}; {unread}" if unread else skipped)
    seen = [name for name in sorted(hidden) if not name.rpartition("/")[2].startswith(("._", ".DS_Store"))]
    if seen:
        notes.append(f"{count_of(len(seen), 'hidden file or folder', 'hidden files or folders')} skipped: {few(seen)}")
    return notes


def skipped_notes(described: SourceDescription) -> list[str]:
    """The same from the description alone, for archives, where the names of all files are not kept."""
    count, names = described.num_left_out, described.left_out
    more = ", ..." if names and count > len(names) else ""
    listed = f": {', '.join(names)}{more}" if names else ""
    return [f"{count_of(count, 'file')} skipped, not an image by name{listed}"] if count else []


def why_empty(names: Sequence[str]) -> str:
    """What a folder without images contains instead, to follow `holds no images`."""
    unread = _unread_note(sorted({PurePosixPath(name).suffix.lower() for name in names} & OTHER_IMAGES))
    return f" but {few(sorted(names))}{f' ({unread})' if unread else ''}" if names else ""


def _unread_note(suffixes: Sequence[str]) -> str:
    if not suffixes:
        return ""
    plugin = ", or install pillow-heif for HEIC" if set(suffixes) & set(HEIC_SUFFIXES) else ""
    return f"{' and '.join(suffixes)} are not read: convert such images to JPEG or PNG first{plugin}"
