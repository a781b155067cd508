"""What a listing did not take, told with names: nothing in a folder is dropped without a word."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath

from data_prep.shown import few, shown
from data_prep.sources.base import SourceDescription

OTHER_IMAGES = frozenset(
    (
        *(".heic", ".heif", ".avif", ".jxl", ".jp2", ".j2k", ".jpx", ".jfif", ".jpe", ".svg", ".ico", ".psd", ".tga"),
        *(
            ".dds",
            ".exr",
            ".hdr",
            ".dcm",
            ".nii",
            ".npy",
            ".raw",
            ".dng",
            ".cr2",
            ".cr3",
            ".nef",
            ".arw",
            ".orf",
            ".rw2",
        ),
    )
)
"""Suffixes of images that are not read here."""
NUM_SUFFIXES = 6


def left_out_notes(names: Sequence[str], hidden: Sequence[str]) -> list[str]:
    """Of files that are no images by their name, and of files and folders whose names begin with a dot."""
    notes = []
    suffixes = Counter(PurePosixPath(name).suffix.lower() for name in names)
    others = {suffix: count for suffix, count in suffixes.most_common() if suffix in OTHER_IMAGES}
    if names:
        kinds = ", ".join(
            f"{shown(suffix, 20) or 'no suffix'} {count:,}" for suffix, count in suffixes.most_common(NUM_SUFFIXES)
        )
        notes.append(
            f"{count_of(len(names), 'file')} skipped, not an image suffix ({kinds}): {few(sorted(names))}"
            + (f"; {others_notes(others)}" if others else "")
        )
    seen = [name for name in sorted(hidden) if not name.rpartition("/")[2].startswith(("._", ".DS_Store"))]
    if seen:
        notes.append(f"{count_of(len(seen), 'hidden file or folder', 'hidden files or folders')} skipped: {few(seen)}")
    return notes


def skipped_notes(described: SourceDescription) -> list[str]:
    """The same from what the manifest says, for sources that give no notes."""
    count, names = described.num_left_out, described.left_out
    if not count:
        return []
    more = ", ..." if names and count > len(names) else ""
    return [
        f"{count_of(count, 'file')} skipped, no image by the name" + (f": {', '.join(names)}{more}" if names else "")
    ]


def others_notes(suffixes: Sequence[str] | dict[str, int]) -> str:
    return f"{' and '.join(suffixes)} are not read: convert such images to JPEG or PNG first"


def why_empty(names: Sequence[str]) -> str:
    """What a folder without images holds instead, to be put behind `holds no images`."""
    if not names:
        return ""
    others = sorted({suffix for name in names if (suffix := PurePosixPath(name).suffix.lower()) in OTHER_IMAGES})
    return f" but {few(sorted(names))}" + (f" ({others_notes(others)})" if others else "")


def count_of(count: int, one: str, many: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"
