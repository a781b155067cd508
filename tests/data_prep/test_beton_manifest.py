"""The manifest survives the trip through JSON; every way in which it can be wrong is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep.beton.manifest import Manifest, load_manifest, manifest_path, read_manifest, write_manifest
from data_prep.errors import UserError


@pytest.fixture
def beton(tmp_path: Path, convert_here) -> Path:
    convert_here("synthetic", "n=5,size=16,classes=3", tmp_path / "train.beton")
    return tmp_path / "train.beton"


def test_manifest_says_what_is_in_the_beton(beton: Path) -> None:
    manifest = load_manifest(beton)
    assert manifest.num_samples == 5
    assert manifest.class_names == ("class-0", "class-1", "class-2")
    assert manifest.class_counts == (2, 2, 1)
    assert manifest.num_classes == 3
    assert manifest.mode_counts == {"jpeg": 5, "raw": 0}
    assert manifest.num_untouched == 5
    assert (manifest.min_height, manifest.max_width) == (16, 16)
    assert manifest.settings["encode"] == "original"
    assert manifest.source["split"] == "train"
    assert manifest.beton_bytes == beton.stat().st_size
    assert len(manifest.chunks) == -(-manifest.beton_bytes // manifest.chunk_bytes)


def test_json_keeps_every_field(beton: Path) -> None:
    manifest = load_manifest(beton)
    assert Manifest.from_json(manifest.to_json(), "here") == manifest


def test_writing_replaces_and_leaves_no_scrap(beton: Path) -> None:
    manifest = load_manifest(beton)
    write_manifest(beton, manifest)
    assert load_manifest(beton) == manifest
    assert sorted(p.name for p in beton.parent.iterdir()) == ["train.beton", "train.manifest.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 1}, "schema_version is 1, this version of data_prep reads 2"),
        ({"num_samples": "5"}, "num_samples should be a number"),
        ({"num_samples": True}, "num_samples should be a number"),
        ({"beton_bytes": -1}, "beton_bytes should be a number of at least 0"),
        ({"class_names": "abc"}, "class_names should be a list of str"),
        ({"class_counts": [1, "2"]}, "class_counts should be a list of int"),
        ({"source": []}, "source should be an object"),
        ({"digest": None}, "digest should be a string"),
    ],
)
def test_a_wrong_field_is_named(beton: Path, change: dict[str, object], message: str) -> None:
    path = manifest_path(beton)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message) as error:
        load_manifest(beton)
    assert str(path) in str(error.value)


def test_a_missing_field_is_named(beton: Path) -> None:
    path = manifest_path(beton)
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "chunks"}))
    with pytest.raises(UserError, match="chunks is missing"):
        read_manifest(beton)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_what_is_no_manifest_is_refused(beton: Path, text: str) -> None:
    manifest_path(beton).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"train\.manifest\.json"):
        read_manifest(beton)


def test_load_wants_both_files_and_the_right_size(beton: Path) -> None:
    whole = beton.read_bytes()
    beton.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=rf"has {len(whole) - 1} bytes, its manifest says {len(whole)}"):
        load_manifest(beton)
    beton.write_bytes(whole)
    manifest_path(beton).unlink()
    with pytest.raises(UserError, match=r"manifest\.json: does not exist, so train\.beton is unfinished"):
        load_manifest(beton)
    beton.unlink()
    with pytest.raises(UserError, match=r"train\.beton: does not exist"):
        load_manifest(beton)
