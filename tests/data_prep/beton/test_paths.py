"""The paths file beside a beton names each sample's file in the source, follows samples into other betons, and is not
needed by anything else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.beton import paths as beton_paths
from data_prep.beton.edit import Selection, merge, subset
from data_prep.beton.manifest import load_manifest, manifest_path, read_manifest, write_manifest
from data_prep.beton.paths import Paths, pack_paths, read_paths, why_no_paths
from data_prep.beton.stage import stage
from data_prep.converter.verify import verify
from data_prep.errors import UserError

EXPECTED = [f"{name}/{number}.JPEG" for name in ("cat", "dog", "emu") for number in range(2)]


def paths_of(beton: Path) -> list[str]:
    found = read_paths(str(beton), load_manifest(beton))
    assert found is not None
    return list(found)


@pytest.fixture
def beton(tmp_path: Path, image_tree: Path, convert_here) -> Path:
    convert_here("image-folder", str(image_tree), tmp_path / "all.beton")
    return tmp_path / "all.beton"


def test_each_sample_has_its_path_and_left_out_ones_have_none(tmp_path: Path, image_tree: Path, convert_here) -> None:
    (image_tree / "cat" / "1.JPEG").write_bytes(b"no image")
    convert_here("image-folder", str(image_tree), tmp_path / "a.beton", max_bad="1")
    assert paths_of(tmp_path / "a.beton") == EXPECTED[:1] + EXPECTED[2:]


def test_paths_follow_samples_into_other_betons_and_copies(tmp_path: Path, beton: Path) -> None:
    some, both = tmp_path / "some.beton", tmp_path / "both.beton"
    subset(beton, Selection(indices=(5, 0, 2)), some)
    assert paths_of(some) == [EXPECTED[5], EXPECTED[0], EXPECTED[2]]
    merge([some, beton], both)
    assert paths_of(both) == paths_of(some) + EXPECTED
    assert paths_of(stage(both, tmp_path / "cache")) == paths_of(both)
    some.with_suffix(".paths.txt.gz").unlink()
    assert read_paths(str(some), load_manifest(some)) is None
    assert "some.paths.txt.gz is missing; copy it" in why_no_paths(str(some), load_manifest(some))
    both.unlink()
    for end in (".manifest.json", ".samples.bin", ".paths.txt.gz"):
        both.with_suffix(end).unlink()
    merge([some, beton], both)
    assert paths_of(both) == ["", "", "", *EXPECTED]
    assert stage(some, tmp_path / "cache").exists()


def test_a_beton_of_an_earlier_version_gets_its_paths_from_the_same_command(
    tmp_path: Path, image_tree: Path, convert_here
) -> None:
    (image_tree / "cat" / "0.JPEG").write_bytes(b"no image")
    beton = tmp_path / "a.beton"
    made = convert_here("image-folder", str(image_tree), beton, max_bad="1").manifest
    before = beton.stat().st_mtime_ns
    written = beton.with_suffix(".paths.txt.gz").read_bytes()
    tree = json.loads(manifest_path(beton).read_text())
    del tree["paths_digest"]
    manifest_path(beton).write_text(json.dumps(tree))
    beton.with_suffix(".paths.txt.gz").unlink()
    assert "the command that converted it, run again, writes" in why_no_paths(str(beton), load_manifest(beton))
    assert verify(beton).ok
    again = convert_here("image-folder", str(image_tree), beton, max_bad="1")
    assert (again.already_done, again.manifest, read_manifest(beton)) == (True, made, made)
    assert beton.with_suffix(".paths.txt.gz").read_bytes() == written
    assert beton.stat().st_mtime_ns == before


@pytest.mark.parametrize("damage", ["flip", "shorter", "of other samples", "no gzip"])
def test_a_file_that_does_not_match_is_refused_by_those_who_read_it(beton: Path, damage: str) -> None:
    where = beton.with_suffix(".paths.txt.gz")
    data = where.read_bytes()
    if damage == "of other samples":
        data, digest = pack_paths(EXPECTED[:5])
        write_manifest(beton, replace(load_manifest(beton), paths_digest=digest))
    changed = {"flip": data[:-1] + bytes([data[-1] ^ 1]), "shorter": data[:-8], "no gzip": b"paths"}
    where.write_bytes(changed.get(damage, data))
    with pytest.raises(UserError, match=rf"{where}: .*; copy it again, or remove it"):
        read_paths(str(beton), load_manifest(beton))
    assert [str(where) in problem for problem in verify(beton).problems] == [True]


@given(st.lists(st.text() | st.sampled_from(["a\\nb", "\\", "a\nb", "\udce9.jpg", "a/b c.jpg"]), max_size=8))
@settings(max_examples=60)
def test_any_name_comes_back(names: list[str]) -> None:
    def as_bytes(name: str) -> bytes:
        return name.encode("utf-8", "surrogateescape")

    names = [
        name for name in names if not any("\ud800" <= c <= "\udfff" and not "\udc80" <= c <= "\udcff" for c in name)
    ]
    packed, _ = pack_paths(names)
    text = beton_paths.zlib.decompress(packed, beton_paths._GZIP)
    assert text.count(b"\n") == len(names)
    assert list(map(as_bytes, Paths(text))) == list(map(as_bytes, names))


def test_a_very_long_path_is_cut_in_the_middle() -> None:
    text = beton_paths.zlib.decompress(pack_paths(["a" * 5000 + ".jpg"])[0], beton_paths._GZIP)
    (path,) = Paths(text)
    assert len(path) < 4100
    assert path.endswith("a.jpg")
