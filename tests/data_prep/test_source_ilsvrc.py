"""The official archives and Kaggle's layout, as tiny copies, give the images and labels of folders per class."""

from __future__ import annotations

import gzip
import io
import pickle
import re
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.errors import Fault, UserError
from data_prep.sources import SourceOptions, open_source
from data_prep.sources.base import Source
from data_prep.sources.splits import SplitRequest

TarOf = Callable[[dict[str, bytes]], bytes]
OpenAllWithin = Callable[[int, list[tuple[str, str, dict[str, str]]]], list[str]]
Picture = Callable[..., Image.Image]
Encode = Callable[..., bytes]

WNIDS = ("n01000001", "n02000002", "n03000003")
ID_OF = {"n03000003": 1, "n01000001": 2, "n02000002": 3}
"""ILSVRC2012_ID: an order of its own."""
VAL_IDS = [2, 1, 3, 1, 2]
"""Of validation images 1..5: labels 0, 2, 1, 2, 0."""
VAL_IN_ORDER = [1, 5, 3, 2, 4]
"""Their numbers, by class and then by name."""


def named(split: str) -> SplitRequest:
    return SplitRequest(split, explicit=True)


def val_name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}.JPEG"


@pytest.fixture(scope="module")
def train_images(picture: Picture, image_file: Encode) -> dict[str, bytes]:
    """`<wnid>/<file>` -> JPEG, in the order of samples."""
    numbers = {"n01000001": (10, 9), "n02000002": (1,), "n03000003": (7, 70, 8)}
    return {
        f"{wnid}/{wnid}_{number}.JPEG": image_file(picture(seed=number), quality=80)
        for wnid in WNIDS
        for number in sorted(numbers[wnid], key=str)
    }


@pytest.fixture(scope="module")
def val_images(picture: Picture, image_file: Encode) -> dict[int, bytes]:
    return {number: image_file(picture(seed=100 + number), quality=80) for number in range(1, 6)}


def meta_mat() -> bytes:
    """As in the devkit: the leaves first, then synsets that have children and no images."""
    from scipy.io import savemat

    rows = [*((number, wnid, 0) for wnid, number in ID_OF.items()), (4, "n00000004", 2)]
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    synsets = np.array([(float(n), wnid, "a, b", float(k)) for n, wnid, k in sorted(rows)], dtype=fields)
    file = io.BytesIO()
    savemat(file, {"synsets": synsets.reshape(-1, 1)})
    return file.getvalue()


def devkit(tar_of: TarOf, *, ids: list[int] | None = None, meta: bytes | None = None) -> bytes:
    root = "ILSVRC2012_devkit_t12"
    files = {
        f"{root}/readme.txt": b"hello",
        f"{root}/data/meta.mat": meta_mat() if meta is None else meta,
        f"{root}/data/ILSVRC2012_validation_ground_truth.txt": "".join(
            f"{number}\n" for number in (VAL_IDS if ids is None else ids)
        ).encode(),
    }
    return gzip.compress(tar_of(files), 1)


