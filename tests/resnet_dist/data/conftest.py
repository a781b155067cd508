"""Small betons of synthetic photographs, written by data_prep."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from data_prep.beton import layout, manifest
from data_prep.beton.ranges import payload_of, write_beton
from resnet_dist.config.recipe import RandomResizedCrop
from resnet_dist.data.crops import Transform
from resnet_dist.data.decoder import ImageSettings
from resnet_dist.data.loader import BetonLoader

Pixels = NDArray[np.uint8]
Stored = bytes | Pixels
WriteBeton = Callable[[Path, Sequence[Stored]], Path]
OpenLoader = Callable[..., BetonLoader]


def photograph(height: int, width: int, seed: int) -> Pixels:
    """Waves of random direction in every channel: smooth, unlike its mirror image, no two places alike."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    image = np.zeros((height, width, 3))
    for _ in range(6):
        frequency, phase = rng.uniform(-0.25, 0.25, 2), rng.uniform(0, 2 * np.pi, 3)
        image += np.sin(frequency[0] * y[..., None] + frequency[1] * x[..., None] + phase)
    return (127.5 + 21 * image).clip(0, 255).astype(np.uint8)


def jpeg(pixels: Pixels, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=92, **options)
    return buffer.getvalue()


def write(path: Path, images: Sequence[Stored]) -> Path:
    """A beton and its manifest; bytes are stored as JPEG, arrays as raw pixels; the label of sample k is k % 10."""
    rows = np.zeros(len(images), layout.STORED_ROW)
    for row, k, image in zip(rows, range(len(images)), images, strict=True):
        size = Image.open(io.BytesIO(image)).size if isinstance(image, bytes) else image.shape[1::-1]
        row["mode"] = layout.MODE_JPEG if isinstance(image, bytes) else layout.MODE_RAW
        row["width"], row["height"] = size
        row["label"] = k % 10
        row["size"] = len(bytes(image))
    plan = layout.lay_out(rows, layout.MIN_PAGE_BYTES)
    digest = write_beton(path, plan, payload_of(lambda k: bytes(images[k])), temporary=path.with_suffix(".tmp"))
    described = manifest.describe_beton(
        plan,
        digest,
        class_names=tuple("abcdefghij"),
        num_untouched=0,
        settings={},
        source={"name": "test"},
        versions={},
    )
    manifest.write_manifest(path, described)
    return path


@pytest.fixture(scope="session")
def photographs() -> list[Pixels]:
    """40 images, sides of 40 to 130 px, portrait and landscape."""
    sides = np.random.default_rng(5).integers(40, 131, (40, 2))
    return [photograph(int(height), int(width), seed) for seed, (height, width) in enumerate(sides)]


@pytest.fixture(scope="session")
def photo_beton(tmp_path_factory: pytest.TempPathFactory, photographs: list[Pixels]) -> Path:
    """The photographs as JPEGs (every fourth grey, progressive or 4:4:4), but every fifth as raw pixels."""
    kinds = ({}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_rows": 1})
    images = [p if k % 5 == 0 else jpeg(p, **kinds[k % 4]) for k, p in enumerate(photographs)]
    return write(tmp_path_factory.mktemp("photos") / "train.beton", images)


@pytest.fixture(scope="session")
def tiles() -> list[Pixels]:
    """24 images of 32 x 32 px."""
    return [photograph(32, 32, 100 + k) for k in range(24)]


@pytest.fixture(scope="session")
def tile_beton(tmp_path_factory: pytest.TempPathFactory, tiles: list[Pixels]) -> Path:
    """The tiles as raw pixels: what comes out can be compared exactly."""
    return write(tmp_path_factory.mktemp("tiles") / "train.beton", tiles)


@pytest.fixture(scope="session")
def write_images() -> WriteBeton:
    return write


@pytest.fixture(scope="session")
def to_jpeg() -> Callable[..., bytes]:
    return jpeg


@pytest.fixture
def open_loader() -> Iterator[OpenLoader]:
    """Opens loaders (random resized crop to 48 px by default) and closes them after the test."""
    opened: list[BetonLoader] = []
    default = RandomResizedCrop(kind="random_resized_crop", size=48)

    def open_one(
        beton: Path,
        transform: Transform = default,
        *,
        batch_size: int = 8,
        num_threads: int = 1,
        seed: int = 7,
        wait_limit_s: float = 60.0,
        reads_ahead: bool = False,
        **settings: Any,
    ) -> BetonLoader:
        images = ImageSettings(transform, seed=seed, **settings)
        loader = BetonLoader(
            beton,
            images,
            batch_size=batch_size,
            num_threads=num_threads,
            reads_ahead=reads_ahead,
            wait_limit_s=wait_limit_s,
        )
        opened.append(loader)
        return loader

    yield open_one
    for loader in opened:
        loader.close()
