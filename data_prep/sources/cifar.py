"""CIFAR-10 and CIFAR-100 as their authors publish them: python or binary version, `.tar.gz` or unpacked folder.

`--input` is `cifar-10-python.tar.gz`, `cifar-10-binary.tar.gz` (`cifar-100-...`), or what they unpack to. Pixels become
PNG, which loses nothing. CIFAR-100's labels are the fine ones.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.sources.base import Sample, SourceDescription, digest_of
from data_prep.sources.cifar_pickle import read_cifar_pickle
from data_prep.sources.files.find import place_of
from data_prep.sources.files.places import Place, read_small
from data_prep.sources.files.tar import walk_tar
from data_prep.sources.splits import SplitRequest, choose_split

SIDE_PX = 32
PIXEL_BYTES = 3 * SIDE_PX * SIDE_PX
MAX_FILES_BYTES = 256 << 20
"""Of the files that a split needs; the real ones have 155 MB."""
MAX_UNPACKED_BYTES = 1 << 30


@dataclass(frozen=True)
class Version:
    """How one of the four publications is laid out."""

    batches: dict[str, tuple[str, ...]]
    """Split -> files."""
    names: str
    """The file with the class names."""
    names_key: str | None
    """Of the pickle with them; None: a text file."""
    labels_key: str = ""
    """Of the pickles with images; empty: a binary file."""
    label_bytes: int = 1
    """Of a binary record, before its pixels; the last one is the label."""


NUM_IMAGES = {"train": 50_000, "test": 10_000}
"""Of both data sets, as many of each class."""
TRAIN_10 = tuple(f"data_batch_{number}" for number in range(1, 6))
VERSIONS = {
    10: (
        Version({"train": TRAIN_10, "test": ("test_batch",)}, "batches.meta", "label_names", "labels"),
        Version(
            {"train": tuple(f"{name}.bin" for name in TRAIN_10), "test": ("test_batch.bin",)},
            "batches.meta.txt",
            None,
        ),
    ),
    100: (
        Version({"train": ("train",), "test": ("test",)}, "meta", "fine_label_names", "fine_labels"),
        Version({"train": ("train.bin",), "test": ("test.bin",)}, "fine_label_names.txt", None, label_bytes=2),
    ),
}


class Cifar:
    """All pixels in memory: 154 MB for a training split."""

    num_classes = 0

    def __init__(
        self,
        location: str,
        split: str,
        class_names: tuple[str, ...],
        batches: Sequence[tuple[str, NDArray[np.uint8], NDArray[np.int64]]],
    ) -> None:
        self.class_names = class_names
        self.sizes: NDArray[np.int64] | None = None
        self.labels = np.concatenate([labels for _, _, labels in batches])
        self._planes = tuple(planes for _, planes, _ in batches)
        self._batch_names = tuple(name for name, _, _ in batches)
        self._batch_ends = np.cumsum([len(labels) for _, _, labels in batches])
        identity = digest_of(
            ["cifar", split, *class_names, self.labels.tobytes(), *(planes.tobytes() for planes in self._planes)]
        )
        counts = np.bincount(self.labels, minlength=self.num_classes)
        expected = NUM_IMAGES[split] // self.num_classes
        label = int(np.argmax(counts != expected))
        note = (
            f"holds {len(self.labels):,} of CIFAR-{self.num_classes}'s {NUM_IMAGES[split]:,} images of {split}, "
            f"{counts[label]:,} with label {label}, where {expected:,} were published"
        )
        self.notes = (note,) if (counts != expected).any() else ()
        self._description = SourceDescription(f"cifar{self.num_classes}", location, split, identity, state=identity)

    @classmethod
    def open(cls, location: str | None, split: SplitRequest) -> Self:
        dash = f"cifar-{cls.num_classes}"
        if location is None:
            raise UserError(f"--source cifar{cls.num_classes} needs --input: {dash}-python.tar.gz, or its folder")
        given = place_of(location)
        name = choose_split(("train", "test"), split, given.shown)
        try:
            kind = given.kind()
            if kind is None:  # a pipe, too, which would hold us up
                raise FileNotFoundError
            if kind == "folder":
                version, files = _read_folder(given, VERSIONS[cls.num_classes], name)
            else:
                with given.open() as file:
                    version, files = _read_archive(file, VERSIONS[cls.num_classes], name, given.shown)
        except FileNotFoundError:
            raise UserError(
                f"--input {given.shown}: does not exist; expected {dash}-python.tar.gz, or its folder"
            ) from None
        except (EOFError, OSError, zlib.error) as error:
            raise UserError(f"{given.shown}: cannot be read: {error}; download it again") from None
        class_names, batch_size = _read_names(version, files[version.names], cls.num_classes, given.shown)
        batches = []
        for batch in version.batches[name]:
            planes, labels = _read_batch(version, files.pop(batch), cls.num_classes, f"{given.shown}: {batch}")
            if batch_size is not None and batch_size != len(labels):
                raise UserError(
                    f"{given.shown}: {batch} has {len(labels):,} images, {batch_size:,} by {version.names}; download "
                    "it again"
                )
            batches.append((batch, planes, labels))
        return cls(given.shown, name, class_names, batches)

    def describe(self) -> SourceDescription:
        return self._description

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, index: int) -> str:
        batch, row = self._locate(index)
        return f"{self._batch_names[batch]} image {row}"

    def __getitem__(self, index: int) -> Sample:
        from PIL import Image

        batch, row = self._locate(index)
        pixels = self._planes[batch][row].reshape(3, SIDE_PX, SIDE_PX).transpose(1, 2, 0)
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG", compress_level=1)
        return Sample(file.getvalue(), int(self.labels[index]), self.key(index))

    def _locate(self, index: int) -> tuple[int, int]:
        """Batch, and row within it."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        batch = int(np.searchsorted(self._batch_ends, index, side="right"))
        return batch, index - (int(self._batch_ends[batch - 1]) if batch else 0)


