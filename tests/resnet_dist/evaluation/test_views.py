"""Full pictures of a beton: samples that training refuses are refused, and elongated ones take bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.converter.verify import verify
from data_prep.pixels import resampling
from resnet_dist.config.recipe import Interpolation
from resnet_dist.errors import Fault
from resnet_dist.evaluation.views import Resized, ViewLoader
from tests.resnet_dist.data.conftest import jpeg, photograph, write


def rotten(data: bytes) -> bytes:
    """Pillow reads it without a warning."""
    at = len(data) * 2 // 3
    return data[:at] + bytes(40) + data[at + 40 :]


def of_another_jfif(data: bytes) -> bytes:
    return data.replace(b"JFIF\0\x01", b"JFIF\0\x02", 1)


@pytest.mark.parametrize(
    ("damage", "reason"), [(rotten, "Corrupt JPEG data"), (of_another_jfif, "unknown JFIF revision number 2")]
)
def test_a_picture_that_training_refuses_is_refused(
    damage: Callable[[bytes], bytes], reason: str, tmp_path: Path
) -> None:
    pixels = photograph(42, 113, 1)
    good = jpeg(photograph(101, 113, 0))
    bad = damage(good)
    with Image.open(write_file(tmp_path / "bad.jpg", bad)) as image:
        image.load()
    beton = write(tmp_path / "val.beton", [good, bad, pixels])
    reader = ViewLoader(beton, [], batch_size=1, num_threads=1, device=torch.device("cpu"))
    assert np.array_equal(
        np.asarray(reader.picture(0)), np.asarray(Image.open(write_file(tmp_path / "good.jpg", good)))
    )
    assert np.array_equal(np.asarray(reader.picture(2)), pixels)
    with pytest.raises(Fault, match=rf"sample 1 of {beton} cannot be decoded: .*{reason}.*`data-prep verify {beton}"):
        reader.picture(1)
    reader.close()
    (problem,) = verify(beton, decode=None).problems
    assert problem.startswith("1 of 3 images do not decode: 1 (")


def write_file(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("sides", [(2, 700), (700, 2), (80, 60)])
def test_a_part_equals_that_part_of_the_resized_image(sides: tuple[int, int], interpolation: Interpolation) -> None:
    """The first two would have 23 million px."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*sides, 3), dtype=np.uint8))
    resized = Resized(picture)
    width, height = resized.size(256)
    whole = picture.resize((width, height), resampling(interpolation))
    for left, top in ((0, 0), (width - 224, height - 224), ((width - 224) // 2, (height - 224) // 2)):
        box = (left, top, left + 224, top + 224)
        assert resized.part(256, box, interpolation).tobytes() == whole.crop(box).tobytes()


def test_the_most_elongated_picture_is_resized_where_it_is_looked_at() -> None:
    """As a whole it would take 12.9 GB."""
    picture = Image.fromarray(np.full((1, 65_500, 3), 77, np.uint8))
    resized = Resized(picture)
    assert resized.size(256) == (16_768_000, 256)
    assert set(resized.part(256, (16_767_776, 16, 16_768_000, 240)).tobytes()) == {77}
