"""The pixels: Pillow's, bit for bit; with `decoder: ffcv` near them, and exact where nothing is resized.

libffcv uses libjpeg-turbo's fast DCT and OpenCV's INTER_AREA, so decoded and resized images differ from Pillow's by up
to 3 grey levels on average here; a crop or a flip that is off by one pixel differs by 6 and more.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import CenterCrop as CenterCropOfTorchvision
from torchvision.transforms import Compose, Resize

from data_prep.beton.reader import BetonReader
from resnet_dist.config.recipe import CenterCrop, PadCrop, RandomResizedCrop
from resnet_dist.data import ffcv_kernel
from resnet_dist.data.crops import Transform, Views, crop, num_draws
from resnet_dist.data.keyed_random import Stream, sample_keys, uniform
from resnet_dist.data.loader import BetonLoader
from resnet_dist.errors import UserError

Pixels = NDArray[np.uint8]
OpenLoader = Callable[..., BetonLoader]
WriteBeton = Callable[[Path, list[object]], Path]

RRC = RandomResizedCrop(kind="random_resized_crop", size=48)
CENTER = CenterCrop(kind="center_crop", size=48, resize=56)
NEAR_PILLOW = 3.0
OFF_BY_ONE = 6.0


def pixels_of(loader: BetonLoader, epoch: int, num_samples: int) -> Pixels:
    return np.concatenate([batch.images.numpy() for batch in loader.epoch(epoch, np.arange(num_samples))])


def geometry(transform: Transform, images: list[Pixels], seed: int, epoch: int) -> tuple[Views, list[bool]]:
    """Views, and which of them are mirrored."""
    heights, widths = np.array([image.shape[:2] for image in images], dtype=np.int64).T
    keys = sample_keys(Stream.AUGMENTATION, seed, epoch, np.arange(len(images)))
    views = crop(transform, heights, widths, uniform(keys, num_draws(transform)))
    return views, (views["mirrored"] == 1).tolist()


def by_pillow(image: Pixels, box: list[int], flip: bool, size: int) -> Pixels:
    top, left, height, width = box
    cut = Image.fromarray(image[top : top + height, left : left + width])
    shown = np.asarray(resized(cut, size, size))
    return shown[:, ::-1] if flip else shown


def resized(image: Image.Image, height: int, width: int) -> Image.Image:
    """Along the columns first: Pillow 13 begins along the rows where that is quicker, and rounds in between."""
    return image.resize((width, image.height), Image.Resampling.BILINEAR).resize(
        (width, height), Image.Resampling.BILINEAR
    )


def stored_pixels(beton: Path, photographs: list[Pixels]) -> list[Pixels]:
    """What the beton holds, decoded by Pillow: JPEG has changed most of the photographs."""
    reader = BetonReader(beton)
    return [
        np.asarray(Image.open(io.BytesIO(reader.image_bytes(k))).convert("RGB"))
        if reader.mode(k) == 0
        else photographs[k]
        for k in range(len(reader))
    ]


def distance(a: Pixels, b: Pixels) -> float:
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


def test_random_resized_crops_are_pillows(
    photo_beton: Path, photographs: list[Pixels], open_loader: OpenLoader
) -> None:
    images = stored_pixels(photo_beton, photographs)
    views, flips = geometry(RRC, images, seed=7, epoch=3)
    assert 0 < sum(flips) < len(images)
    ours = pixels_of(open_loader(photo_beton, RRC), 3, len(images))
    for k, image in enumerate(images):
        assert np.array_equal(ours[k], by_pillow(image, views[k].tolist()[:4], flips[k], 48))


def test_center_crops_are_torchvisions(photo_beton: Path, photographs: list[Pixels], open_loader: OpenLoader) -> None:
    """Its `Resize` and `CenterCrop` on Pillow's images: the same picture, one grey level apart where Pillow rounds in
    another order."""
    images = stored_pixels(photo_beton, photographs)
    ours = pixels_of(open_loader(photo_beton, CENTER), 0, len(images))
    torchvision = Compose([Resize(CENTER.resize), CenterCropOfTorchvision(CENTER.size)])
    for k, image in enumerate(images):
        theirs = np.asarray(torchvision(Image.fromarray(image)))
        assert np.abs(ours[k].astype(int) - theirs).max() <= 1
        height, width = (CENTER.resize * side // min(image.shape[:2]) for side in image.shape[:2])
        exact = CenterCropOfTorchvision(CENTER.size)(resized(Image.fromarray(image), height, width))
        assert np.array_equal(ours[k], np.asarray(exact))


@pytest.mark.parametrize("transform", [RRC, CENTER], ids=["random_resized_crop", "center_crop"])
def test_libffcvs_resized_crops_are_near_pillows(
    transform: Transform, photo_beton: Path, photographs: list[Pixels], open_loader: OpenLoader
) -> None:
    images = stored_pixels(photo_beton, photographs)
    views, flips = geometry(transform, images, seed=7, epoch=3)
    boxes = ffcv_kernel.whole_pixel_boxes(views, 48)
    ours = pixels_of(open_loader(photo_beton, transform, decoder="ffcv"), 3, len(images))
    assert ours.shape == (40, 48, 48, 3)
    for k, image in enumerate(images):
        box = boxes[k].tolist()
        assert distance(ours[k], by_pillow(image, box, flips[k], 48)) < NEAR_PILLOW
        assert distance(ours[k], by_pillow(image, box, not flips[k], 48)) > OFF_BY_ONE


@pytest.mark.parametrize("decoder", ["native", "ffcv"])
def test_pad_crop_is_exact(decoder: str, tile_beton: Path, tiles: list[Pixels], open_loader: OpenLoader) -> None:
    """Raw tiles against numpy's own padding: zeros outside, every pixel in its place, mirrored after the crop."""
    transform = PadCrop(kind="pad_crop", size=32, pad=4)
    views, flips = geometry(transform, tiles, seed=7, epoch=1)
    boxes = ffcv_kernel.whole_pixel_boxes(views, 32)
    assert 0 < sum(flips) < len(tiles)
    assert (boxes[:, :2] < 0).any()
    assert (boxes[:, :2] > 0).any()
    ours = pixels_of(open_loader(tile_beton, transform, decoder=decoder), 1, len(tiles))
    for k, tile in enumerate(tiles):
        top, left = boxes[k, :2] + 4
        shown = np.pad(tile, ((4, 4), (4, 4), (0, 0)))[top : top + 32, left : left + 32]
        assert np.array_equal(ours[k], shown[:, ::-1] if flips[k] else shown)


