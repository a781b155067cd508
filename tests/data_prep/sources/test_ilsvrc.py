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
from scipy.io import savemat

from data_prep.errors import Fault
from data_prep.sources.base import Source
from data_prep.sources.splits import SplitRequest
from tests.data_prep.sources.opening import OpenAllWithin, TarOf, data_of, named, opened, refused

WNIDS = ("n01000001", "n02000002", "n03000003")
ID_OF = {"n03000003": 1, "n01000001": 2, "n02000002": 3}
"""ILSVRC2012_ID: an order of its own."""
VAL_IDS = [2, 1, 3, 1, 2]
"""Of validation images 1..5: labels 0, 2, 1, 2, 0."""
VAL_IN_ORDER = [1, 5, 3, 2, 4]
"""Their numbers, by class and then by name."""
TRAIN, VAL, KIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
IMAGES = "ILSVRC/Data/CLS-LOC"


def val_name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}.JPEG"


@pytest.fixture(scope="module")
def train_images(picture, image_file) -> dict[str, bytes]:
    """`<wnid>/<file>` -> JPEG, in the order of samples."""
    numbers = {"n01000001": (10, 9), "n02000002": (1,), "n03000003": (7, 70, 8)}
    return {
        f"{wnid}/{wnid}_{number}.JPEG": image_file(picture(seed=number), quality=80)
        for wnid in WNIDS
        for number in sorted(numbers[wnid], key=str)
    }


@pytest.fixture(scope="module")
def val_images(picture, image_file) -> dict[int, bytes]:
    return {number: image_file(picture(seed=100 + number), quality=80) for number in range(1, 6)}


def meta_mat() -> bytes:
    """As in the devkit: the leaves first, then synsets that have children and no images."""
    rows = [*((number, wnid, 0) for wnid, number in ID_OF.items()), (4, "n00000004", 2)]
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    synsets = np.array([(float(n), wnid, "a, b", float(k)) for n, wnid, k in sorted(rows)], dtype=fields)
    file = io.BytesIO()
    savemat(file, {"synsets": synsets.reshape(-1, 1)})
    return file.getvalue()


def devkit(tar_of: TarOf, *, ids: list[object] | None = None, meta: bytes | None = None) -> bytes:
    root = "ILSVRC2012_devkit_t12"
    files = {
        f"{root}/readme.txt": b"hello",
        f"{root}/data/meta.mat": meta_mat() if meta is None else meta,
        f"{root}/data/ILSVRC2012_validation_ground_truth.txt": "".join(f"{n}\n" for n in ids or VAL_IDS).encode(),
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
    (root / TRAIN).write_bytes(tar_of(tars))
    (root / VAL).write_bytes(tar_of({val_name(n): val_images[n] for n in (3, 1, 2, 5, 4)}))
    (root / KIT).write_bytes(devkit(tar_of))
    return root


@pytest.fixture
def kaggle(tmp_path: Path, train_images: dict[str, bytes], val_images: dict[int, bytes]) -> Path:
    root = tmp_path / "kaggle"
    images = root / IMAGES
    for name, data in train_images.items():
        (images / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (images / "train" / name).write_bytes(data)
    (images / "val").mkdir()
    (images / "test").mkdir()
    wnid_of = {number: wnid for wnid, number in ID_OF.items()}
    lines = []
    for number, data in val_images.items():
        (images / "val" / val_name(number)).write_bytes(data)
        wnid = wnid_of[VAL_IDS[number - 1]]
        lines.append(f"{val_name(number).removesuffix('.JPEG')},{wnid} 1 2 3 4 {wnid} 5 6 7 8 ")
    (root / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *reversed(lines), ""]))
    (root / "LOC_synset_mapping.txt").write_text("".join(f"{wnid} some words, {wnid}\n" for wnid in WNIDS))
    return root


