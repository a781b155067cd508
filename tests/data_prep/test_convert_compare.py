"""A beton compared with its source, sample by sample."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep.beton.manifest import manifest_path
from data_prep.converter.verify import verify
from data_prep.errors import UserError


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
    path = manifest_path(beton)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"versions": {"pillow": "1.0"}}))
    (image_tree / "dog" / "0.JPEG").write_bytes(image_file(picture(seed=6), "PNG"))
    assert problems(beton, image_tree) == ()
    (image_tree / "dog" / "1.JPEG").write_bytes(image_file(picture(seed=7)))
    assert "3 (dog/1.JPEG: other bytes)" in problems(beton, image_tree)[0]


def test_a_beton_of_other_making_has_no_source(image_tree: Path, tmp_path: Path, convert_here) -> None:
    beton = tmp_path / "a.beton"
    convert_here("image-folder", str(image_tree), beton)
    path = manifest_path(beton)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"settings": {"inputs": []}}))
    with pytest.raises(UserError, match="no settings of a conversion"):
        problems(beton, image_tree)