class Cifar10(Cifar):
    num_classes = 10


class Cifar100(Cifar):
    num_classes = 100


def _read_folder(folder: Place, versions: Sequence[Version], split: str) -> tuple[Version, dict[str, bytes]]:
    for version in versions:
        if folder.child(version.names).kind() == "file":
            names = (version.names, *version.batches[split])
            what = "one of CIFAR's files; download it again"
            return version, {name: read_small(folder.child(name), MAX_FILES_BYTES, what) for name in names}
    raise UserError(f"--input {folder.shown}: holds neither {versions[0].names} nor {versions[1].names}")


def _read_archive(
    file: BinaryIO, versions: Sequence[Version], split: str, where: str
) -> tuple[Version, dict[str, bytes]]:
    """Reads front to back, and keeps what the split needs."""
    wanted = {name for version in versions for name in (version.names, *version.batches[split])}
    unpacked = _Unpacked(file, where)
    files: dict[str, bytes] = {}
    num_bytes = 0
    for member in walk_tar(unpacked.read_at, 0, None, where):
        name = member.name.rpartition("/")[2]
        if name in wanted:
            if name in files:
                raise UserError(f"{where}: holds {name} twice: this is not CIFAR as it was published")
            num_bytes += member.num_bytes
            if num_bytes > MAX_FILES_BYTES:
                raise UserError(
                    f"{where}: with {name} its files have {num_bytes:,} bytes, expected at most {MAX_FILES_BYTES:,}: "
                    "this is not CIFAR"
                )
            files[name] = unpacked.read_at(member.offset, member.num_bytes)
            if len(files[name]) != member.num_bytes:
                raise UserError(f"{where}: is cut short within {name}; download it again")
    for version in versions:
        missing = {version.names, *version.batches[split]} - set(files)
        if version.names in files and missing:
            raise UserError(f"{where}: holds no {min(missing)}; download it again")
        if not missing:
            return version, files
    raise UserError(f"{where}: holds neither {versions[0].names} nor {versions[1].names}")


