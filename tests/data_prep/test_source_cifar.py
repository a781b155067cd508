"""CIFAR's four publications, as tiny copies: the same pixels from each, and no pickle's code is run."""

from __future__ import annotations

import gzip
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.errors import UserError
from data_prep.sources import open_source
from data_prep.sources.base import Source
from data_prep.sources.datasets.cifar import read_cifar_pickle
from data_prep.sources.splits import SplitRequest

TarOf = Callable[[dict[str, bytes]], bytes]

NAMES_10 = [f"class {label}" for label in range(10)]
NAMES_100 = [f"fine {label}" for label in range(100)]


def named(split: str) -> SplitRequest:
    return SplitRequest(split, explicit=True)


def planes(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


BATCHES = {f"data_batch_{n}": (planes(3, n), [n, 9, 0]) for n in range(1, 6)} | {"test_batch": (planes(2, 9), [7, 1])}


def python_10(protocol: int = 2) -> dict[str, bytes]:
    """With text as bytes, as Python 2 wrote it."""
    files = {
        f"cifar-10-batches-py/{name}": pickle.dumps(
            {b"data": data, b"labels": labels, b"filenames": [b"x"] * len(labels)}, protocol
        )
        for name, (data, labels) in BATCHES.items()
    }
    meta = {b"label_names": [name.encode() for name in NAMES_10], b"num_vis": 3072}
    return files | {"cifar-10-batches-py/batches.meta": pickle.dumps(meta, protocol)}


def binary_10() -> dict[str, bytes]:
    files = {
        f"cifar-10-batches-bin/{name}.bin": b"".join(
            bytes([label]) + row.tobytes() for row, label in zip(data, labels, strict=True)
        )
        for name, (data, labels) in BATCHES.items()
    }
    return files | {"cifar-10-batches-bin/batches.meta.txt": "\n".join([*NAMES_10, ""]).encode()}


def check_10(source: Source) -> None:
    assert source.class_names == tuple(NAMES_10)
    assert source.labels.tolist() == [label for n in range(1, 6) for label in (n, 9, 0)]
    assert (source.key(0), source.key(7)) == ("data_batch_1 image 0", "data_batch_3 image 1")
    for index in (0, 7, 14):
        sample = source[index]
        image = Image.open(io.BytesIO(sample.data))
        assert (image.format, image.mode) == ("PNG", "RGB")
        expected = BATCHES[f"data_batch_{index // 3 + 1}"][0][index % 3].reshape(3, 32, 32).transpose(1, 2, 0)
        assert np.array_equal(np.asarray(image), expected)
        assert sample.label == source.labels[index]


@pytest.mark.parametrize("protocol", [2, 5])
def test_cifar10_python(tmp_path: Path, tar_of: TarOf, protocol: int) -> None:
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes(gzip.compress(tar_of(python_10(protocol)), 1))
    source = open_source("cifar10", str(archive), named("train"))
    check_10(pickle.loads(pickle.dumps(source)))
    val = open_source("cifar10", str(archive), SplitRequest("val"))
    assert (val.description.split, val.labels.tolist(), val.key(1)) == ("test", [7, 1], "test_batch image 1")


def test_cifar10_binary_has_the_same_pixels(tmp_path: Path, tar_of: TarOf) -> None:
    archive = tmp_path / "cifar-10-binary.tar.gz"
    archive.write_bytes(gzip.compress(tar_of(binary_10()), 1))
    binary = open_source("cifar10", str(archive), named("test"))
    unpacked = tmp_path / "folder"
    for name, data in python_10().items():
        (unpacked / name).parent.mkdir(parents=True, exist_ok=True)
        (unpacked / name).write_bytes(data)
    python = open_source("cifar10", str(unpacked / "cifar-10-batches-py"), named("test"))
    assert [binary[i].data for i in range(2)] == [python[i].data for i in range(2)]


@pytest.mark.parametrize("binary", [False, True])
def test_cifar100_has_fine_labels(tmp_path: Path, tar_of: TarOf, binary: bool) -> None:
    data, fine, coarse = planes(3, 1), [99, 0, 50], [1, 2, 3]
    if binary:
        rows = zip(coarse, fine, data, strict=True)
        files = {
            "cifar-100-binary/train.bin": b"".join(bytes([c, f]) + row.tobytes() for c, f, row in rows),
            "cifar-100-binary/fine_label_names.txt": "\n".join(NAMES_100).encode(),
        }
    else:
        batch = {"data": data, "fine_labels": fine, "coarse_labels": coarse}
        files = {
            "cifar-100-python/train": pickle.dumps(batch),
            "cifar-100-python/meta": pickle.dumps({"fine_label_names": NAMES_100}),
        }
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(tar_of(files), 1))
    source = open_source("cifar100", str(tmp_path / "a.tar.gz"), named("train"))
    assert (source.labels.tolist(), source.class_names) == (fine, tuple(NAMES_100))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(source[2].data))).transpose(2, 0, 1).ravel(), data[2])


