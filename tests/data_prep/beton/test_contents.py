"""The contents file beside a beton identifies each source image, however it is stored, and edits keep it up to date."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.beton.contents import CONTENT, Overlap, content_of, find_overlap, read_contents
from data_prep.beton.digest import digest_bytes
from data_prep.beton.edit import Selection, merge, subset
from data_prep.beton.manifest import load_manifest, read_manifest
from data_prep.beton.stage import stage
from data_prep.converter import convert as conversion
from data_prep.errors import UserError


def contents(beton: Path) -> list[str]:
    found = read_contents(beton, load_manifest(beton))
    assert found is not None
    return [item.tobytes().hex() for item in found]


def in_source(tree: Path) -> list[str]:
    return [xxhash.xxh3_128_hexdigest(path.read_bytes()) for path in sorted(tree.rglob("*.*"))]


@pytest.mark.parametrize(
    "settings", [{"check": "headers"}, {"check": "decode"}, {"encode": "raw"}, {"encode": "jpeg"}, {"max_side": 20}]
)
def test_they_are_of_the_sources_files_whatever_is_stored(
    tmp_path: Path, image_tree: Path, convert_here, settings: dict[str, object]
) -> None:
    convert_here("image-folder", str(image_tree), tmp_path / "a.beton", **settings)
    assert contents(tmp_path / "a.beton") == in_source(image_tree)
    assert (tmp_path / "a.samples.bin").stat().st_size == 6 * 16


def test_many_ranges_read_for_the_first_time_are_all_reported(tmp_path: Path, large_tree: Path, convert_here) -> None:
    convert_here("image-folder", str(large_tree), tmp_path / "a.beton", check="headers", page_bytes=2 << 20)
    assert contents(tmp_path / "a.beton") == in_source(large_tree)


def test_samples_left_out_are_left_out_there(tmp_path: Path, image_tree: Path, convert_here) -> None:
    expected = in_source(image_tree)
    (image_tree / "cat" / "1.JPEG").write_bytes(b"no image")
    for check in ("headers", "decode"):
        output = tmp_path / check / "a.beton"
        output.parent.mkdir()
        convert_here("image-folder", str(image_tree), output, max_bad="1", check=check)
        assert contents(output) == expected[:1] + expected[2:]


@pytest.fixture
def beton(tmp_path: Path, image_tree: Path, convert_here) -> Path:
    convert_here("image-folder", str(image_tree), tmp_path / "all.beton")
    return tmp_path / "all.beton"


def test_they_follow_samples_into_other_betons_if_all_inputs_have_them(tmp_path: Path, beton: Path) -> None:
    expected = contents(beton)
    some, both, fewer = (tmp_path / f"{name}.beton" for name in ("some", "both", "fewer"))
    subset(beton, Selection(indices=(5, 0, 2)), some)
    assert contents(some) == [expected[5], expected[0], expected[2]]
    merge([some, beton], both)
    assert contents(both) == contents(some) + expected
    assert contents(stage(both, tmp_path / "cache")) == contents(both)
    some.with_suffix(".samples.bin").unlink()
    merge([some, beton], fewer)
    assert read_manifest(fewer).samples_digest == ""
    assert not fewer.with_suffix(".samples.bin").exists()
    assert read_contents(fewer, read_manifest(fewer)) is None
    assert stage(some, tmp_path / "cache").exists()


@pytest.mark.parametrize("damage", ["flip", "shorter", "longer", "pipe", "another digest in the manifest"])
def test_contents_that_do_not_match_are_refused(beton: Path, damage: str) -> None:
    path, manifest = beton.with_suffix(".samples.bin"), load_manifest(beton)
    data = path.read_bytes()
    if damage == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif damage == "another digest in the manifest":
        manifest = replace(manifest, samples_digest=digest_bytes(b"other"))
    else:
        path.write_bytes({"flip": b"\0" + data[1:], "shorter": data[:-16], "longer": data + bytes(16)}[damage])
    with pytest.raises(UserError, match=rf"{path}: .*; copy it again, or remove it"):
        read_contents(beton, manifest)


def test_invalid_notes_of_an_earlier_run_are_ignored(
    tmp_path: Path, image_tree: Path, convert_here, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, output = tmp_path / "b.beton", tmp_path / "a.beton"
    convert_here("image-folder", str(image_tree), expected, check="headers")

    class Killed(Exception):
        pass

    def kill(*_: object, **__: object) -> None:
        raise Killed

    monkeypatch.setattr(conversion, "describe_beton", kill)
    with pytest.raises(Killed):
        convert_here("image-folder", str(image_tree), output, check="headers")
    monkeypatch.undo()
    (note,) = (tmp_path / "a.beton.work").glob("range-*")
    good = json.loads(note.read_text())
    assert len(good["contents"]) == 6 * 32
    for bad in (
        "",
        "[" * 100_000,
        json.dumps(good | {"contents": ""}),
        json.dumps(good | {"contents": "zz"}),
        json.dumps(good | {"contents": None}),
        json.dumps(good | {"chunks": good["chunks"][:-1]}),
        json.dumps(good | {"chunks": ["../x"] * len(good["chunks"])}),
        json.dumps(good | {"receipt": 1}),
    ):
        shutil.copytree(tmp_path / "a.beton.work", tmp_path / "again" / "a.beton.work")
        (tmp_path / "again" / "a.beton.work" / note.name).write_text(bad)
        convert_here("image-folder", str(image_tree), tmp_path / "again" / "a.beton", check="headers")
        for end in (".beton", ".samples.bin", ".paths.txt.gz", ".manifest.json"):
            made = (tmp_path / "again" / "a.beton").with_suffix(end)
            assert made.read_bytes() == expected.with_suffix(end).read_bytes()
        shutil.rmtree(tmp_path / "again")


def of(*names: str) -> np.ndarray:
    return np.frombuffer(b"".join(content_of(name.encode()) for name in names), dtype=CONTENT)


def test_samples_that_two_betons_share() -> None:
    assert find_overlap(of("a", "b"), of("c", "d")) is None
    assert find_overlap(of("a", "b", "c"), of("x", "c", "b", "c")) == Overlap(2, 3, (1, 2))
    assert find_overlap(of("a", "a"), of("a")) == Overlap(2, 2, (0, 0))
    assert find_overlap(of("a"), of("a", "a", "b")) == Overlap(1, 1, (0, 0))
    same_low_half = np.frombuffer(bytes(8) + b"A" * 8 + bytes(8) + b"B" * 8, dtype=CONTENT)
    assert find_overlap(same_low_half[:1], same_low_half[1:]) is None


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1), st.lists(st.sampled_from("abcdefgh"), min_size=1))
@settings(max_examples=50)
def test_the_count_is_that_of_sets(one: list[str], other: list[str]) -> None:
    shared = [number for number, name in enumerate(one) if name in other]
    found = find_overlap(of(*one), of(*other))
    expected = Overlap(len(shared), len(one), (shared[0], other.index(one[shared[0]]))) if shared else None
    assert found == expected