def check_train(source: Source, train_images: dict[str, bytes]) -> None:
    assert source.class_names == WNIDS
    assert source.description.label_map == {"n01000001": 0, "n02000002": 1, "n03000003": 2}
    assert data_of(source) == list(train_images.values())
    assert source.labels.tolist() == [0, 0, 1, 2, 2, 2] == [source[i].label for i in range(6)]
    assert source[4].data == list(train_images.values())[4]  # at random


def check_val(source: Source, val_images: dict[int, bytes]) -> None:
    assert source.class_names == WNIDS
    assert data_of(source) == [val_images[number] for number in VAL_IN_ORDER]
    assert source.labels.tolist() == [0, 0, 1, 2, 2]
    assert all(source.key(i).endswith(val_name(number)) for i, number in enumerate(VAL_IN_ORDER))


# --- reading ----------------------------------------------------------------------------------------------------------


def test_ilsvrc_train_is_read_in_place(archives: Path, train_images: dict[str, bytes]) -> None:
    source = pickle.loads(pickle.dumps(opened("ilsvrc", archives, named("train"))))
    check_train(source, train_images)
    assert source.key(2) == f"{TRAIN}/n02000002.tar/n02000002_1.JPEG" == source[2].key
    assert source.sizes.tolist() == [len(data) for data in train_images.values()]
    (archives / KIT).unlink()
    check_train(opened("ilsvrc", archives / TRAIN, SplitRequest("train")), train_images)


def test_ilsvrc_val_has_the_devkits_labels(archives: Path, val_images: dict[int, bytes], tmp_path: Path) -> None:
    source = opened("ilsvrc", archives, SplitRequest("val"))
    check_val(pickle.loads(pickle.dumps(source)), val_images)
    assert source.key(1) == f"{VAL}/{val_name(5)}"
    shutil.unpack_archive(archives / KIT, tmp_path / "kit", filter="data")
    (archives / KIT).unlink()
    val = archives / VAL
    refused(rf"its labels are in {KIT}; put that beside, or name", "ilsvrc", val, named("val"))
    kit = tmp_path / "kit/ILSVRC2012_devkit_t12"
    check_val(opened("ilsvrc", val, named("val"), devkit=kit), val_images)


def test_kaggles_layout(kaggle: Path, train_images: dict[str, bytes], val_images: dict[int, bytes]) -> None:
    check_train(pickle.loads(pickle.dumps(opened("kaggle", kaggle, named("train")))), train_images)
    for name in ("LOC_val_solution.csv", "LOC_synset_mapping.txt"):  # with the line ends of another editor
        (kaggle / name).write_text((kaggle / name).read_text().replace("\n", "\r\n") + "\r\n\r\n")
    (kaggle / IMAGES / "val/notes.txt").touch()
    val = opened("kaggle", kaggle, named("val"))
    check_val(val, val_images)
    assert val.notes == ("1 file skipped, not an image suffix (.txt 1): notes.txt",)


@pytest.mark.parametrize("check", ["decode", "headers"])
def test_every_layout_gives_the_same_beton(
    check: str, archives: Path, kaggle: Path, tmp_path: Path, convert_here: Callable[..., object]
) -> None:
    folders = tmp_path / "folders"
    shutil.copytree(kaggle / IMAGES / "train", folders / "train")
    for label, numbers in enumerate(([1, 5], [3], [2, 4])):
        (folders / "val" / WNIDS[label]).mkdir(parents=True)
        for number in numbers:
            shutil.copy(kaggle / IMAGES / "val" / val_name(number), folders / "val" / WNIDS[label])
    for split in ("train", "val"):
        made = set()
        for source, location in (("ilsvrc", archives), ("kaggle", kaggle), ("image-folder", folders)):
            output = tmp_path / source / f"{split}.beton"
            manifest = convert_here(source, str(location), output, check=check).manifest  # type: ignore[attr-defined]
            assert manifest.source["label_map"] == {wnid: label for label, wnid in enumerate(WNIDS)}
            made.add((manifest.digest, output.read_bytes()))
        assert len(made) == 1


