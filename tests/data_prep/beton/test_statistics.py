"""Mean and deviation of a beton's pixels: exact, however they are computed."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from data_prep.beton import layout
from data_prep.beton.edit import Selection, merge, subset
from data_prep.beton.manifest import Manifest, load_manifest, manifest_path, write_manifest
from data_prep.beton.reader import BetonReader
from data_prep.beton.statistics import MOST_IMAGES, SIZE, Stored, is_measured, measure, measure_all, statistics_of
from data_prep.cli import app
from data_prep.errors import UserError
from tests.data_prep.conftest import ConvertHere, Encode, Picture


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory, convert_here: ConvertHere) -> Path:
    path = tmp_path_factory.mktemp("statistics") / "a.beton"
    convert_here("synthetic", "n=12,size=20..40", path, encode="mixed", raw_share=0.4)
    return path


def pixels_of(image: Stored) -> np.ndarray:
    if image.mode == layout.MODE_RAW:
        return np.frombuffer(image.data, np.uint8).reshape(-1, 3)
    return np.asarray(Image.open(io.BytesIO(bytes(image.data))).convert("RGB")).reshape(-1, 3)


def test_they_are_those_of_all_pixels_in_float64(beton: Path) -> None:
    reader = BetonReader(beton)
    pixels = np.concatenate([pixels_of(reader.stored(index)) for index in range(len(reader))]).astype(np.float64)
    found = load_manifest(beton).statistics
    assert (found["num_images"], found["num_pixels"], found["size"]) == (12, len(pixels), SIZE)
    np.testing.assert_allclose(found["mean"], pixels.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(found["std"], pixels.std(axis=0), rtol=1e-13)


@pytest.mark.parametrize("file_format", ["JPEG", "raw"])
@pytest.mark.parametrize(("side", "pixels"), [(SIZE - 1, (SIZE - 1) ** 2), (2 * SIZE, SIZE**2), (4 * SIZE - 1, 256**2)])
def test_a_large_picture_is_measured_at_a_fraction_of_its_size(
    file_format: str, side: int, pixels: int, picture: Picture, image_file: Encode
) -> None:
    image = picture(side, side)
    data, mode = (image_file(image), layout.MODE_JPEG) if file_format == "JPEG" else (image.tobytes(), layout.MODE_RAW)
    sums = measure(Stored(data, mode, side, side))
    assert sums[:2].tolist() == [1, pixels]
    np.testing.assert_allclose(sums[2:5] / pixels, np.asarray(image).mean(axis=(0, 1)), atol=0.6)


def test_of_many_images_a_share_is_measured_and_what_does_not_decode_is_not() -> None:
    chosen = [index for index in range(3 * MOST_IMAGES) if is_measured(index, 3 * MOST_IMAGES)]
    assert 0.98 < len(chosen) / MOST_IMAGES < 1.02
    assert 0.48 < np.mean(np.array(chosen) % 2) < 0.52
    assert all(is_measured(index, MOST_IMAGES) for index in range(100))
    assert statistics_of(measure(Stored(b"\xff\xd8broken", layout.MODE_JPEG, 8, 8))) == {}


def without_statistics(beton: Path, to: Path) -> Path:
    to.write_bytes(beton.read_bytes())
    write_manifest(to, replace(load_manifest(beton), statistics={}, samples_digest=""))
    return to


def test_a_subset_has_its_own_and_none_if_its_beton_has_none(beton: Path, tmp_path: Path) -> None:
    made = subset(beton, Selection(every=2), tmp_path / "half.beton")
    reader = BetonReader(beton)
    assert made.statistics == measure_all(6, lambda index: reader.stored(2 * index)) != load_manifest(beton).statistics
    bare = without_statistics(beton, tmp_path / "bare.beton")
    assert subset(bare, Selection(first=5), tmp_path / "five.beton").statistics == {}
    joined = merge([tmp_path / "half.beton", tmp_path / "five.beton"], tmp_path / "joined.beton")
    assert joined.statistics == {}


def test_the_command_adds_what_conversion_would_have_found(beton: Path, tmp_path: Path) -> None:
    bare = without_statistics(beton, tmp_path / "bare.beton")
    for _ in range(2):
        result = CliRunner().invoke(app, ["statistics", str(bare), "--json"], catch_exceptions=False)
        assert json.loads(result.stdout.splitlines()[-1])["num_images"] == 12
        assert load_manifest(bare).statistics == load_manifest(beton).statistics


def test_a_manifest_of_an_earlier_version_has_none_and_an_odd_one_is_refused(beton: Path) -> None:
    tree = json.loads(manifest_path(beton).read_text())
    del tree["statistics"]
    assert Manifest.from_json(json.dumps(tree), "m").statistics == {}
    with pytest.raises(UserError, match="m: statistics should have"):
        Manifest.from_json(json.dumps({**tree, "statistics": {"mean": [1, 2]}}), "m")