@pytest.fixture
def archives(tmp_path: Path, tar_of: TarOf, train_images: dict[str, bytes], val_images: dict[int, bytes]) -> Path:
    root = tmp_path / "archives"
    root.mkdir()
    by_class = {
        wnid: {name.partition("/")[2]: data for name, data in train_images.items() if name.startswith(wnid)}
        for wnid in ("n02000002", "n03000003", "n01000001")
    }
    tars = {f"{wnid}.tar": tar_of(dict(reversed(files.items()))) for wnid, files in by_class.items()}
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar_of(tars))
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar_of({val_name(n): val_images[n] for n in (3, 1, 2, 5, 4)}))
    (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(devkit(tar_of))
    return root


@pytest.fixture
def kaggle(tmp_path: Path, train_images: dict[str, bytes], val_images: dict[int, bytes]) -> Path:
    root = tmp_path / "kaggle"
    images = root / "ILSVRC/Data/CLS-LOC"
    for name, data in train_images.items():
        (images / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (images / "train" / name).write_bytes(data)
    (images / "val").mkdir()
    (images / "test").mkdir()
    wnid_of = {number: wnid for wnid, number in ID_OF.items()}
    lines = ["ImageId,PredictionString"]
    for number, data in val_images.items():
        (images / "val" / val_name(number)).write_bytes(data)
        wnid = wnid_of[VAL_IDS[number - 1]]
        lines.append(f"{val_name(number).removesuffix('.JPEG')},{wnid} 1 2 3 4 {wnid} 5 6 7 8 ")
    (root / "LOC_val_solution.csv").write_text("\n".join(reversed(lines[1:])).join([lines[0] + "\n", "\n"]))
    (root / "LOC_synset_mapping.txt").write_text("".join(f"{wnid} some words, {wnid}\n" for wnid in WNIDS))
    return root


def check_train(source: Source, train_images: dict[str, bytes]) -> None:
    assert source.class_names == WNIDS
    assert source.description.label_map == {"n01000001": 0, "n02000002": 1, "n03000003": 2}
    assert [source[i].data for i in range(len(source))] == list(train_images.values())
    assert source.labels.tolist() == [0, 0, 1, 2, 2, 2] == [source[i].label for i in range(6)]
    assert source[4].data == list(train_images.values())[4]  # at random


def check_val(source: Source, val_images: dict[int, bytes]) -> None:
    assert source.class_names == WNIDS
    assert [source[i].data for i in range(len(source))] == [val_images[number] for number in VAL_IN_ORDER]
    assert source.labels.tolist() == [0, 0, 1, 2, 2]
    assert all(source.key(i).endswith(val_name(number)) for i, number in enumerate(VAL_IN_ORDER))


def test_ilsvrc_train_is_read_in_place(archives: Path, train_images: dict[str, bytes]) -> None:
    source = pickle.loads(pickle.dumps(open_source("ilsvrc", str(archives), named("train"))))
    check_train(source, train_images)
    assert source.key(2) == "ILSVRC2012_img_train.tar/n02000002.tar/n02000002_1.JPEG" == source[2].key
    assert source.sizes.tolist() == [len(data) for data in train_images.values()]
    alone = archives / "ILSVRC2012_img_train.tar"
    (archives / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    check_train(open_source("ilsvrc", str(alone), SplitRequest("train")), train_images)


def test_ilsvrc_val_has_the_devkits_labels(archives: Path, val_images: dict[int, bytes], tmp_path: Path) -> None:
    source = open_source("ilsvrc", str(archives), SplitRequest("val"))
    check_val(pickle.loads(pickle.dumps(source)), val_images)
    assert source.key(1) == "ILSVRC2012_img_val.tar/ILSVRC2012_val_00000005.JPEG"
    elsewhere = tmp_path / "kit"
    shutil.unpack_archive(archives / "ILSVRC2012_devkit_t12.tar.gz", elsewhere, filter="data")
    (archives / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    val = archives / "ILSVRC2012_img_val.tar"
    with pytest.raises(UserError, match=r"its labels are in ILSVRC2012_devkit_t12\.tar\.gz; put that beside, or name"):
        open_source("ilsvrc", str(val), named("val"))
    kit = SourceOptions(devkit=str(elsewhere / "ILSVRC2012_devkit_t12"))
    check_val(open_source("ilsvrc", str(val), named("val"), kit), val_images)


def test_kaggles_layout(kaggle: Path, train_images: dict[str, bytes], val_images: dict[int, bytes]) -> None:
    check_train(pickle.loads(pickle.dumps(open_source("kaggle", str(kaggle), named("train")))), train_images)
    check_val(open_source("kaggle", str(kaggle), named("val")), val_images)
    with pytest.raises(UserError, match="labels of the test images were never published"):
        open_source("kaggle", str(kaggle), named("test"))


@pytest.mark.parametrize("check", ["decode", "headers"])
def test_every_layout_gives_the_same_beton(
    check: str, archives: Path, kaggle: Path, tmp_path: Path, convert_here: Callable[..., object]
) -> None:
    folders = tmp_path / "folders"
    shutil.copytree(kaggle / "ILSVRC/Data/CLS-LOC/train", folders / "train")
    for label, numbers in enumerate(([1, 5], [3], [2, 4])):
        (folders / "val" / WNIDS[label]).mkdir(parents=True)
        for number in numbers:
            shutil.copy(kaggle / "ILSVRC/Data/CLS-LOC/val" / val_name(number), folders / "val" / WNIDS[label])
    for split in ("train", "val"):
        made = {}
        for source, location in (("ilsvrc", archives), ("kaggle", kaggle), ("image-folder", folders)):
            output = tmp_path / source / f"{split}.beton"
            manifest = convert_here(source, str(location), output, check=check).manifest  # type: ignore[attr-defined]
            assert manifest.source["label_map"] == {wnid: label for label, wnid in enumerate(WNIDS)}
            made[source] = (manifest.digest, manifest.source["identity"], output.read_bytes())
        assert made["ilsvrc"][0] == made["kaggle"][0] == made["image-folder"][0]
        assert made["ilsvrc"][2] == made["kaggle"][2] == made["image-folder"][2]


def test_a_pickled_archive_is_read_by_another_process(archives: Path, train_images: dict[str, bytes]) -> None:
    source = open_source("ilsvrc", str(archives), named("train"))
    assert source[0].data  # an open file must not travel
    script = "import pickle, sys; s = pickle.load(sys.stdin.buffer); sys.stdout.buffer.write(s[5].data)"
    result = subprocess.run(
        [sys.executable, "-c", script], input=pickle.dumps(source), capture_output=True, timeout=60, check=True
    )
    assert result.stdout == train_images["n03000003/n03000003_8.JPEG"]


def test_an_archive_that_changes_is_not_read_on(archives: Path) -> None:
    packed = pickle.dumps(open_source("ilsvrc", str(archives), named("val")))
    val = archives / "ILSVRC2012_img_val.tar"
    val.write_bytes(val.read_bytes())  # the same bytes, another time
    with pytest.raises(Fault, match=r"img_val\.tar: changed while it was being read"):
        pickle.loads(packed)[0]


def test_partial_archives_are_noted(archives: Path, tar_of: TarOf, val_images: dict[int, bytes]) -> None:
    (archives / "ILSVRC2012_img_val.tar").write_bytes(tar_of({val_name(2): val_images[2], "readme": b""}))
    described = open_source("ilsvrc", str(archives), named("val")).description
    assert described.label_checks == ["holds 1 of the 5 images that the devkit knows"]
    assert described.num_left_out == 1
    (archives / "ILSVRC2012_img_train.tar").write_bytes(tar_of({"n02000002.tar": tar_of({"a.JPEG": b"1"})}))
    train = open_source("ilsvrc", str(archives), named("train"))
    assert (train.class_names, train.labels.tolist()) == (WNIDS, [1])
    assert train.description.label_checks == ["2 classes have no images, first n01000001"]


def test_ilsvrc_mistakes(archives: Path, tar_of: TarOf, tmp_path: Path) -> None:
    def refused(message: str, location: Path = archives, split: str = "val") -> None:
        with pytest.raises(UserError, match=message):
            open_source("ilsvrc", str(location), named(split))

    kit = archives / "ILSVRC2012_devkit_t12.tar.gz"
    refused("holds none of ILSVRC2012_img_train.tar", tmp_path)
    refused("does not exist; expected the folder", tmp_path / "none")
    refused(r"devkit_t12\.tar\.gz: begins with .*readme\.txt|cannot|damaged", kit)
    (tmp_path / "test.tar").write_bytes(tar_of({"ILSVRC2012_test_00000001.JPEG": b"1"}))
    refused("the test images' labels were never published", tmp_path / "test.tar")
    whole = kit.read_bytes()
    kit.write_bytes(whole[:-200])
    refused(r"devkit_t12\.tar\.gz: cannot be unpacked")
    kit.write_bytes(devkit(tar_of, ids=[2, 1]))
    refused(r"ILSVRC2012_val_00000003\.JPEG: the devkit knows the images 1\.\.2")
    kit.write_bytes(devkit(tar_of, meta=b"MATLAB of no kind"))
    refused(r"data/meta\.mat: cannot be read")
    kit.write_bytes(devkit(tar_of))
    train = archives / "ILSVRC2012_img_train.tar"
    train.write_bytes(tar_of({"n02000002.tar": tar_of({"../a.JPEG": b"1"})}))
    refused(r"train\.tar: n02000002\.tar: \.\./a\.JPEG is a name that leads out", split="train")
    train.write_bytes(tar_of({"n02000002.tar": tar_of({"a.JPEG": b"1"})[:600]}))
    refused(r"train\.tar: n02000002\.tar: is cut short", split="train")
    train.write_bytes(tar_of({"n09999999.tar": tar_of({"a.JPEG": b"1"})}))
    refused(r"n09999999\.tar is not a class of the devkit", split="train")


@pytest.mark.parametrize("line", ["9" * 5000, "1.0", "four", "-1", "17"])
def test_a_devkit_with_other_ids_is_refused(line: str, archives: Path, tar_of: TarOf) -> None:
    kit = devkit(tar_of, ids=[*VAL_IDS[:-1], line])  # type: ignore[list-item]
    (archives / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(kit)
    with pytest.raises(UserError, match=r"expected one ILSVRC2012_ID a line, found (other text|17)"):
        open_source("ilsvrc", str(archives), named("val"))


def test_kaggles_tables_end_as_editors_end_them_and_classes_have_images(kaggle: Path) -> None:
    images = kaggle / "ILSVRC/Data/CLS-LOC"
    for name in ("LOC_val_solution.csv", "LOC_synset_mapping.txt"):
        (kaggle / name).write_text((kaggle / name).read_text().replace("\n", "\r\n") + "\r\n\r\n")
    assert len(open_source("kaggle", str(kaggle), named("val"))) == 5
    for path in (images / "train" / "n02000002").iterdir():
        path.rename(path.with_suffix(".heic"))
    with pytest.raises(
        UserError, match=r"n02000002: this class folder holds no images but .*\.heic are not read.*incomplete"
    ):
        open_source("kaggle", str(kaggle), named("train"))


def test_kaggle_mistakes(kaggle: Path) -> None:
    images = kaggle / "ILSVRC/Data/CLS-LOC"

    def refused(message: str, split: str = "val") -> None:
        with pytest.raises(UserError, match=message):
            open_source("kaggle", str(kaggle), named(split))

    with pytest.raises(UserError, match="holds no ILSVRC/Data/CLS-LOC"):
        open_source("kaggle", str(images), named("val"))
    (images / "val" / val_name(4)).rename(images / "val" / val_name(6))
    refused(r"val_00000006\.JPEG: .*LOC_val_solution\.csv has no line for it")
    (images / "val" / val_name(6)).unlink()
    refused(r"1 images that LOC_val_solution\.csv names are missing, first ILSVRC2012_val_00000004")
    (images / "train" / "n01000001").rename(images / "train" / "n01000009")
    refused(r"n01000001 has no folder but is in LOC_synset_mapping\.txt", "train")
    (kaggle / "LOC_synset_mapping.txt").write_text("n02000002 b\nn01000001 a\n")
    refused("the wnids should ascend")
    (kaggle / "LOC_synset_mapping.txt").unlink()
    refused(r"LOC_synset_mapping\.txt: does not exist, or is not a file", "train")


def test_an_image_that_is_there_twice_is_refused(archives: Path, tar_of: TarOf, val_images: dict[int, bytes]) -> None:
    train, val = archives / "ILSVRC2012_img_train.tar", archives / "ILSVRC2012_img_val.tar"
    names = {val_name(n): val_images[n] for n in range(1, 6)}
    val.write_bytes(tar_of({**names, f"again/{val_name(3)}": val_images[3], "odd/notes.txt": b"?"}))
    with pytest.raises(UserError, match=r"img_val\.tar: holds ILSVRC2012_val_00000003 twice; download it again"):
        open_source("ilsvrc", str(archives), named("val"))
    val.write_bytes(tar_of({**names, "odd/notes.txt": b"?"}))
    described = open_source("ilsvrc", str(archives), named("val")).description
    assert (described.num_left_out, described.left_out) == (1, ["odd/notes.txt"])
    one = tar_of({"n01000001_1.JPEG": b"1"})
    train.write_bytes(tar_of({"n01000001.tar": one, "copy/n01000001.tar": one}))
    with pytest.raises(UserError, match=r"img_train\.tar: holds n01000001\.tar twice"):
        open_source("ilsvrc", str(archives), named("train"))
    train.write_bytes(tar_of({"n01000001.tar": tar_of({"a.JPEG": b"1", "./a.JPEG": b"2"})}))
    with pytest.raises(UserError, match=r"n01000001\.tar: holds a\.JPEG twice"):
        open_source("ilsvrc", str(archives), named("train"))
    train.write_bytes(tar_of({"n01000001.tar": one + one}))
    with pytest.raises(UserError, match=r"n01000001\.tar: has data after its end mark"):
        open_source("ilsvrc", str(archives), named("train"))


def test_devkits_are_bounded(tmp_path: Path, tar_of: TarOf, open_all_within: OpenAllWithin, archives: Path) -> None:
    """A file within that unpacks to a thousand times its size, and one that is there twice."""
    packed = zlib.compress(bytes(100 << 20), 1)
    bomb = b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM" + struct.pack("<II", 15, len(packed)) + packed
    cases = {
        "mat": devkit(tar_of, meta=bomb),
        "gzip": gzip.compress(bytes(100 << 20), 1),
        "numbers": gzip.compress(
            tar_of({"data/meta.mat": meta_mat(), "data/ILSVRC2012_validation_ground_truth.txt": b"9" * 5000})
        ),
        "twice": gzip.compress(tar_of({"a/data/meta.mat": b"1", "b/data/meta.mat": b"2"})),
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
    told = open_all_within(
        250, [("ilsvrc", str(archives / "ILSVRC2012_img_val.tar"), {"devkit": str(tmp_path / name)}) for name in cases]
    )
    for text, expected in zip(
        told,
        (
            "meta.mat: cannot be read .*unpacks to more than 67,108,864",
            "unpacks to more",
            "found other text",
            "holds data/meta.mat twice",
        ),
        strict=True,
    ):
        assert re.search(expected, text), text