def test_a_pickled_archive_is_read_by_another_process(archives: Path, train_images: dict[str, bytes]) -> None:
    source = opened("ilsvrc", archives, named("train"))
    assert source[0].data  # an open file must not travel
    script = "import pickle, sys; s = pickle.load(sys.stdin.buffer); sys.stdout.buffer.write(s[5].data)"
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, input=pickle.dumps(source), capture_output=True, timeout=60, check=True)
    assert result.stdout == train_images["n03000003/n03000003_8.JPEG"]


def test_an_archive_that_changes_is_not_read_on(archives: Path) -> None:
    packed = pickle.dumps(opened("ilsvrc", archives, named("val")))
    (archives / VAL).write_bytes((archives / VAL).read_bytes())  # the same bytes, another time
    with pytest.raises(Fault, match=r"img_val\.tar: changed while it was being read"):
        pickle.loads(packed)[0]


def test_partial_archives_are_noted(archives: Path, tar_of: TarOf, val_images: dict[int, bytes]) -> None:
    (archives / VAL).write_bytes(tar_of({val_name(2): val_images[2], "odd/readme": b""}))
    described = opened("ilsvrc", archives, named("val")).description
    assert described.label_checks == ["holds 1 of the 5 images that the devkit knows"]
    assert (described.num_left_out, described.left_out) == (1, ["odd/readme"])
    (archives / TRAIN).write_bytes(tar_of({"n02000002.tar": tar_of({"a.JPEG": b"1"})}))
    train = opened("ilsvrc", archives, named("train"))
    assert (train.class_names, train.labels.tolist()) == (WNIDS, [1])
    assert train.description.label_checks == ["2 classes have no images, first n01000001"]


# --- what is refused --------------------------------------------------------------------------------------------------


def test_other_inputs_are_refused(archives: Path, tar_of: TarOf, tmp_path: Path) -> None:
    (tmp_path / "test.tar").write_bytes(tar_of({"ILSVRC2012_test_00000001.JPEG": b"1"}))
    for location, message in [
        (tmp_path, "holds none of ILSVRC2012_img_train.tar"),
        (tmp_path / "none", "does not exist; expected the folder"),
        (archives / KIT, r"devkit_t12\.tar\.gz: begins with .*readme\.txt|cannot|damaged"),
        (tmp_path / "test.tar", "the test images' labels were never published"),
    ]:
        refused(message, "ilsvrc", location, named("val"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"n02000002.tar": {"../a.JPEG": b"1"}}, r"train\.tar: n02000002\.tar: \.\./a\.JPEG is a name that leads out"),
        ({"n09999999.tar": {"a.JPEG": b"1"}}, r"n09999999\.tar is not a class of the devkit"),
        ({"n01000001.tar": {}, "copy/n01000001.tar": {}}, r"img_train\.tar: holds n01000001\.tar twice"),
        ({"n01000001.tar": {"a.JPEG": b"1", "./a.JPEG": b"2"}}, r"n01000001\.tar: holds a\.JPEG twice"),
    ],
)
def test_odd_training_archives_are_refused(
    files: dict[str, dict[str, bytes]], message: str, archives: Path, tar_of: TarOf
) -> None:
    (archives / TRAIN).write_bytes(tar_of({name: tar_of(inner) for name, inner in files.items()}))
    refused(message, "ilsvrc", archives, named("train"))


def test_damaged_archives_are_refused(archives: Path, tar_of: TarOf, val_images: dict[int, bytes]) -> None:
    one = tar_of({"a.JPEG": b"1"})
    for inner, message in ((one[:600], "is cut short"), (one + one, "has data after its end mark")):
        (archives / TRAIN).write_bytes(tar_of({"n02000002.tar": inner}))
        refused(rf"train\.tar: n02000002\.tar: {message}", "ilsvrc", archives, named("train"))
    names = {val_name(n): val_images[n] for n in range(1, 6)}
    (archives / VAL).write_bytes(tar_of({**names, f"again/{val_name(3)}": val_images[3]}))
    message = r"img_val\.tar: holds ILSVRC2012_val_00000003 twice; download it again"
    refused(message, "ilsvrc", archives, named("val"))