@pytest.mark.parametrize("decoder", ["native", "ffcv"])
def test_a_jpeg_is_decoded_to_rgb(
    decoder: str,
    tmp_path: Path,
    tiles: list[Pixels],
    write_images: WriteBeton,
    to_jpeg: Callable[..., bytes],
    open_loader: OpenLoader,
) -> None:
    """Also a grey one; libjpeg-turbo's fast DCT against Pillow's slow one."""
    grey = io.BytesIO()
    Image.fromarray(tiles[0]).convert("L").save(grey, "JPEG", quality=92)
    files = [to_jpeg(tiles[0]), to_jpeg(tiles[1], progressive=True), grey.getvalue()]
    beton = write_images(tmp_path / "jpeg.beton", files)
    ours = pixels_of(open_loader(beton, CenterCrop(kind="center_crop", size=32, resize=32), decoder=decoder), 0, 3)
    for k, file in enumerate(files):
        assert distance(ours[k], np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))) <= (
            1.5 if decoder == "ffcv" else 0
        )
    assert (ours[2][..., 0] == ours[2][..., 2]).all()


def test_pad_crop_needs_images_of_one_size(photo_beton: Path, open_loader: OpenLoader) -> None:
    with pytest.raises(UserError, match=r"pad_crop needs images of 32 x 32 px.*sides of \d+ to \d+ px"):
        open_loader(photo_beton, PadCrop(kind="pad_crop", size=32))


def test_the_size_in_a_jpegs_header_is_read(photographs: list[Pixels], to_jpeg: Callable[..., bytes]) -> None:
    height, width = photographs[1].shape[:2]
    for options in ({}, {"progressive": True}, {"exif": b"Exif\0\0" + bytes(40)}, {"comment": b"\xff\xc0"}):
        file = to_jpeg(photographs[1], **options)
        assert ffcv_kernel.jpeg_size(np.frombuffer(file, np.uint8)) == (height, width)
        header_end = file.index(bytes([height >> 8, height & 255, width >> 8, width & 255])) + 4
        filled = file[:2] + b"\xff\xff" + file[2:]
        assert ffcv_kernel.jpeg_size(np.frombuffer(filled, np.uint8)) == (height, width)
        for length in range(header_end):
            assert ffcv_kernel.jpeg_size(np.frombuffer(file[:length], np.uint8)) == (0, 0)