class _Unpacked:
    """A gzip stream (or a plain file) read front to back, at most MAX_UNPACKED_BYTES of it."""

    def __init__(self, file: BinaryIO, where: str) -> None:
        is_gzip = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        self._stream: Any = gzip.GzipFile(fileobj=file) if is_gzip else file
        self._where = where
        self._start = 0
        self._data = b""
        """The piece read last: the next one may begin within it, never before it."""

    def read_at(self, start: int, length: int) -> bytes:
        """Fewer bytes at the end of the stream."""
        if start + length > MAX_UNPACKED_BYTES:
            raise UserError(f"{self._where}: unpacks to more than {MAX_UNPACKED_BYTES:,} bytes: this is not CIFAR")
        skip = start - self._start - len(self._data)
        while skip > 0:
            skipped = len(self._stream.read(min(skip, 1 << 20)))
            if not skipped:
                return b""
            skip -= skipped
        kept = self._data[start - self._start :] if start < self._start + len(self._data) else b""
        self._start, self._data = start, kept + self._stream.read(max(0, length - len(kept)))
        return self._data[:length]


def _read_names(version: Version, data: bytes, num_classes: int, where: str) -> tuple[tuple[str, ...], int | None]:
    """The class names, and how many images each batch should have, where the file says so."""
    where = f"{where}: {version.names}"
    batch_size: Any = None
    try:
        if version.names_key is None:
            names = [line.strip() for line in data.decode("utf-8").splitlines() if line.strip()]
        else:
            meta = _load(data, where)
            found = meta.get(version.names_key)
            listed = found if isinstance(found, list) and all(isinstance(name, bytes | str) for name in found) else []
            names = [name.decode("utf-8") if isinstance(name, bytes) else name for name in listed]
            batch_size = meta.get("num_cases_per_batch")
    except UnicodeDecodeError:
        raise UserError(f"{where}: its names are no UTF-8; download it again") from None
    if len(names) != num_classes or len(set(names)) != num_classes:
        raise UserError(f"{where}: names {len(names)} classes, expected {num_classes}, each once")
    return tuple(names), batch_size if type(batch_size) is int and abs(batch_size) < 1 << 63 else None


def _read_batch(
    version: Version, data: bytes, num_classes: int, where: str
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pixels, [n, 3072] as planes of red, green and blue, and labels."""
    if version.labels_key:
        planes, labels = _read_pickle(version, data, num_classes, where)
    else:
        planes, labels = _read_binary(version, data, where)
    if planes.ndim != 2 or planes.shape[1] != PIXEL_BYTES or len(planes) != len(labels) or not len(labels):
        raise UserError(f"{where}: {len(labels)} labels and pixels of shape {planes.shape}, expected n and (n, 3072)")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(f"{where}: has labels {labels.min()}..{labels.max()}, expected 0..{num_classes - 1}")
    return planes, labels


def _read_pickle(
    version: Version, data: bytes, num_classes: int, where: str
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    batch = _load(data, where)
    planes, labels = batch.get("data"), batch.get(version.labels_key)
    if isinstance(labels, np.ndarray):
        labels = labels.tolist()
    if not isinstance(planes, np.ndarray) or not isinstance(labels, list):
        raise UserError(f"{where}: holds no data and {version.labels_key}, as CIFAR's python version has them")
    for row, label in enumerate(labels):
        if type(label) is not int or not 0 <= label < num_classes:
            raise UserError(f"{where}: image {row}: the label is {_short(label)}, expected 0..{num_classes - 1}")
    names = batch.get("filenames")
    if isinstance(names, list) and len(names) != len(labels):
        raise UserError(f"{where}: has {len(labels):,} labels and {len(names):,} file names; download it again")
    return planes, np.array(labels, dtype=np.int64)


def _short(value: object) -> str:
    if type(value) is int and abs(value) < 1 << 63:
        return str(value)
    return f"a {type(value).__name__}" if type(value) is not int else "a number of more than 64 bits"


def _read_binary(version: Version, data: bytes, where: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    record_bytes = version.label_bytes + PIXEL_BYTES
    if len(data) % record_bytes:
        raise UserError(f"{where}: {len(data):,} bytes are no multiple of {record_bytes}; download it again")
    records = np.frombuffer(data, dtype=np.uint8).reshape(-1, record_bytes)
    return records[:, version.label_bytes :], records[:, version.label_bytes - 1].astype(np.int64)


def _load(data: bytes, where: str) -> dict[str, Any]:
    try:
        return read_cifar_pickle(data)
    except ValueError as error:
        raise UserError(f"{where}: {error}; download it from its authors' page") from None
