"""The manifest round-trips through JSON; every error in one is named."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.beton.digest import digest_file
from data_prep.beton.manifest import Manifest, load_manifest, manifest_path, read_manifest, write_manifest
from data_prep.errors import UserError
from data_prep.strict_json import MAX_DEPTH, parse


@pytest.fixture
def beton(tmp_path: Path, convert_here) -> Path:
    convert_here("synthetic", "n=5,size=16,classes=3", tmp_path / "train.beton")
    return tmp_path / "train.beton"


def test_a_file_given_instead_of_a_beton_is_named_as_what_it_is(beton: Path) -> None:
    for other, told in (
        (beton.parent, "is a folder; expected a .beton, such as train.beton in it"),
        (manifest_path(beton), "is a manifest; give the beton beside it"),
        (beton.with_name("none.beton"), "does not exist"),
        (Path("/dev/null"), "is not a regular file"),
    ):
        with pytest.raises(UserError, match=f"^{other}: {told}"):
            load_manifest(other)


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
    write_manifest(beton, manifest)
    assert load_manifest(beton) == manifest
    assert sorted(p.name for p in beton.parent.iterdir()) == [
        "train.beton",
        "train.manifest.json",
        "train.paths.txt.gz",
        "train.samples.bin",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 1}, "schema_version is 1, this version of data_prep reads 2 and 3"),
        ({"schema_version": 2}, "digest is blake3_tree:.*, which does not match schema_version 2"),
        ({"schema_version": True}, "schema_version is True"),
        ({"schema_version": [3]}, r"schema_version is \[3\]"),
        ({"num_samples": "5"}, "num_samples should be a number"),
        ({"num_samples": True}, "num_samples should be a number"),
        ({"beton_bytes": -1}, "beton_bytes should be a number of at least 0"),
        ({"class_names": "abc"}, "class_names should be a list of str"),
        ({"class_counts": [1, "2"]}, "class_counts should be a list of int"),
        ({"source": []}, "source should be an object"),
        ({"digest": None}, "digest should be a string"),
        ({"digest": "x:/tmp/y"}, "digest: 'x:/tmp/y' is not a digest"),
        ({"digest": "blake3_tree:" + "0" * 64}, "its digest is not that of its chunks"),
        ({"digest": "blake3:" + "0" * 64}, "does not match schema_version 3"),
        ({"samples_digest": "xxh3_128:" + "0" * 32}, "samples_digest is xxh3_128:0"),
        ({"samples_digest": 7}, "samples_digest should be a string"),
        ({"chunks": []}, r"has 0 chunks, \d+ bytes have 3"),
        ({"chunks": ["0" * 64] * 4}, "has 4 chunks"),
        ({"chunks": ["0" * 64] * 3}, "its digest is not that of its chunks"),
        ({"chunks": ["0" * 63 + "\0"] * 3}, r"chunks: 0 is .*x00.* which is not a digest"),
        ({"chunk_bytes": 1}, "chunk_bytes is 1, expected 8388608"),
        ({"beton_bytes": 1 << 62}, r"has 3 chunks, 4611686018427387904 bytes have 549755813888"),
        ({"beton_bytes": 1 << 64}, "beton_bytes should be a number"),
        ({"page_bytes": 12345}, "page_bytes is 12345, expected a power of two"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"num_samples": 1 << 40}, r"num_samples is 1099511627776, which \d+ bytes do not hold"),
        ({"num_samples": 6}, "class_counts are of 3 classes and 5 samples, expected 3 and 6"),
        ({"class_names": []}, "class_names is empty"),
        ({"class_names": ["a", "b"]}, "class_counts are of 3 classes and 5 samples, expected 2 and 5"),
        ({"class_names": ["a", "b", ""]}, "class 2 is '', expected 1..1000 characters"),
        ({"class_names": ["a", "b\x1b[2J", "c"]}, r"class 1 is 'b\\x1b\[2J'"),
        ({"class_names": ["a", "b\nc", "c"]}, r"class 1 is 'b\\nc'"),
        ({"class_names": ["a", "b", "c" * 1001]}, "class 2 is 'ccc"),
        ({"class_counts": [2, 2, -1]}, "class_counts should be a list of int"),
        ({"mode_counts": {}}, "mode_counts should be numbers of jpeg and raw"),
        ({"mode_counts": {"jpeg": 1.0, "raw": 4}}, "mode_counts should be numbers"),
        ({"mode_counts": {"jpeg": 5, "raw": 5}}, "mode_counts or num_untouched do not match num_samples 5"),
        ({"num_untouched": 6}, "mode_counts or num_untouched do not match num_samples 5"),
        ({"min_height": 17}, "min_height and max_height are not sides of images: 17, 16"),
        ({"min_width": 0}, "min_width and max_width are not sides of images: 0, 16"),
        ({"max_height": 65_536}, "min_height and max_height are not sides of images"),
        ({"quarantined": [{}]}, "quarantined: expected an index, a key and a reason for each"),
        ({"quarantined": [{"index": -1, "key": "a", "reason": "b"}]}, "quarantined: expected an index"),
        ({"versions": {"pillow": 1}}, "versions should be strings"),
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


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "\xff",
        "[" * 100_000,
        '{"a":' * 900 + "1" + "}" * 900,
        '{"schema_version": 3, "schema_version": 2}',
        '{"schema_version": NaN}',
        '{"schema_version": 1e999}',
        f'{{"schema_version": {"9" * 5000}}}',
        "null",
        "\0",
    ],
)
def test_an_invalid_manifest_is_refused(beton: Path, text: str) -> None:
    manifest_path(beton).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"train\.manifest\.json"):
        read_manifest(beton)


def test_load_wants_two_regular_files_of_the_right_size(beton: Path) -> None:
    whole = beton.read_bytes()
    beton.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=rf"has {len(whole) - 1} bytes, its manifest says {len(whole)}"):
        load_manifest(beton)
    beton.write_bytes(whole)
    manifest_path(beton).unlink()
    with pytest.raises(UserError, match=r"manifest\.json: does not exist, so train\.beton is unfinished"):
        load_manifest(beton)
    os.mkfifo(manifest_path(beton))  # opening it would wait forever
    with pytest.raises(UserError, match=r"train\.manifest\.json: cannot be read: is not a regular file"):
        load_manifest(beton)
    beton.unlink()
    with pytest.raises(UserError, match=r"train\.beton: does not exist"):
        load_manifest(beton)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(name=st.sampled_from([field.name for field in fields(Manifest)]), value=ANYTHING)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_of_a_field_is_read_or_refused_in_one_line(beton: Path, name: str, value: object) -> None:
    tree = json.loads(manifest_path(beton).read_text())
    problem = problem_of(lambda: Manifest.from_json(json.dumps(tree | {name: value}), "here"))
    assert problem is None or problem.startswith("here: ")
    if problem is None:
        manifest = Manifest.from_json(json.dumps(tree | {name: value}), "here")
        assert Manifest.from_json(manifest.to_json(), "here") == manifest


def problem_of(read: Callable[[], object]) -> str | None:
    try:
        read()
    except UserError as error:
        return str(error)
    return None


@given(data=st.data())
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_manifest_with_other_bytes_is_read_or_refused_in_one_line(beton: Path, data: st.DataObject) -> None:
    path = manifest_path(beton)
    whole = path.read_bytes()
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, min(len(whole), start + 20)))
    path.write_bytes(whole[:start] + data.draw(st.binary(max_size=20)) + whole[stop:])
    problem = problem_of(lambda: read_manifest(beton))
    path.write_bytes(whole)
    assert problem is None or problem.startswith(f"{path}: ")


def test_a_manifest_of_the_version_before_is_read_and_named_for_what_it_proves(beton: Path) -> None:
    assert load_manifest(beton).is_proof
    earlier = digest_file(beton, "xxh3_128")
    path = manifest_path(beton)
    tree = json.loads(path.read_text()) | {"schema_version": 2, "digest": earlier.whole, "chunks": earlier.chunks}
    del tree["samples_digest"]
    path.write_text(json.dumps(tree))
    manifest = load_manifest(beton)
    assert (manifest.is_proof, manifest.samples_digest) == (False, "")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 10_000_000, "is nested more than 32 deep"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "is nested more than 32 deep"),
        ('{"a": {"b": 1, "c": 2, "b": 3}}', "has the key 'b' twice"),
        ("[NaN]", "has NaN for a number"),
        ("[-Infinity]", "has -Infinity for a number"),
        ("[1e400]", "has the number 1e400, which is too large"),
        ("1" * 21, "has a number of 21 digits"),
        ("[" + "1," * 40_000_000 + "1]", "has more than 67,108,864 bytes"),
    ],
)
def test_json_has_bounds(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse(text, max_bytes=64 << 20)


def test_values_within_the_bounds_are_read() -> None:
    assert parse("[" * MAX_DEPTH + "]" * MAX_DEPTH, max_bytes=100)
    assert parse(b'{"a": [1.5, -18446744073709551615, "\xc3\xa9"]}', max_bytes=100) == {
        "a": [1.5, -(2**64) + 1, "\u00e9"]
    }
    assert parse("[NaN, Infinity, 1e400]", max_bytes=100, allow_nan=True)[1:] == [float("inf"), float("inf")]