NO_IDS = "expected one ILSVRC2012_ID a line, found (other text|17)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": [2, 1]}, r"ILSVRC2012_val_00000003\.JPEG: the devkit knows the images 1\.\.2"),
        ({"meta": b"MATLAB of no kind"}, r"data/meta\.mat: cannot be read"),
        *(({"ids": [*VAL_IDS[:-1], line]}, NO_IDS) for line in ("9" * 5000, "1.0", "four", "-1", "17")),
    ],
)
def test_odd_devkits_are_refused(change: dict[str, object], message: str, archives: Path, tar_of: TarOf) -> None:
    (archives / KIT).write_bytes(devkit(tar_of, **change))  # type: ignore[arg-type]
    refused(message, "ilsvrc", archives, named("val"))


def test_devkits_are_bounded(tmp_path: Path, tar_of: TarOf, open_all_within: OpenAllWithin, archives: Path) -> None:
    """A file within that unpacks to a thousand times its size, and one that is there twice."""
    packed = zlib.compress(bytes(100 << 20), 1)
    bomb = b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM" + struct.pack("<II", 15, len(packed)) + packed
    twice = gzip.compress(tar_of({"a/data/meta.mat": b"1", "b/data/meta.mat": b"2"}))
    cases = {
        "mat": (devkit(tar_of, meta=bomb), "meta.mat: cannot be read .*unpacks to more than 67,108,864"),
        "gzip": (gzip.compress(bytes(100 << 20), 1), "unpacks to more"),
        "cut": (devkit(tar_of)[:-200], "cannot be unpacked"),
        "twice": (twice, "holds data/meta.mat twice"),
    }
    for name, (data, _) in cases.items():
        (tmp_path / name).write_bytes(data)
    val = str(archives / VAL)
    outcomes = open_all_within(250, [("ilsvrc", val, {"devkit": str(tmp_path / name)}) for name in cases])
    for outcome, (_, message) in zip(outcomes, cases.values(), strict=True):
        assert re.search(message, outcome), outcome


def test_kaggle_mistakes(kaggle: Path) -> None:
    images = kaggle / IMAGES
    refused(f"holds no {IMAGES}", "kaggle", images, named("val"))
    refused("labels of the test images were never published", "kaggle", kaggle, named("test"))
    (images / "val" / val_name(4)).rename(images / "val" / val_name(6))
    refused(r"val_00000006\.JPEG: .*LOC_val_solution\.csv has no line for it", "kaggle", kaggle, named("val"))
    (images / "val" / val_name(6)).unlink()
    message = r"1 images that LOC_val_solution\.csv names are missing, first ILSVRC2012_val_00000004"
    refused(message, "kaggle", kaggle, named("val"))
    for path in (images / "train/n02000002").iterdir():
        path.rename(path.with_suffix(".heic"))
    message = r"n02000002: this class folder holds no images but .*\.heic are not read.*incomplete"
    refused(message, "kaggle", kaggle, named("train"))
    (images / "train/n01000001").rename(images / "train/n01000009")
    refused(r"n01000001 has no folder but is in LOC_synset_mapping\.txt", "kaggle", kaggle, named("train"))
    (kaggle / "LOC_synset_mapping.txt").write_text("n02000002 b\nn01000001 a\n")
    refused("the wnids should ascend", "kaggle", kaggle, named("val"))
    (kaggle / "LOC_synset_mapping.txt").unlink()
    refused(r"LOC_synset_mapping\.txt: does not exist, or is not a file", "kaggle", kaggle, named("train"))
