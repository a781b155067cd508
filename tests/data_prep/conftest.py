"""Pictures, trees and conversions that the tests of data_prep share."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.convert.config import ConvertSettings
from data_prep.convert.progress import NoProgress
from data_prep.convert.run import Outcome, convert, encode_in_this_process
from data_prep.convert.stop import StopFlag
from data_prep.sources import open_source
from data_prep.sources.base import Source
from data_prep.sources.splits import requested_split

Picture = Callable[..., Image.Image]
Encode = Callable[..., bytes]
ConvertHere = Callable[..., Outcome]


@pytest.fixture(scope="session")
def picture() -> Picture:
    """A smooth colour picture, different for every seed: `picture(height, width, seed)`."""

    def make(height: int = 48, width: int = 64, seed: int = 0) -> Image.Image:
        rows, columns = np.mgrid[0:height, 0:width]
        waves = [np.sin((rows * (1 + c) + columns * (2 + seed % 3)) / 9 + seed + c) for c in range(3)]
        return Image.fromarray((np.stack(waves, axis=-1) * 90 + 128).astype(np.uint8))

    return make


@pytest.fixture(scope="session")
def image_file() -> Encode:
    """An image as the bytes of a file: `image_file(image, "JPEG", quality=95, ...)`."""

    def encode(image: Image.Image, file_format: str = "JPEG", **options: object) -> bytes:
        file = io.BytesIO()
        image.save(file, file_format, **options)
        return file.getvalue()

    return encode


@pytest.fixture
def image_tree(tmp_path: Path, picture: Picture, image_file: Encode) -> Path:
    """A folder per class, two JPEGs each: `cat`, `dog`, `emu`."""
    root = tmp_path / "tree"
    for label, name in enumerate(["cat", "dog", "emu"]):
        (root / name).mkdir(parents=True)
        for number in range(2):
            data = image_file(picture(seed=10 * label + number), quality=90)
            (root / name / f"{number}.JPEG").write_bytes(data)
    return root


@pytest.fixture(scope="session")
def convert_here() -> ConvertHere:
    """A whole conversion in this process: `convert_here("synthetic", "n=5", output, encode="raw")`."""

    def run(source: str | Source, location: str | None, output: Path, **settings: object) -> Outcome:
        opened = open_source(source, location, requested_split(None, output)) if isinstance(source, str) else source
        stop = StopFlag()
        return convert(
            opened,
            ConvertSettings(**settings),  # type: ignore[arg-type]
            output,
            encode_units=encode_in_this_process(stop),
            progress=NoProgress(),
            stop=stop,
        )

    return run
