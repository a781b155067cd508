"""CIFAR's four publications, as tiny copies: the same pixels from each, and no pickle's code is run."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.sources.base import Source
from data_prep.sources.datasets.cifar import read_cifar_pickle
from data_prep.sources.splits import SplitRequest
from tests.data_prep.sources.opening import OpenAllWithin, TarOf, data_of, named, opened, refused

NAMES_10 = [f"class {label}" for label in range(10)]
NAMES_100 = [f"fine {label}" for label in range(100)]
PYTHON_10, BINARY_10 = "cifar-10-batches-py", "cifar-10-batches-bin"


def planes(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


BATCHES = {f"data_batch_{n}": (planes(3, n), [n, 9, 0]) for n in range(1, 6)} | {"test_batch": (planes(2, 9), [7, 1])}


def python_10(protocol: int = 2) -> dict[str, bytes]:
    """With text as bytes, as Python 2 wrote it."""
    files: dict[str, Any] = {}
    for name, (data, labels) in BATCHES.items():
        files[name] = {b"data": data, b"labels": labels, b"filenames": [b"x"] * len(labels)}
    files["batches.meta"] = {b"label_names": [name.encode() for name in NAMES_10], b"num_vis": 3072}
    return {f"{PYTHON_10}/{name}": pickle.dumps(content, protocol) for name, content in files.items()}


def binary_10() -> dict[str, bytes]:
    files = {}
    for name, (data, labels) in BATCHES.items():
        files[f"{name}.bin"] = b"".join(bytes([label]) + row.tobytes() for row, label in zip(data, labels, strict=True))
    files["batches.meta.txt"] = "\n".join([*NAMES_10, ""]).encode()
    return {f"{BINARY_10}/{name}": data for name, data in files.items()}


@pytest.fixture
def archive(tmp_path: Path, tar_of: TarOf):
    """A `.tar.gz` of these files: `archive({"a": b"..."})`, of these bytes: `archive(b"...")`."""

    def write(content: dict[str, bytes] | bytes) -> Path:
        path = tmp_path / "a.tar.gz"
        path.write_bytes(content if isinstance(content, bytes) else gzip.compress(tar_of(content), 1))
        return path

    return write


def unpacked(files: dict[str, bytes], folder: Path) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder / PYTHON_10


def pixels_of(source: Source, index: int) -> np.ndarray:
    """[3072], as planes."""
    image = Image.open(io.BytesIO(source[index].data))
    assert (image.format, image.mode) == ("PNG", "RGB")
    return np.asarray(image).transpose(2, 0, 1).ravel()


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 5])
def test_cifar10_python(archive, protocol: int) -> None:
    path = archive(python_10(protocol))
    source = pickle.loads(pickle.dumps(opened("cifar10", path, named("train"))))
    assert source.class_names == tuple(NAMES_10)
    assert source.labels.tolist() == [label for n in range(1, 6) for label in (n, 9, 0)]
    assert (source.key(0), source.key(7)) == ("data_batch_1 image 0", "data_batch_3 image 1")
    for index in (0, 7, 14):
        assert np.array_equal(pixels_of(source, index), BATCHES[f"data_batch_{index // 3 + 1}"][0][index % 3])
        assert source[index].label == source.labels[index]
    val = opened("cifar10", path, SplitRequest("val"))
    assert (val.description.split, val.labels.tolist(), val.key(1)) == ("test", [7, 1], "test_batch image 1")
    note = "holds 2 of CIFAR-10's 10,000 images of test, 0 with label 0, where 1,000 were published"
    assert val.notes == (note,)


def test_cifar10_binary_has_the_same_pixels(archive, tmp_path: Path) -> None:
    binary = opened("cifar10", archive(binary_10()), named("test"))
    assert data_of(binary) == data_of(opened("cifar10", unpacked(python_10(), tmp_path), named("test")))


@pytest.mark.parametrize("binary", [False, True])
def test_cifar100_has_fine_labels(archive, binary: bool) -> None:
    data, fine, coarse = planes(3, 1), [99, 0, 50], [1, 2, 3]
    if binary:
        rows = zip(coarse, fine, data, strict=True)
        train = b"".join(bytes([c, f]) + row.tobytes() for c, f, row in rows)
        files = {"c/train.bin": train, "c/fine_label_names.txt": "\n".join(NAMES_100).encode()}
    else:
        batch = {"data": data, "fine_labels": fine, "coarse_labels": coarse}
        files = {"c/train": pickle.dumps(batch), "c/meta": pickle.dumps({"fine_label_names": NAMES_100})}
    source = opened("cifar100", archive(files), named("train"))
    assert (source.labels.tolist(), source.class_names) == (fine, tuple(NAMES_100))
    assert np.array_equal(pixels_of(source, 2), data[2])


# --- pickles ----------------------------------------------------------------------------------------------------------


class Hostile:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_no_code_of_a_pickle_is_run(tmp_path: Path, archive, protocol: int) -> None:
    victim = tmp_path / "victim"
    for hostile in (Hostile(open, str(victim), "w"), Hostile(eval, f"open({str(victim)!r}, 'w')")):
        payload = pickle.dumps({"data": hostile, "labels": [1]}, protocol)
        path = archive(python_10() | {f"{PYTHON_10}/test_batch": payload})
        message = r"test_batch: is not a pickle of plain data: it names \w+\.(open|eval), which"
        refused(message, "cifar10", path, named("test"))
    assert not victim.exists()


@pytest.mark.parametrize(
    "payload",
    [
        pickle.dumps({"data": np.array([Hostile(print, "x")], dtype=object)}),
        pickle.dumps({"data": np.zeros(3, dtype=np.float64)}),
        pickle.dumps(np.ndarray),
        pickle.dumps([1, 2]),
        b"cos\nsystem\n(S'true'\ntR.",
        b"c_codecs\nencode\n(Vx\nVrot13\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"Pid\n.",
        b"",
        pickle.dumps({"data": np.zeros(9, dtype=np.uint8)})[:-20],
    ],
)
def test_pickles_of_anything_else_are_refused(payload: bytes) -> None:
    with pytest.raises(ValueError, match="is not a pickle of plain data"):
        read_cifar_pickle(payload)


def test_fortran_order_is_respected() -> None:
    array = np.asfortranarray(planes(2, 3))
    for protocol in (2, 5):
        assert np.array_equal(read_cifar_pickle(pickle.dumps({"data": array}, protocol))["data"], array)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "split", "message"),
    [
        (python_10(), "dev", "holds the splits train, test"),
        ({"a": b""}, "test", r"holds neither batches\.meta nor batches\.meta\.txt"),
        ({n: d for n, d in python_10().items() if n[-2:] != "_3"}, "train", "holds no data_batch_3; download it again"),
        (binary_10() | {f"{BINARY_10}/test_batch.bin": b"12"}, "test", "not a multiple of 3073"),
        (python_10() | {f"copy/{n}": d for n, d in python_10().items()}, "test", "holds test_batch twice"),
        (b"anything at all" * 100, "test", "is it a tar"),
    ],
)
def test_other_archives_are_refused(content: dict[str, bytes] | bytes, split: str, message: str, archive) -> None:
    refused(message, "cifar10", archive(content), named(split))


def test_incomplete_downloads_are_refused(archive, tar_of: TarOf, tmp_path: Path) -> None:
    cut = gzip.compress(tar_of(python_10()), 1)[:-3000]
    refused("cannot be read|cut short|no end mark", "cifar10", archive(cut), named("test"))
    cut = gzip.compress(tar_of(binary_10())[:-9000], 1)
    refused("is cut short within", "cifar10", archive(cut), named("test"))
    refused(r"none\.tar\.gz: does not exist", "cifar10", tmp_path / "none.tar.gz", named("test"))
    refused(r"holds neither batches\.meta nor", "cifar10", tmp_path, named("test"))
    folder = unpacked(python_10(), tmp_path)
    (folder / "test_batch").unlink()
    refused(f"{PYTHON_10}/test_batch: does not exist.*; download it again", "cifar10", folder, named("test"))


LABEL = "test_batch: image 1: the label is {}, expected 0..9"


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("test_batch", {"labels": [0, 10]}, LABEL.format("10")),
        ("test_batch", {"labels": [0, True]}, LABEL.format("a bool")),
        ("test_batch", {"labels": [0, 1.0]}, LABEL.format("a float")),
        ("test_batch", {"labels": [0, 10**30]}, LABEL.format("a number of more than 64 bits")),
        ("test_batch", {"labels": [0, -1]}, LABEL.format("-1")),
        ("test_batch", {"labels": [0, None]}, LABEL.format("a NoneType")),
        ("test_batch", {"labels": [0]}, "1 labels and pixels of shape"),
        ("test_batch", {"data": None}, "holds no data and labels"),
        ("test_batch", {"filenames": ["x"]}, "has 2 labels and 1 file names"),
        ("test_batch", {b"data": planes(2, 2)}, "it has a key twice"),
        ("batches.meta", {"label_names": ["x"]}, "names 1 classes, expected 10"),
        ("batches.meta", {"label_names": ["x"] * 10}, "names 10 classes, expected 10, each once"),
        ("batches.meta", {"label_names": [*NAMES_10[:9], None]}, "names 0 classes"),
        ("batches.meta", {"label_names": [*NAMES_10[:9], b"\xff"]}, "its names are not UTF-8"),
        ("batches.meta", {"num_cases_per_batch": 10_000}, "test_batch has 2 images, 10,000 by batches.meta"),
    ],
)
def test_files_that_contradict_one_another_are_refused(
    file: str, change: dict[Any, Any], message: str, archive
) -> None:
    good = {"test_batch": {"data": planes(2, 1), "labels": [0, 1]}, "batches.meta": {"label_names": NAMES_10}}
    path = archive(python_10() | {f"{PYTHON_10}/{file}": pickle.dumps(good[file] | change)})
    refused(message, "cifar10", path, named("test"))


def test_small_pickles_and_archives_take_little_memory(
    tmp_path: Path, tar_of: TarOf, open_all_within: OpenAllWithin
) -> None:
    """What makes much of little: a step a byte, a distant memo index, one text encoded often, zeros without end."""
    text = b"X" + (1 << 20).to_bytes(4, "little") + b"x" * (1 << 20)
    copies = b"c_codecs\nencode\nq\x01" + text + b"q\x02X\x06\0\0\0latin1q\x03\x86q\x04"
    hostile = {
        "lists": (b"(" + b"]" * (8 << 20) + b"l.", "1,000,000 parts"),
        "memo": (b"Nr\xff\xff\xff\x7f.", "1,000,000 parts"),
        "copies": (b"\x80\x02](" + copies + b"h\x01h\x04R" * 5000 + b"e.", "more data than it has"),
        "length": (b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b".", "pickle"),
        "number": (b"I" + b"9" * 10_000 + b"\n.", "pickle"),
        "nested": (b"(" * 200_000 + b"t" * 200_000 + b".", "pickle"),
    }
    for name, (payload, _) in hostile.items():
        (tmp_path / name).write_bytes(gzip.compress(tar_of(python_10() | {f"{PYTHON_10}/test_batch": payload}), 1))
    (tmp_path / "zeros").write_bytes(gzip.compress(bytes(80 << 20), 1))
    cases = {name: reason for name, (_, reason) in hostile.items()} | {"zeros": "end mark"}
    outcomes = open_all_within(300, [("cifar10", str(tmp_path / name), {}) for name in cases])
    for outcome, reason in zip(outcomes, cases.values(), strict=True):
        assert outcome.startswith("refused"), outcome
        assert reason in outcome


def test_an_archive_without_end_is_bounded(archive, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.sources.datasets.cifar.MAX_UNPACKED_BYTES", 4 << 20)
    info = tarfile.TarInfo("filler")
    info.size = 1 << 40
    path = archive(gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(5 << 20), 1))
    refused("unpacks to more than 4,194,304 bytes; expected cifar-10-python", "cifar10", path, named("test"))
