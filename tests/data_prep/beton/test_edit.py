"""merge and subset: the requested samples, their bytes unchanged, labels that still mean the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from data_prep.beton.edit import Selection, merge, subset
from data_prep.beton.manifest import load_manifest, manifest_path
from data_prep.beton.reader import BetonReader
from data_prep.cli.betons import read_classes, read_indices
from data_prep.converter.verify import verify
from data_prep.errors import Fault, UserError

NUM_SAMPLES, NUM_CLASSES = 23, 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, convert_here) -> Path:
    beton = tmp_path_factory.mktemp("edit") / "a.beton"
    location = f"n={NUM_SAMPLES},size=20..40,classes={NUM_CLASSES}"
    convert_here("synthetic", location, beton, encode="mixed", raw_share=0.4)
    assert 0 < load_manifest(beton).mode_counts["raw"] < NUM_SAMPLES
    return beton


def samples(beton: Path) -> list[tuple[int, int, int, int, bytes]]:
    r = BetonReader(beton)
    return [(r.label(i), r.mode(i), r.height(i), r.width(i), bytes(r.image_bytes(i))) for i in range(len(r))]


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (Selection(every=5), [0, 5, 10, 15, 20]),
        (Selection(first=3), [0, 1, 2]),
        (Selection(first=100), list(range(NUM_SAMPLES))),
        (Selection(indices=(7, 2, 2, 22)), [7, 2, 2, 22]),
    ],
)
def test_a_subset_is_the_samples_asked_for(
    selection: Selection, expected: list[int], whole: Path, tmp_path: Path
) -> None:
    subset(whole, selection, tmp_path / "b.beton")
    all_samples = samples(whole)
    assert samples(tmp_path / "b.beton") == [all_samples[i] for i in expected]
    assert verify(tmp_path / "b.beton", decode=None).ok


def test_a_subset_of_classes_renumbers_its_labels(whole: Path, tmp_path: Path) -> None:
    manifest = subset(whole, Selection(classes=("class-3", "class-1"), every=2), tmp_path / "b.beton")
    assert manifest.class_names == ("class-1", "class-3")
    kept = [i for i in range(NUM_SAMPLES) if i % NUM_CLASSES in (1, 3)][::2]
    all_samples = samples(whole)
    assert samples(tmp_path / "b.beton") == [((i % NUM_CLASSES) // 2, *all_samples[i][1:]) for i in kept]
    assert verify(tmp_path / "b.beton", decode=None).ok
    assert manifest.source["selection"] == {"classes": ("class-3", "class-1"), "every": 2}
    assert manifest.source["inputs"][0]["digest"] == load_manifest(whole).digest


def test_parts_merge_to_all_samples(whole: Path, tmp_path: Path) -> None:
    """The merged file is the one a conversion of all of it makes, byte for byte."""
    halves = [tuple(range(11)), tuple(range(11, NUM_SAMPLES))]
    for name, indices in zip("bc", halves, strict=True):
        subset(whole, Selection(indices=indices), tmp_path / f"{name}.beton")
    manifest = merge([tmp_path / "b.beton", tmp_path / "c.beton"], tmp_path / "d.beton")
    assert (tmp_path / "d.beton").read_bytes() == whole.read_bytes()
    assert manifest.digest == load_manifest(whole).digest
    assert manifest.class_counts == load_manifest(whole).class_counts
    assert verify(tmp_path / "d.beton", decode=None).ok


@pytest.mark.parametrize("where", ["a chosen image", "the labels"])
def test_a_damaged_beton_does_not_become_one_that_verifies(where: str, whole: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "a.beton"
    shutil.copy(whole, damaged)
    shutil.copy(manifest_path(whole), manifest_path(damaged))
    at = int(BetonReader(whole).pointers[5]) + 20 if where == "a chosen image" else 200
    data = bytearray(damaged.read_bytes())
    data[at] ^= 1
    damaged.write_bytes(data)
    subset(whole, Selection(every=2), tmp_path / "half.beton")
    for edit in (
        lambda output: subset(damaged, Selection(first=10), output),
        lambda output: merge([tmp_path / "half.beton", damaged], output),
    ):
        with pytest.raises(
            Fault, match=r"a\.beton: bytes from [\d,]+ on are not what its manifest says; run `data-prep verify"
        ):
            edit(tmp_path / "b.beton")
        assert not (tmp_path / "b.beton").exists()


def test_betons_of_other_classes_do_not_merge(whole: Path, tmp_path: Path, convert_here) -> None:
    subset(whole, Selection(classes=("class-1",)), tmp_path / "b.beton")
    convert_here("synthetic", "n=3,size=16,classes=5", tmp_path / "c.beton")
    with pytest.raises(UserError, match=r"class 0 is 'class-0' in .*a\.beton \(4 classes\), 'class-1' in .*b\.beton"):
        merge([whole, tmp_path / "b.beton"], tmp_path / "d.beton")
    with pytest.raises(UserError, match=r"class 4 is missing in .*a\.beton \(4 classes\), 'class-4' in .*c\.beton"):
        merge([whole, tmp_path / "c.beton"], tmp_path / "d.beton")
    assert not (tmp_path / "d.beton").exists()


def test_the_same_images_do_not_merge_twice_whatever_their_names(whole: Path, tmp_path: Path) -> None:
    for name in ("a.beton", "a.manifest.json", "a.paths.txt.gz", "a.samples.bin"):
        shutil.copy(whole.parent / name, tmp_path / f"copy{name[1:]}")
    for again in (whole, tmp_path / "copy.beton"):
        with pytest.raises(UserError, match="hold the same images; name them once"):
            merge([whole, again], tmp_path / "d.beton")


def test_mistakes_are_the_users(whole: Path, tmp_path: Path) -> None:
    for values, message in [
        ({}, "say what to keep"),
        ({"every": 2, "first": 3}, "--every and --first"),
        ({"every": 0}, "--every 0: expected at least 1"),
        ({"indices": (1,), "classes": ("class-1",)}, "--indices and --classes"),
    ]:
        with pytest.raises(UserError, match=message):
            Selection(**values)
    output = tmp_path / "b.beton"
    for selection, message in [
        (Selection(classes=("cat",)), "has no class cat; it has class-0, class-1"),
        (Selection(indices=(NUM_SAMPLES,)), r"has the samples 0\.\.22, asked for 23"),
        (Selection(indices=(10**20,)), r"has the samples 0\.\.22, asked for 10{20}"),
        (Selection(indices=()), "no sample was chosen"),
    ]:
        with pytest.raises(UserError, match=message):
            subset(whole, selection, output)
    with pytest.raises(UserError, match="at least two"):
        merge([whole], output)
    assert list(tmp_path.iterdir()) == []
    output.write_text("")
    with pytest.raises(UserError, match="exists; remove it or choose another"):
        subset(whole, Selection(first=1), output)


def test_a_list_of_indices(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("3\n\n 1 \n")
    assert read_indices(tmp_path / "list") == (3, 1)
    (tmp_path / "list").write_text("3\n-1\n")
    with pytest.raises(UserError, match="list line 2: expected the index of a sample, found -1"):
        read_indices(tmp_path / "list")
    (tmp_path / "list").write_text("9" * 5000)
    with pytest.raises(UserError, match=r"list line 1: expected the index of a sample, found 9+\.\.\.9+$"):
        read_indices(tmp_path / "list")
    for path in (tmp_path / "none", Path("/dev/zero")):
        with pytest.raises(UserError, match="does not exist, or is not a file"):
            read_indices(path)


def test_classes_are_named_in_all_their_spellings(whole: Path, tmp_path: Path) -> None:
    manifest = json.loads(manifest_path(whole).read_text())
    manifest["class_names"] = ["cat", "dog, big", "dog", "@home"]
    manifest["source"]["label_map"] = {"n00000001": 0, "n00000003": 2, "n00000009": 9, "odd": "x"}
    beton = Path(shutil.copy(whole, tmp_path / "a.beton"))
    manifest_path(beton).write_text(json.dumps(manifest))
    (tmp_path / "list").write_text("dog, big\r\n\n n00000003 \n")
    for options, expected in [
        (["cat,dog"], ("cat", "dog")),
        (["dog, big"], ("dog, big",)),
        (["cat,dog, big,dog"], ("cat", "dog, big", "dog")),
        (["dog", "cat", "dog"], ("dog", "cat")),
        (["n00000001,n00000003"], ("cat", "dog")),
        ([f"@{tmp_path / 'list'}"], ("dog, big", "dog")),
        (["@home"], ("@home",)),
        ([" cat , "], ("cat",)),
        ([], ()),
    ]:
        assert read_classes(options, beton) == expected
    for options, message in [
        (["dog, small"], "has no class small; it has cat, dog, big, dog and 1 more"),
        (["n00000009"], "has no class n00000009"),
        (["@/dev/zero"], "does not exist, or is not a file"),
    ]:
        with pytest.raises(UserError, match=message):
            read_classes(options, beton)
