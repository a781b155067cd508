"""`data-prep show`, `list` and `extract` from the command line."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from PIL import Image
from pyarrow import parquet

EXPECTED = {"index": 3, "path": "dog/1.JPEG", "label": 1, "class": "dog", "width": 64, "height": 48, "kind": "jpeg"}


@pytest.fixture
def beton(tmp_path: Path, image_tree: Path, convert_here) -> Path:
    convert_here("image-folder", str(image_tree), tmp_path / "a.beton")
    return tmp_path / "a.beton"


def test_show_says_which_file_a_sample_is_and_writes_its_picture(
    data_prep, beton: Path, image_tree: Path, tmp_path: Path
) -> None:
    data = (image_tree / "dog" / "1.JPEG").read_bytes()
    shown = data_prep("show", beton, "3", "0", "--json")
    assert shown.returncode == 0, shown.stderr
    text = [
        f"sample 3: dog/1.JPEG (image-folder {image_tree} all)",
        "  label 1: dog",
        f"  64 x 48 px, jpeg, {len(data):,} bytes, the source's own bytes",
    ]
    assert shown.stdout.splitlines()[:3] == text
    first = json.loads(shown.stdout.splitlines()[-1])["samples"][0]
    assert (first["path"], first["class_name"], first["is_original"]) == ("dog/1.JPEG", "dog", True)

    assert data_prep("show", beton, "3", "--image", tmp_path / "a.jpg").returncode == 0
    assert (tmp_path / "a.jpg").read_bytes() == data
    assert data_prep("show", beton, "3", "--image", tmp_path / "a.png").returncode == 0
    with Image.open(tmp_path / "a.png") as written, Image.open(io.BytesIO(data)) as stored:
        assert (written.format, written.tobytes()) == ("PNG", stored.tobytes())


def test_show_of_pixels_and_of_a_beton_without_paths(data_prep, convert_here, tmp_path: Path) -> None:
    convert_here("synthetic", "n=3,size=16", tmp_path / "raw.beton", encode="raw")
    (tmp_path / "raw.paths.txt.gz").unlink()
    shown = data_prep("show", tmp_path / "raw.beton", "2")
    assert "sample 2: source path not known (synthetic" in shown.stdout
    assert "16 x 16 px, raw, 768 bytes, stored as pixels" in shown.stdout
    assert "raw.paths.txt.gz is missing; copy it" in shown.stdout
    refused = data_prep("show", tmp_path / "raw.beton", "2", "--image", tmp_path / "a.jpg")
    assert (refused.returncode, "name a .png" in refused.stderr) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["6"], "has the samples 0..5, asked for 6"),
        (["1", "2", "--image", "a.png"], "--image: give one sample"),
        (["1", "--image", "a.gif"], "expected a name that ends in .png or .jpg"),
    ],
)
def test_mistakes_end_with_one_line(data_prep, beton: Path, arguments: list[str], expected: str) -> None:
    done = data_prep("show", beton, *arguments)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert expected in done.stderr


def test_list_has_a_row_for_each_sample_in_every_format(data_prep, beton: Path, tmp_path: Path) -> None:
    printed = data_prep("list", beton)
    rows = list(csv.DictReader(io.StringIO(printed.stdout)))
    assert len(rows) == 6
    assert {name: rows[3][name] for name in EXPECTED} == {name: str(value) for name, value in EXPECTED.items()}
    assert data_prep("list", beton, "--output", tmp_path / "a.csv").returncode == 0
    assert (tmp_path / "a.csv").read_text() == printed.stdout
    done = data_prep("list", beton, "--output", tmp_path / "a.parquet", "--json")
    assert json.loads(done.stdout.splitlines()[-1])["num_samples"] == 6
    table = parquet.read_table(tmp_path / "a.parquet").to_pylist()
    assert {name: table[3][name] for name in EXPECTED} == EXPECTED
    assert [str(value) for value in table[5].values()] == list(rows[5].values())
    refused = data_prep("list", beton, "--output", tmp_path / "a.txt")
    assert "expected a name that ends in .parquet or .csv" in refused.stderr


def test_extract_says_what_it_wrote(data_prep, beton: Path, tmp_path: Path) -> None:
    done = data_prep("extract", beton, "--output", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    assert "6 images: 6 with the source's own bytes, 0 other JPEGs as stored, 0 PNGs" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["num_original"] == 6
