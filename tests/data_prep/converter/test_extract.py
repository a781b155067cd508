"""`extract` writes a beton back into class folders that convert to the same beton, and never leaves half a folder."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.beton.edit import Selection, subset
from data_prep.beton.manifest import load_manifest, write_manifest
from data_prep.beton.paths import pack_paths
from data_prep.converter.extract import extract, folder_names
from data_prep.errors import Fault, UserError


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_sources_files_come_back_and_convert_to_the_same_beton(
    tmp_path: Path, image_tree: Path, convert_here
) -> None:
    (image_tree / "cat" / "deep" / "er").mkdir(parents=True)
    (image_tree / "cat" / "1.JPEG").rename(image_tree / "cat" / "deep" / "er" / "wrong.png")
    made = convert_here("image-folder", str(image_tree), tmp_path / "a.beton").manifest
    report = extract(tmp_path / "a.beton", tmp_path / "out")
    assert (report.num_original, report.num_jpeg, report.num_png) == (6, 0, 0)
    assert (report.renamed, report.is_sorted) == ({}, True)
    assert files_in(tmp_path / "out") == files_in(image_tree)
    assert convert_here("image-folder", str(tmp_path / "out"), tmp_path / "b.beton").manifest.digest == made.digest


def test_shrunk_jpegs_convert_to_the_same_beton_again(tmp_path: Path, image_tree: Path, convert_here) -> None:
    made = convert_here("image-folder", str(image_tree), tmp_path / "a.beton", max_side=30).manifest
    report = extract(tmp_path / "a.beton", tmp_path / "out")
    assert (report.num_original, report.num_jpeg) == (0, 6)
    again = convert_here("image-folder", str(tmp_path / "out"), tmp_path / "b.beton").manifest
    assert again.digest == made.digest


def test_raw_pixels_become_pngs_and_names_without_a_file_are_indices(tmp_path: Path, convert_here) -> None:
    made = convert_here("synthetic", "n=12,size=16,classes=2", tmp_path / "a.beton", encode="raw").manifest
    report = extract(tmp_path / "a.beton", tmp_path / "out")
    assert report.num_png == 12
    assert sorted(files_in(tmp_path / "out" / "class-0")) == [f"{index:02d}.png" for index in range(0, 12, 2)]
    pixels = np.asarray(Image.open(io.BytesIO((tmp_path / "out" / "class-1" / "03.png").read_bytes())))
    assert pixels.shape == (16, 16, 3)
    converted = convert_here("image-folder", str(tmp_path / "out"), tmp_path / "b.beton", encode="raw").manifest
    assert converted.mode_counts == made.mode_counts


def test_a_sample_that_is_there_twice_gets_two_files(tmp_path: Path, image_tree: Path, convert_here) -> None:
    convert_here("image-folder", str(image_tree), tmp_path / "a.beton")
    subset(tmp_path / "a.beton", Selection(indices=(3, 3)), tmp_path / "twice.beton")
    extract(tmp_path / "twice.beton", tmp_path / "out")
    assert sorted(files_in(tmp_path / "out")) == ["dog/1 (1).JPEG", "dog/1.JPEG"]


def test_without_paths_files_are_named_by_index(tmp_path: Path, image_tree: Path, convert_here) -> None:
    made = convert_here("image-folder", str(image_tree), tmp_path / "a.beton").manifest
    (tmp_path / "a.paths.txt.gz").unlink()
    (tmp_path / "a.samples.bin").unlink()
    report = extract(tmp_path / "a.beton", tmp_path / "out")
    assert (report.num_original, report.num_jpeg) == (0, 6)
    assert sorted(files_in(tmp_path / "out"))[:2] == ["cat/0.jpg", "cat/1.jpg"]
    assert convert_here("image-folder", str(tmp_path / "out"), tmp_path / "b.beton").manifest.digest == made.digest


def test_class_names_become_safe_and_different_folders() -> None:
    long = "x" * 300
    names = ("a/b", "..", ".hidden", "Cat", "cat", "100%", "caf\u00e9", "cafe\u0301", "tab\there", long, "Cat (4)")
    folders = folder_names(names)
    assert folders[:6] == ["a%2Fb", "%2E.", "%2Ehidden", "Cat", "cat (4)", "100%"]
    assert folders[8:] == ["tab%09here", f"{'x' * 40} (9)", "Cat (4) (10)"]
    assert len({folder.casefold() for folder in folders}) == len(names)


def test_unsafe_paths_are_not_followed(tmp_path: Path, image_tree: Path, convert_here) -> None:
    beton = tmp_path / "a.beton"
    made = convert_here("image-folder", str(image_tree), beton).manifest
    packed, digest = pack_paths(["../../0.jpg", "/etc/x.jpg", "a\nb.jpg", ".x.jpg", "", "ok.jpg"])
    beton.with_suffix(".paths.txt.gz").write_bytes(packed)
    write_manifest(beton, replace(made, paths_digest=digest))
    extract(beton, tmp_path / "out")
    assert sorted(files_in(tmp_path / "out")) == [
        "cat/0.jpg",
        "cat/1.jpg",
        "dog/2.jpg",
        "dog/3.jpg",
        "emu/4.jpg",
        "emu/ok.jpg",
    ]


def test_nothing_is_overwritten_and_nothing_half_written_stays(tmp_path: Path, image_tree: Path, convert_here) -> None:
    beton = tmp_path / "a.beton"
    convert_here("image-folder", str(image_tree), beton)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    for folder in ("full", "a.beton"):
        with pytest.raises(UserError, match="exists and is not an empty folder"):
            extract(beton, tmp_path / folder)

    class Stopped(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == total:
            raise Stopped

    with pytest.raises(Stopped):
        extract(beton, tmp_path / "out", stop)
    assert not list(tmp_path.glob("out*"))
    (tmp_path / "out.unfinished").mkdir()
    with pytest.raises(UserError, match="another data-prep is writing it, or was killed"):
        extract(beton, tmp_path / "out")
    (tmp_path / "out.unfinished").rmdir()
    data = bytearray(beton.read_bytes())
    data[load_manifest(beton).page_bytes + 100] ^= 1
    beton.write_bytes(data)
    with pytest.raises(Fault, match="are not what its manifest says"):
        extract(beton, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
