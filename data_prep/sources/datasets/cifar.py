"""CIFAR-10 and CIFAR-100 as their authors publish them: python or binary version, `.tar.gz` or unpacked folder.

`--input` is `cifar-10-python.tar.gz`, `cifar-10-binary.tar.gz` (`cifar-100-...`), or the folder they unpack to. Pixels
become PNG, which is lossless. CIFAR-100's labels are the fine ones.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.shown import shown
from data_prep.sources.base import NO_OPTIONS, Source, SourceDescription, SourceOptions, digest_of
from data_prep.sources.files.find import storage_path
from data_prep.sources.files.listing import locate
from data_prep.sources.files.paths import StoragePath, read_small
from data_prep.sources.files.tar import read_members
from data_prep.sources.splits import SplitRequest, choose_split

SIDE_PX = 32
PIXEL_BYTES = 3 * SIDE_PX * SIDE_PX
MAX_FILES_BYTES = 256 << 20
"""Largest total of the files that a split needs; the real ones have 155 MB."""
MAX_UNPACKED_BYTES = 1 << 30


@dataclass(frozen=True)
class Version:
    """How one of the four publications is laid out."""

    batches: dict[str, tuple[str, ...]]
    """Split -> files."""
    names: str
    """The file with the class names."""
    names_key: str | None
    """Their key in a pickle; None: a text file."""
    labels_key: str = ""
    """Key of the labels in the pickles; empty: binary files."""
    label_bytes: int = 1
    """Label bytes before the pixels of a binary record; the last one is the label."""

    def files(self, split: str) -> tuple[str, ...]:
        return self.names, *self.batches[split]


NUM_IMAGES = {"train": 50_000, "test": 10_000}
"""In both data sets; each class has the same number."""
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


class Cifar(Source):
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
        self.labels = np.concatenate([labels for _, _, labels in batches])
        self._planes = tuple(planes for _, planes, _ in batches)
        self._batch_names = tuple(name for name, _, _ in batches)
        self._batch_ends = np.cumsum([len(labels) for _, _, labels in batches])
        identity = digest_of(
            ["cifar", split, *class_names, self.labels.tobytes(), *(planes.tobytes() for planes in self._planes)]
        )
        self.description = SourceDescription(f"cifar{self.num_classes}", location, split, identity, state=identity)
        counts = np.bincount(self.labels, minlength=self.num_classes)
        expected = NUM_IMAGES[split] // self.num_classes
        if (counts != expected).any():
            label = int(np.argmax(counts != expected))
            note = (
                f"holds {len(self.labels):,} of CIFAR-{self.num_classes}'s {NUM_IMAGES[split]:,} images of {split}, "
                f"{counts[label]:,} with label {label}, where {expected:,} were published"
            )
            self.notes = (note,)

    @classmethod
    def open(cls, location: str, split: SplitRequest, options: SourceOptions = NO_OPTIONS) -> Self:
        expected = f"cifar-{cls.num_classes}-python.tar.gz, or its folder"
        given = storage_path(location)
        name = choose_split(("train", "test"), split, given.shown)
        kind = given.kind()
        if kind is None:  # also a pipe, on which reading would block
            raise UserError(f"--input {given.shown}: does not exist; expected {expected}")
        try:
            version, files = _read_files(given, kind, VERSIONS[cls.num_classes], name, expected)
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

    def key(self, index: int) -> str:
        batch, row = locate(self._batch_ends, index)
        return f"{self._batch_names[batch]} image {row}"

    def read(self, index: int) -> bytes:
        from PIL import Image

        batch, row = locate(self._batch_ends, index)
        pixels = self._planes[batch][row].reshape(3, SIDE_PX, SIDE_PX).transpose(1, 2, 0)
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG", compress_level=1)
        return file.getvalue()


class Cifar10(Cifar):
    num_classes = 10


class Cifar100(Cifar):
    num_classes = 100


def _read_files(
    given: StoragePath, kind: str, versions: Sequence[Version], split: str, expected: str
) -> tuple[Version, dict[str, bytes]]:
    """The version, and the files that the split needs."""
    where = given.shown
    if kind == "folder":
        version = next((version for version in versions if given.child(version.names).kind() == "file"), None)
        if version is not None:
            what = "one of CIFAR's files; download it again"
            return version, {
                name: read_small(given.child(name), MAX_FILES_BYTES, what) for name in version.files(split)
            }
    else:
        wanted = {name for version in versions for name in version.files(split)}
        with given.open() as file:
            files = read_members(
                file, wanted, where, expected, max_bytes=MAX_FILES_BYTES, max_unpacked_bytes=MAX_UNPACKED_BYTES
            )
        for version in versions:
            missing = set(version.files(split)) - set(files)
            if version.names in files and missing:
                raise UserError(f"{where}: holds no {min(missing)}; download it again")
            if not missing:
                return version, files
    raise UserError(f"{where}: holds neither {versions[0].names} nor {versions[1].names}; expected {expected}")


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
        raise UserError(f"{where}: its names are not UTF-8; download it again") from None
    if len(names) != num_classes or len(set(names)) != num_classes:
        raise UserError(f"{where}: names {len(names)} classes, expected {num_classes}, each once")
    return tuple(names), batch_size if type(batch_size) is int and abs(batch_size) < 1 << 63 else None


def _read_batch(
    version: Version, data: bytes, num_classes: int, where: str
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pixels [n, 3072], as planes of red, green and blue, and labels [n]."""
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
        raise UserError(f"{where}: {len(data):,} bytes are not a multiple of {record_bytes}; download it again")
    records = np.frombuffer(data, dtype=np.uint8).reshape(-1, record_bytes)
    return records[:, version.label_bytes :], records[:, version.label_bytes - 1].astype(np.int64)


