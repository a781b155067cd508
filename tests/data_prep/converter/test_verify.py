"""verify finds errors and says where they are; with a source, also samples that the source does not give."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_prep.beton import layout
from data_prep.beton.digest import CHUNK_BYTES, digest_file
from data_prep.beton.manifest import manifest_path
from data_prep.beton.reader import BetonReader
from data_prep.converter.verify import verify
from data_prep.errors import UserError
from data_prep.sources.datasets.builtin import Synthetic

NUM_SAMPLES = 400
SOURCE = Synthetic(num_samples=NUM_SAMPLES, min_side=100, max_side=140, file_format="png", num_classes=4)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, convert_here) -> Path:
    """Raw images over three pages and more than one chunk."""
    beton = tmp_path_factory.mktemp("verify") / "a.beton"
    convert_here(SOURCE, None, beton, encode="raw")
    assert beton.stat().st_size > 3 * CHUNK_BYTES
    return beton


@pytest.fixture
def beton(whole: Path, tmp_path: Path) -> Path:
    shutil.copy(whole, tmp_path)
    shutil.copy(manifest_path(whole), tmp_path)
    return tmp_path / whole.name


def flip_bit(beton: Path, offset: int) -> None:
    with beton.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def change_manifest(beton: Path, **values: object) -> None:
    path = manifest_path(beton)
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_flipped_bit_is_found_with_the_samples_it_may_touch(beton: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = verify(beton, decode=None, on_decoded=lambda done, total: seen.append((done, total)))
    assert (report.ok, report.num_decoded, seen[-1]) == (True, NUM_SAMPLES, (NUM_SAMPLES, NUM_SAMPLES))
    reader = BetonReader(beton)
    sample = 250
    offset = int(reader.pointers[sample]) + 17
    flip_bit(beton, offset)

    report = verify(beton, decode=0)

    assert not report.ok
    (problem,) = report.problems
    chunk = offset // CHUNK_BYTES
    assert problem.startswith(f"bytes {chunk * CHUNK_BYTES}..{(chunk + 1) * CHUNK_BYTES - 1} changed")
    touched = [
        i
        for i in range(NUM_SAMPLES)
        if reader.pointers[i] < (chunk + 1) * CHUNK_BYTES and reader.pointers[i] + reader.sizes[i] > chunk * CHUNK_BYTES
    ]
    assert sample in touched
    assert f"the images of {len(touched)} samples are there: {touched[0]}, {touched[1]}" in problem


def test_a_changed_label_is_found_twice(beton: Path) -> None:
    flip_bit(beton, layout.METADATA_START + 16)  # the label of sample 0: 0 becomes 1
    problems = verify(beton, decode=0).problems
    assert len(problems) == 2
    assert "it contains tables or padding, no image" in problems[0]
    assert problems[1] == "class_counts: the beton has (99, 101, 100, 100), the manifest says (100, 100, 100, 100)"


def test_a_truncated_file_is_found(beton: Path) -> None:
    size = beton.stat().st_size
    with beton.open("r+b") as file:
        file.truncate(size - 5)
    problems = verify(beton, decode=0).problems
    assert problems[0] == f"the file has {size - 5} bytes, the manifest says {size}: copied in part?"
    assert "allocation table" in problems[1]


def test_another_betons_manifest_is_found(beton: Path) -> None:
    counts = {"class_counts": [399, 0, 0, 0], "mode_counts": {"jpeg": 0, "raw": 399}, "num_untouched": 0}
    change_manifest(beton, num_samples=399, max_width=139, min_width=139, **counts)
    assert [problem.split(":")[0] for problem in verify(beton, decode=0).problems] == [
        "num_samples",
        "class_counts",
        "mode_counts",
        "max_width",
        "min_width",
    ]


def test_images_that_do_not_decode_are_named(tmp_path: Path, convert_here) -> None:
    """Damage that came before the digest was taken: only decoding tells."""
    beton = tmp_path / "a.beton"
    convert_here(Synthetic(num_samples=20, min_side=32, max_side=32), None, beton)
    reader = BetonReader(beton)
    data = np.fromfile(beton, dtype=np.uint8)
    data[int(reader.pointers[7]) + 2] = 0  # breaks a marker
    rows = data[layout.METADATA_START :][: 20 * layout.SAMPLE_METADATA.itemsize].view(layout.SAMPLE_METADATA)
    rows["image"]["width"][11] = 31
    data.tofile(beton)
    digest = digest_file(beton)
    change_manifest(beton, digest=digest.whole, chunks=digest.chunks, min_width=31)

    (problem,) = verify(beton, decode=None).problems
    assert problem.startswith("2 of 20 images do not decode: 7 (")
    assert problem.endswith("11 (is 32 x 32 px, the metadata says 31 x 32)")
    assert verify(beton, decode=2).num_decoded == 2
    assert verify(beton, decode=2).ok  # the first and the last


def test_missing_files_are_the_users(beton: Path) -> None:
    manifest_path(beton).unlink()
    with pytest.raises(UserError, match=r"manifest\.json: does not exist"):
        verify(beton, decode=0)
    with pytest.raises(UserError, match=r"none\.beton: does not exist"):
        verify(beton.with_name("none.beton"), decode=0)


# --- compared with the source -----------------------------------------------------------------------------------------


def problems(beton: Path, tree: Path, decode: int | None = None, **options: object) -> tuple[str, ...]:
    return verify(beton, decode=decode, source="image-folder", input=str(tree), **options).problems  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{}, {"encode": "jpeg", "max_side": 20}, {"encode": "mixed", "raw_share": 0.5}])
def test_a_beton_is_what_its_source_gives(
    settings: dict[str, object], image_tree: Path, tmp_path: Path, convert_here
) -> None:
    (image_tree / "cat" / "0.JPEG").write_bytes(b"")  # left out: the others move up
    beton = tmp_path / "a.beton"
    convert_here("image-folder", str(image_tree), beton, max_bad="1", **settings)
    seen: list[tuple[int, int]] = []
    assert problems(beton, image_tree, on_decoded=lambda *done: seen.append(done)) == ()
    assert seen == [(number, 5) for number in (1, 2, 3, 4, 5)] * 2  # decoded, then compared

    file = image_tree / "emu" / "1.JPEG"
    file.write_bytes((image_tree / "cat" / "1.JPEG").read_bytes())
    (problem,) = problems(beton, image_tree)
    assert problem == "1 of 5 samples are not what the source gives: 4 (emu/1.JPEG: other bytes)"
    assert problems(beton, image_tree, decode=1) == ()  # looks at the first only
    file.write_bytes(b"")
    assert "(emu/1.JPEG: is empty)" in problems(beton, image_tree)[0]
    file.unlink()
    assert problems(beton, image_tree) == ("the source has 5 samples, the beton 5 and 1 left out",)


def test_with_other_libraries_only_untouched_bytes_are_compared(
    image_tree: Path, tmp_path: Path, convert_here, picture, image_file
) -> None:
    (image_tree / "dog" / "0.JPEG").write_bytes(image_file(picture(seed=5), "PNG"))
    beton = tmp_path / "a.beton"
    convert_here("image-folder", str(image_tree), beton)
    change_manifest(beton, versions={"pillow": "1.0"})
    (image_tree / "dog" / "0.JPEG").write_bytes(image_file(picture(seed=6), "PNG"))
    assert problems(beton, image_tree) == ()
    (image_tree / "dog" / "1.JPEG").write_bytes(image_file(picture(seed=7)))
    assert "3 (dog/1.JPEG: other bytes)" in problems(beton, image_tree)[0]
    change_manifest(beton, settings={"inputs": []})  # as `merge` writes it
    with pytest.raises(UserError, match="no settings of a conversion"):
        problems(beton, image_tree)