class Hostile:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_no_code_of_a_pickle_is_run(tmp_path: Path, tar_of: TarOf, protocol: int) -> None:
    victim = tmp_path / "victim"
    files = python_10()
    for hostile in (Hostile(open, str(victim), "w"), Hostile(eval, f"open({str(victim)!r}, 'w')")):
        payload = pickle.dumps({"data": hostile, "labels": [1]}, protocol)
        (tmp_path / "a.tar.gz").write_bytes(
            gzip.compress(tar_of(files | {"cifar-10-batches-py/test_batch": payload}), 1)
        )
        with pytest.raises(
            UserError, match=r"test_batch: is not a pickle of plain data: it names \w+\.(open|eval), which"
        ):
            open_source("cifar10", str(tmp_path / "a.tar.gz"), named("test"))
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


def test_cifar_mistakes(tmp_path: Path, tar_of: TarOf) -> None:
    archive = tmp_path / "a.tar.gz"

    def refused(message: str, files: dict[str, bytes] | bytes, split: str = "test") -> None:
        archive.write_bytes(files if isinstance(files, bytes) else gzip.compress(tar_of(files), 1))
        with pytest.raises(UserError, match=message):
            open_source("cifar10", str(archive), named(split))

    whole = python_10()
    folder = "cifar-10-batches-py"
    refused("holds the splits train, test", whole, split="dev")
    refused(r"holds neither batches\.meta nor batches\.meta\.txt", {"a": b""})
    without = {name: data for name, data in whole.items() if not name.endswith("_3")}
    refused("holds no data_batch_3; download it again", without, split="train")
    refused("cannot be read|cut short|no end mark", gzip.compress(tar_of(whole), 1)[:-3000])
    refused("is cut short within", gzip.compress(tar_of(binary_10())[:-9000], 1))
    refused("is it a tar", b"anything at all" * 100)
    batch = {"data": planes(2, 1), "labels": [1, 10]}
    refused(
        r"test_batch: image 1: the label is 10, expected 0\.\.9", whole | {f"{folder}/test_batch": pickle.dumps(batch)}
    )
    batch = {"data": planes(2, 1), "labels": [1]}
    refused("1 labels and pixels of shape", whole | {f"{folder}/test_batch": pickle.dumps(batch)})
    refused("holds no data and labels", whole | {f"{folder}/test_batch": pickle.dumps({"x": 1})})
    refused("names 1 classes, expected 10", whole | {f"{folder}/batches.meta": pickle.dumps({"label_names": ["x"]})})
    refused("not a multiple of 3073", binary_10() | {"cifar-10-batches-bin/test_batch.bin": b"12"})
    with pytest.raises(UserError, match=r"none\.tar\.gz: does not exist"):
        open_source("cifar10", str(tmp_path / "none.tar.gz"), named("test"))
    with pytest.raises(UserError, match=r"holds neither batches\.meta nor"):
        open_source("cifar10", str(tmp_path), named("test"))


