"""What a source must offer. `sources/__init__.py` names them; README.md says how to add one."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Protocol, runtime_checkable

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep.errors import Fault, UserError
from data_prep.shown import few, shown
from data_prep.sources.files.places import HEAD_BYTES, Ends
from data_prep.sources.splits import SplitRequest

MAX_NAMED = 3
"""Files that a source names of those it leaves out."""


@dataclass(frozen=True)
class Sample:
    data: bytes
    """The image file: JPEG, PNG, ... as it lies in the source."""
    label: int
    key: str
    """Where a person finds it: a path in the tree, a file and row."""


@dataclass(frozen=True)
class SourceDescription:
    """Goes into the manifest and into the plan's hash."""

    name: str
    location: str
    """Absolute path or URL (without credentials), or the parameters of a made-up source."""
    split: str
    """The split as the source calls it; `all` when it has none."""
    identity: str
    """Digest of what the source says it holds (names, sizes, labels): equal for a copy elsewhere."""
    state: str
    """Digest that also changes when a file is replaced by one of the same name and size."""
    num_left_out: int = 0
    """Files that lie in the source but are no images by their name."""
    label_map: dict[str, int] = field(default_factory=dict)
    """wnid -> label, where the source says wnids."""
    label_checks: list[str] = field(default_factory=list)
    """Known facts of ImageNet that the labels were checked against; empty when it is not ImageNet's 1,000 classes."""
    left_out: list[str] = field(default_factory=list)
    """The first MAX_NAMED names of `num_left_out`, where the source tells them. Not in the plan's hash."""


def facts_of(described: Mapping[str, Any]) -> dict[str, Any]:
    """Of a description what tells two sources apart: `left_out`, which older manifests do not have, only names some."""
    return {name: value for name, value in described.items() if name != "left_out"}


class UnreadableSample(Exception):
    """One sample cannot be read; the message is one line that continues its name."""


class Source(Protocol):
    """Images and labels by index, always in the same order.

    Pickled once and opened again in every worker: open files are reopened lazily, long listings are numpy arrays (which
    workers of one node share), see `listing.PackedStrings`.
    """

    @property
    def class_names(self) -> tuple[str, ...]:
        """Indexed by label."""
        ...

    @property
    def labels(self) -> NDArray[np.int64]:
        """Of all samples, known without reading them."""
        ...

    @property
    def sizes(self) -> NDArray[np.int64] | None:
        """Bytes of each sample, -1 where unknown; None when that takes reading them."""
        ...

    def describe(self) -> SourceDescription: ...

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """The sample's `Sample.key`, without reading it."""
        ...

    def __getitem__(self, index: int) -> Sample:
        """Called by `read_sample`. OSError or ValueError, with a reason, when this sample cannot be read. Fault when
        the source was changed since it was opened: then no sample can be trusted."""
        ...


@runtime_checkable
class SourceWithEnds(Source, Protocol):
    """Keeps its images so that a part of one can be read, and read into memory that is there."""

    def ends(self, indices: Sequence[int], max_head_bytes: int = HEAD_BYTES) -> Ends:
        """Of those that can be read. Fault as from `source[index]`."""
        ...

    def read_into(self, indices: Sequence[int], into: memoryview) -> None:
        """`source[index].data` of each, one behind the other, which are as many bytes. Raises as `source[index]`
        does."""
        ...


@runtime_checkable
class SourceWithNotes(Source, Protocol):
    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know of how the source was understood, one line each."""
        ...


def notes_of(source: Source) -> tuple[str, ...]:
    return source.notes if isinstance(source, SourceWithNotes) else ()


class SourceClass(Protocol):
    def open(self, location: str | None, split: SplitRequest, **options: str) -> Source:
        """`options`: those of `SourceOptions` that the source takes and the user gave."""
        ...


def read_sample(source: Source, index: int) -> Sample:
    """UnreadableSample for whatever is wrong with this sample or its place in a container. UserError and Fault as from
    `source[index]`: they are of the source as a whole."""
    try:
        return source[index]
    except (UserError, Fault):
        raise
    except OSError as error:
        raise UnreadableSample(f"cannot be read: {shown(error.strerror or error)}") from None
    except ValueError as error:
        raise UnreadableSample(f"cannot be read: {shown(error)}") from None
    except Exception as error:  # noqa: BLE001  # a parser met what it did not foresee
        raise UnreadableSample(f"cannot be read: {type(error).__name__}: {shown(error)}") from None


def digest_of(parts: Iterable[bytes | str | int]) -> str:
    """xxh3_128 of the parts with their lengths, so that neighbours cannot flow into one another."""
    state = xxhash.xxh3_128()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode("utf-8", errors="surrogateescape")
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return f"xxh3_128:{state.hexdigest()}"


def listing_identity(
    class_names: Sequence[str], names: Sequence[str], sizes: NDArray[np.int64], labels: NDArray[np.int64]
) -> str:
    """Digest of what a listing says: the same for the same files in a folder and in an archive."""
    packed = os.fsencode("\0".join(names))
    return digest_of([len(class_names), *class_names, packed, sizes.tobytes(), labels.tobytes()])


# What a listing did not take, told with names: nothing in a folder is dropped without a word.


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