def _load(data: bytes, where: str) -> dict[str, Any]:
    try:
        return read_cifar_pickle(data)
    except ValueError as error:
        raise UserError(f"{where}: {error}; download it from its authors' page") from None


# --- pickles ----------------------------------------------------------------------------------------------------------
# A pickle is a program that may name any function. Here it can resolve only inert substitutes from this file, even for
# numpy's functions, so numpy never gets a state that it did not make itself; any other name is refused. A small pickle
# can also produce much data, so it is scanned before it runs, and the bytes that named functions make are counted.

MAX_OPCODES = 1_000_000
"""CIFAR-100's training set has some 250,000: a label or a file name takes one to three."""
MAX_COPIES = 4
"""Limit on the bytes that named functions make, as a multiple of the pickle's size."""


class _Array:
    """Takes what numpy's `_reconstruct` and `__setstate__` do: (version, shape, dtype, fortran order, bytes)."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _ArrayClass:
    """Replaces `numpy.ndarray`, which pickles only pass to `_reconstruct`."""


class _DType:
    def __init__(self, name: Any = None, *_: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like, which a single byte does not have."""


_ALLOWED: dict[tuple[str, str], Any] = {("numpy", "ndarray"): _ArrayClass, ("numpy", "dtype"): _DType}
_ALLOWED |= {(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")}


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")
        self._bytes_left = MAX_COPIES * len(data) + 1024

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return self._latin1
        if module in ("numpy.core.numeric", "numpy._core.numeric") and name == "_frombuffer":
            return self._array_from_buffer
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which data does not need") from None

    def _latin1(self, text: Any, encoding: Any) -> bytes:
        """How protocol 2 writes bytes."""
        if not isinstance(text, str) or encoding != "latin1":
            raise pickle.UnpicklingError("it encodes text in another way than latin1")
        self._count(len(text))
        return text.encode("latin1")

    def _array_from_buffer(self, buffer: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> _Array:
        if not isinstance(buffer, bytes | bytearray):
            raise pickle.UnpicklingError("it makes an array of something other than bytes")
        self._count(len(buffer))
        array = _Array()
        array.state = (1, shape, dtype, order == "F", bytes(buffer))
        return array

    def _count(self, num_bytes: int) -> None:
        self._bytes_left -= num_bytes
        if self._bytes_left < 0:
            raise pickle.UnpicklingError("it makes much more data than it has")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to something outside of itself")


def read_cifar_pickle(data: bytes) -> dict[str, Any]:
    """A dict by text keys; arrays in it are uint8 or refused. ValueError, with the reason, on anything else."""
    try:
        _look_through(data)
        loaded = _Unpickler(data).load()
        if not isinstance(loaded, dict):
            raise ValueError("it does not hold a dict")
        by_key = {_text(key): _to_array(value) if isinstance(value, _Array) else value for key, value in loaded.items()}
        if len(by_key) != len(loaded):
            raise ValueError("it has a key twice")
        return by_key
    except Exception as error:  # noqa: BLE001  # a damaged pickle makes the reader raise anything
        raise ValueError(f"is not a pickle of plain data: {shown(error)}") from None


def _look_through(data: bytes) -> None:
    """ValueError when it has more opcodes than data needs, or a memo index so large that it takes memory."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        is_numbered = opcode.name in ("PUT", "BINPUT", "LONG_BINPUT")
        if count > MAX_OPCODES or (is_numbered and int(str(argument)) > MAX_OPCODES):
            raise ValueError(f"it has more than {MAX_OPCODES:,} parts")


def _text(value: Any) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def _to_array(array: _Array) -> NDArray[np.uint8]:
    if not isinstance(array.state, tuple) or len(array.state) != 5:
        raise ValueError("it has an array without a state")
    _, shape, dtype, is_fortran, data = array.state
    name = _text(dtype.name) if isinstance(dtype, _DType) else None
    if name not in ("u1", "|u1", "uint8") or not isinstance(data, bytes):
        raise ValueError(f"it has an array of {name}, expected uint8")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape, order="F" if is_fortran else "C")