def test_cifar_files_that_contradict_one_another_are_refused(tmp_path: Path, tar_of: TarOf) -> None:
    archive = tmp_path / "a.tar"
    whole, folder = python_10(), "cifar-10-batches-py"

    def refused(message: str, batch: dict[str, Any] | None = None, meta: dict[str, Any] | None = None) -> None:
        files = whole | (
            {f"{folder}/test_batch": pickle.dumps({"data": planes(2, 1), "labels": [0, 1]} | batch)} if batch else {}
        )
        files |= {f"{folder}/batches.meta": pickle.dumps({"label_names": NAMES_10} | meta)} if meta else {}
        archive.write_bytes(tar_of(files))
        with pytest.raises(UserError, match=message) as told:
            open_source("cifar10", str(archive), named("test"))
        assert str(told.value).isprintable()

    for label, said in (
        (True, "a bool"),
        (1.0, "a float"),
        (10**30, "a number of more than 64 bits"),
        (-1, "-1"),
        (None, "a NoneType"),
    ):
        refused(f"test_batch: image 1: the label is {said}, expected 0..9", {"labels": [0, label]})
    refused("has 2 labels and 1 file names", {"filenames": ["x"]})
    refused("1 labels and pixels of shape", {"labels": [0]})
    refused("it holds a key twice", {"data": planes(2, 1), b"data": planes(2, 2)})
    refused("names 10 classes, expected 10, each once", meta={"label_names": ["x"] * 10})
    refused("names 0 classes", meta={"label_names": [*NAMES_10[:9], None]})
    refused("its names are no UTF-8", meta={"label_names": [*NAMES_10[:9], b"\xff"]})
    refused("test_batch has 2 images, 10,000 by batches.meta", meta={"num_cases_per_batch": 10_000})
    archive.write_bytes(tar_of(whole | {f"copy/{name.partition('/')[2]}": data for name, data in whole.items()}))
    with pytest.raises(UserError, match="holds test_batch twice"):
        open_source("cifar10", str(archive), named("test"))
    archive.write_bytes(tar_of(whole))
    note = "holds 2 of CIFAR-10's 10,000 images of test, 0 with label 0, where 1,000 were published"
    assert open_source("cifar10", str(archive), named("test")).notes == (note,)
    for name, data in whole.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    (tmp_path / folder / "test_batch").unlink()
    with pytest.raises(UserError, match=f"{folder}/test_batch: does not exist.*; download it again"):
        open_source("cifar10", str(tmp_path / folder), named("test"))


def test_small_pickles_and_archives_take_little_memory(
    tmp_path: Path, tar_of: TarOf, open_all_within: Callable[[int, list[tuple[str, str, dict[str, str]]]], list[str]]
) -> None:
    """What makes much of little: a step a byte, a place far away, one text encoded often, zeros without end."""
    text = b"X" + (1 << 20).to_bytes(4, "little") + b"x" * (1 << 20)
    copies = b"c_codecs\nencode\nq\x01" + text + b"q\x02X\x06\0\0\0latin1q\x03\x86q\x04"
    hostile = {
        "lists": b"(" + b"]" * (8 << 20) + b"l.",
        "memo": b"Nr\xff\xff\xff\x7f.",
        "copies": b"\x80\x02](" + copies + b"h\x01h\x04R" * 5000 + b"e.",
        "length": b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b".",
        "number": b"I" + b"9" * 10_000 + b"\n.",
        "nested": b"(" * 200_000 + b"t" * 200_000 + b".",
    }
    cases = []
    for name, payload in hostile.items():
        (tmp_path / name).write_bytes(
            gzip.compress(tar_of(python_10() | {"cifar-10-batches-py/test_batch": payload}), 1)
        )
        cases.append(("cifar10", str(tmp_path / name), {}))
    (tmp_path / "zeros").write_bytes(gzip.compress(bytes(80 << 20), 1))
    told = open_all_within(300, [*cases, ("cifar10", str(tmp_path / "zeros"), {})])
    expected = ("1,000,000 parts", "1,000,000 parts", "more data than it has", "pickle", "pickle", "pickle", "end mark")
    assert [part in line and line.startswith("refused") for part, line in zip(expected, told, strict=True)] == [
        True
    ] * 7


def test_an_archive_without_end_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.sources.datasets.cifar.MAX_UNPACKED_BYTES", 4 << 20)
    import tarfile

    info = tarfile.TarInfo("filler")
    info.size = 1 << 40
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(5 << 20), 1))
    with pytest.raises(UserError, match="unpacks to more than 4,194,304 bytes; expected cifar-10-python"):
        open_source("cifar10", str(tmp_path / "a.tar.gz"), named("test"))
