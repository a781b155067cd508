"""What a source of images is, and how to write one.

To add a source:

1. Write a subclass of `Source`. Its `open` finds and lists the samples of one split and sets the attributes, its `key`
   names a sample and its `read` returns the image file, undecoded. `datasets.builtin.Digits` is a whole source in 30
   lines. Samples that are files, or byte ranges of files, have a base class that describes and reads them: see
   `file_source.py`, and `datasets/kaggle.py` as an example of its use.
2. Add its name to `SOURCES` in `__init__.py`: where it is, what `--input` it needs, which `SourceOptions` it takes.
3. Test that it gives the same bytes, labels and order as the files themselves, that a pickled copy reads the same, and
   each refusal (`tests/data_prep/sources/test_*.py`).

`open` raises `UserError`: one line that names what is wrong, where, and how to fix it. `read` raises `OSError` or
`ValueError` for a sample that cannot be read, and `Fault` when the source is not what was listed.

Building blocks: `files.find.path_of` (paths and URLs alike), `files.tar.walk_tar`, `files.table` (text and CSV),
`files.listing` (long listings that pickle fast), `splits.choose_split`, `labels.number_classes` (labels of any kind).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep.errors import Fault, UserError
from data_prep.shown import shown
from data_prep.sources.splits import SplitRequest


@dataclass(frozen=True)
class SourceOptions:
    """Command-line options that only some sources take; None: not given."""

    labels: str | None = None
    """image-folder: a file with the class of every image. hf-parquet, webdataset: a file with the class names in label
    order."""
    devkit: str | None = None
    """ilsvrc: ILSVRC2012_devkit_t12.tar.gz, if it is not beside the images."""
    class_order: str | None = None
    """`text` or `number`, see `labels.order_classes`; also for text labels in tables and shards."""
    image_column: str | None = None
    """hf-parquet: the column of images. webdataset: the extension of their files."""
    label_column: str | None = None
    """hf-parquet: the column of labels. webdataset: the extension of their files, or their key in the `.json`.
    image-folder: the column of `labels` with the classes, by title or by number from 1."""
    file_column: str | None = None
    """image-folder: the column of `labels` with the file names, by title or by number from 1."""
    folders_are: str | None = None
    """image-folder: `classes` or `splits`, where that is ambiguous."""


NO_OPTIONS = SourceOptions()


@dataclass(frozen=True)
class Sample:
    data: bytes
    """The image file, JPEG, PNG, ..., exactly as stored in the source."""
    label: int
    key: str
    """Where a person finds it: a path in the tree, a file and row."""


@dataclass(frozen=True)
class SourceDescription:
    """Part of the manifest and of the plan's hash."""

    name: str
    location: str
    """Absolute path or URL (without credentials), or the parameters of a synthetic source."""
    split: str
    """The split as the source calls it; `all` when it has none."""
    identity: str
    """Digest of the content by names, sizes and labels: equal for a copy elsewhere."""
    state: str
    """Digest that also changes when a file is replaced by one of the same name and size."""
    num_left_out: int = 0
    """Files in the source that are not images, by their names."""
    label_map: dict[str, int] = field(default_factory=dict)
    """wnid -> label, where the source names wnids."""
    label_checks: list[str] = field(default_factory=list)
    """Known facts of ImageNet that the labels were checked against; empty unless it is ImageNet's 1,000 classes."""
    left_out: list[str] = field(default_factory=list)
    """The first names of `num_left_out`, where the source records them. Not in the plan's hash."""
    selected: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Why these are not all of its samples: rule -> its values, as JSON. Empty: they are all."""


def facts_of(described: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a description that distinguishes two sources, without what older manifests lack: `left_out`, and
    `selected` where it is empty."""
    return {
        name: value for name, value in described.items() if name != "left_out" and (name, value) != ("selected", {})
    }


class UnreadableSample(Exception):
    """One sample cannot be read; the message is one line that continues its name."""


class Source:
    """Images and labels by index, always in the same order.

    Pickled once and unpickled in every worker, so open files are reopened lazily and long listings are numpy arrays,
    which the workers of one node share (`files.listing.PackedStrings`).
    """

    class_names: tuple[str, ...]
    """Indexed by label."""
    labels: NDArray[np.int64]
    """[samples], known without reading them."""
    description: SourceDescription
    sizes: NDArray[np.int64] | None = None
    """[samples] in bytes, -1 where unknown; None if that takes reading them."""
    notes: tuple[str, ...] = ()
    """What a user should know about how the source was understood, one line each."""

    @classmethod
    def open(cls, location: str, split: SplitRequest, options: SourceOptions = NO_OPTIONS) -> Self:
        """`location`: `--input`, a local path or a URL; empty: not given. UserError when it cannot be found or
        understood."""
        raise NotImplementedError

    def key(self, index: int) -> str:
        """The sample's `Sample.key`, without reading it."""
        raise NotImplementedError

    def read(self, index: int) -> bytes:
        """The image file.

        Raises:
            OSError, ValueError: this sample cannot be read; the message is the reason.
            Fault: the source has changed since it was opened, so no sample can be trusted.
        """
        raise NotImplementedError

    def select(self, indices: NDArray[np.int64]) -> Source:
        """A source of these samples alone, in this order; `description` and `notes` are still those of all."""
        return _SelectedSamples(self, indices)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        """Raises as `read` does; `read_sample` turns that into one kind of exception."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return Sample(self.read(index), int(self.labels[index]), self.key(index))


class _SelectedSamples(Source):
    def __init__(self, source: Source, indices: NDArray[np.int64]) -> None:
        self._source = source
        self._indices = indices
        self.class_names, self.labels, self.notes = source.class_names, source.labels[indices], source.notes
        self.description = source.description
        self.sizes = None if source.sizes is None else source.sizes[indices]

    def key(self, index: int) -> str:
        return self._source.key(int(self._indices[index]))

    def read(self, index: int) -> bytes:
        return self._source.read(int(self._indices[index]))


def select(source: Source, indices: NDArray[np.int64], rule: str, values: Mapping[str, Any]) -> Source:
    """These samples of a source, with the reason in its description: see `SourceDescription.selected`."""
    chosen, described = source.select(indices), source.description
    where: list[bytes | str] = [rule, indices.astype("<i8").tobytes()]
    chosen.description = replace(
        described,
        identity=digest_of([described.identity, *where]),
        state=digest_of([described.state, *where]),
        selected={**described.selected, rule: dict(values)},
    )
    return chosen


def read_sample(source: Source, index: int) -> Sample:
    """UnreadableSample for any problem with this sample or its position in a container; UserError and Fault, which are
    about the source itself, pass through."""
    try:
        return source[index]
    except (UserError, Fault):
        raise
    except OSError as error:
        raise UnreadableSample(f"cannot be read: {shown(error.strerror or error)}") from None
    except ValueError as error:
        raise UnreadableSample(f"cannot be read: {shown(error)}") from None
    except Exception as error:  # noqa: BLE001  # a parser hit something it did not expect
        raise UnreadableSample(f"cannot be read: {type(error).__name__}: {shown(error)}") from None


def digest_of(parts: Iterable[bytes | str | int]) -> str:
    """xxh3_128 of the parts, each preceded by its length so that moving bytes between neighbours changes the digest."""
    state = xxhash.xxh3_128()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode("utf-8", errors="surrogateescape")
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return f"xxh3_128:{state.hexdigest()}"
