"""`python -m resnet_dist.fuzz.ffcv_pixels` distinguishes right pixels from wrong ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.pixels import PictureSettings
from resnet_dist.fuzz.ffcv_pixels import as_table, pillow_pixels


def test_pillow_pixels_are_the_files(picture, image_file) -> None:
    image = picture(20, 31)
    assert (pillow_pixels(image_file(image, "PNG"), None, PictureSettings()) == image).all()
    assert pillow_pixels(image_file(image, "PNG"), 15, PictureSettings()).shape == (10, 15, 3)


def test_table() -> None:
    table = as_table({"own bytes": [(1.0, 3), (2.0, 7)]})
    assert table.splitlines()[-1] == "| own bytes | 2 | 1.500 | 2.000 | 7 |"


@pytest.mark.slow  # ffcv compiles for 10 s
@pytest.mark.parametrize("encode", ["original", "raw"])
def test_stock_loader_against_the_source(encode: str, picture, image_file, convert_here, tmp_path: Path) -> None:
    tree, other = tmp_path / "tree", tmp_path / "other"
    for number, side in enumerate((40, 64, 200)):
        for root, seed in ((tree, number), (other, number + 1)):
            (root / f"c{number}").mkdir(parents=True)
            file = root / f"c{number}" / "a.JPEG"
            file.write_bytes(image_file(picture(side, side + 9, seed=seed), quality=92))
    beton = tmp_path / "all.beton"
    convert_here("image-folder", str(tree), beton, encode=encode, max_side=100)

    right, wrong = (_compare(beton, root) for root in (tree, other))

    assert (right.returncode, right.stderr) == (0, "")
    assert wrong.returncode == 1
    assert [line.split(":")[0] for line in wrong.stderr.splitlines()] == ["c0/a.JPEG", "c1/a.JPEG", "c2/a.JPEG"]


def _compare(beton: Path, tree: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "resnet_dist.fuzz.ffcv_pixels",
        str(beton),
        "--source",
        "image-folder",
        "--input",
        str(tree),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)
