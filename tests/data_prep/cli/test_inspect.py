"""`data-prep inspect`: exact counts and statistics, and oddities by name."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from data_prep.cli.inspect import class_rows, show
from data_prep.converter.survey import Spread, Survey, survey
from data_prep.errors import UserError
from data_prep.sources import open_source
from data_prep.sources.splits import SplitRequest

Picture = Callable[..., Image.Image]
Encode = Callable[..., bytes]
ANY = SplitRequest(None, explicit=False)


@pytest.fixture
def odd_tree(image_tree: Path, picture: Picture, image_file: Encode) -> Path:
    """`cat`: two good JPEGs; `dog`: a gray PNG named .JPEG, a rotated JPEG, an empty file, text; `emu`: CMYK, a GIF."""
    rotation = Image.Exif()
    rotation[0x0112] = 6
    files = {
        "dog/0.JPEG": image_file(picture(10, 20).convert("L"), "PNG"),
        "dog/1.JPEG": image_file(picture(30, 50), exif=rotation),
        "dog/2.jpg": b"",
        "dog/3.jpg": b"this is no image",
        "dog/4.txt": b"left out",
        "emu/0.JPEG": image_file(picture(40, 40).convert("CMYK")),
        "emu/1.gif": image_file(picture(8, 8).convert("P"), "GIF"),
    }
    (image_tree / "emu/1.JPEG").unlink()
    for name, data in files.items():
        (image_tree / name).write_bytes(data)
    return image_tree


def look(tree: Path, headers: int = 500) -> Survey:
    return survey(open_source("image-folder", str(tree), ANY), headers, on_header=lambda *_: None)


def test_counts_and_statistics(odd_tree: Path) -> None:
    found = look(odd_tree)
    assert (found.num_samples, found.num_headers, found.class_counts) == (8, 8, (2, 4, 2))
    assert found.class_names == ("cat", "dog", "emu")
    sizes = sorted(p.stat().st_size for p in odd_tree.rglob("*.*") if p.suffix != ".txt")
    assert found.file_bytes == Spread(0, (sizes[3] + sizes[4]) / 2, sizes[7], round(sum(sizes) / 8, 1))
    assert found.file_bytes_of_all
    assert found.heights == Spread(8, 35.0, 48, round((48 + 48 + 10 + 30 + 40 + 8) / 6, 1))
    assert found.widths == Spread(8, 45.0, 64, round((64 + 64 + 20 + 50 + 40 + 8) / 6, 1))
    assert found.formats == {"JPEG": 4, "PNG": 1, "GIF": 1}
    assert found.modes == {"RGB": 3, "L": 1, "CMYK": 1, "P": 1}
    assert (found.num_passed_through, found.num_rotated) == (3, 1)
    assert [(h.key, h.label, h.height, h.width) for h in found.first[:3]] == [
        ("cat/0.JPEG", 0, 48, 64),
        ("cat/1.JPEG", 0, 48, 64),
        ("dog/0.JPEG", 1, 10, 20),
    ]


def test_odd_things_are_named(odd_tree: Path) -> None:
    assert look(odd_tree).findings == (
        "2 of 8 files read are no good: dog/2.jpg is empty; dog/3.jpg is no picture of "
        "a format that is read: JPEG, PNG, GIF, BMP, TIFF, WebP, PPM, JPEG 2000, AVIF",
        "1 files are empty: dog/2.jpg",
        "1 files are not of the kind they are named: dog/0.JPEG is PNG",
        "1 file skipped, not an image suffix (.txt 1): dog/4.txt",
    )


def test_numbers_and_classes_without_samples_are_found(
    tmp_path: Path, tar_of: Callable[[dict[str, bytes]], bytes]
) -> None:
    (tmp_path / "0.tar").write_bytes(
        tar_of({"a.jpg": b"1", "a.cls": b"2", "b.jpg": b"1", "b.cls": b"0", "c.txt": b"?"})
    )
    found = survey(open_source("webdataset", str(tmp_path), ANY), 5, on_header=lambda *_: None)
    assert found.findings[1:] == (
        "1 classes have no samples: 1",
        "classes are named by numbers, so their order cannot be verified: compare some images with their labels",
        "no sample has 1 of the labels 0..2, first 1",
        "1 file skipped, not an image by name: 0.tar/c.txt",
    )


def test_an_unreadable_sample_is_a_finding_and_headers_are_read_evenly(image_tree: Path) -> None:
    found = look(image_tree, headers=2)
    assert (found.num_headers, found.findings, sum(found.formats.values())) == (2, (), 2)
    assert found.file_bytes_of_all
    with (image_tree / "cat" / "2.jpg").open("wb") as file:
        file.truncate((256 << 20) + 1)  # a hole: no bytes on the disk
    source = open_source("image-folder", str(image_tree), ANY)
    found = survey(source, 10, on_header=lambda *_: None)
    assert found.findings == (
        "1 of 7 files read are no good: cat/2.jpg cannot be read: has 268,435,457 bytes; a single file of at most "
        "268,435,456 is read",
        "1 files are larger than 268,435,456 bytes: cat/2.jpg",
    )
    with pytest.raises(UserError, match="holds no samples"):
        survey(_Empty(source), 10, on_header=lambda *_: None)  # type: ignore[arg-type]


class _Empty:
    def __init__(self, source: object) -> None:
        self.description = source.description  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return 0


def test_what_is_shown(odd_tree: Path) -> None:
    text = io.StringIO()
    show(look(odd_tree), text)
    shown = text.getvalue()
    for line in (
        "formats        JPEG 4 (66.7%), PNG 1 (16.7%), GIF 1 (16.7%)",
        "stored as is   3 of 8 headers read are JPEGs that ffcv decodes",
        "classes        3, of 2 to 4 samples",
        "finding: 1 files are empty: dog/2.jpg",
    ):
        assert line in shown, shown


def test_many_classes_are_shown_by_their_ends() -> None:
    source = open_source("synthetic", "n=60,size=8,classes=30", ANY)
    rows = class_rows(survey(source, 1, on_header=lambda *_: None))
    assert [row[0] for row in rows] == [*"01234", "...", *(str(label) for label in range(25, 30))]
    assert rows[0] == ("0", "class-0", "2")


def test_the_command(data_prep: Callable[..., subprocess.CompletedProcess[str]], odd_tree: Path) -> None:
    command = ["inspect", "--source", "image-folder", "--input", str(odd_tree), "--json"]
    result = data_prep(*command)
    assert result.returncode == 0, result.stderr
    *shown, last = result.stdout.splitlines()
    report = json.loads(last)
    assert (report["ok"], report["num_samples"], report["class_counts"]) == (True, 8, [2, 4, 2])
    assert report["source"]["name"] == "image-folder"
    assert any(line.startswith("finding: ") for line in shown)
    assert sorted(p.name for p in odd_tree.parent.iterdir()) == [odd_tree.name]
    result = data_prep(*command, "--class-order", "x")
    assert (result.returncode, json.loads(result.stdout)["ok"]) == (2, False)
    assert "--class-order x: expected one of text, number" in result.stderr
