"""Seven pictures of different shapes, one of them grey, as a beton."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from data_prep.cli import app

SIDES = ((90, 120), (120, 90), (90, 120), (100, 100), (64, 200), (90, 120), (130, 70))
"""Height and width; picture k is of class k % 3."""


@dataclass(frozen=True)
class Pictures:
    beton: Path
    files: tuple[Path, ...]
    """In the order of the beton."""


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for k, (height, width) in enumerate(SIDES):
        y, x = np.mgrid[:height, :width]
        waves = [np.sin(rng.uniform(-0.2, 0.2) * y + rng.uniform(-0.2, 0.2) * x + k) for _ in range(3)]
        pixels = (127.5 + 120 * np.stack(waves, axis=2)).astype(np.uint8)
        image = Image.fromarray(pixels if k != 3 else pixels[:, :, 0])
        target = folder / "images" / "val" / "abc"[k % 3]
        target.mkdir(parents=True, exist_ok=True)
        image.save(target / f"{k}.jpg", quality=92)
    beton = folder / "val.beton"
    command = ["convert", "--source", "image-folder", "--workers", "0", "--output", str(beton)]
    done = CliRunner().invoke(app, [*command, "--input", str(folder / "images" / "val")], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return Pictures(beton, tuple(sorted((folder / "images" / "val").glob("*/*.jpg"))))
