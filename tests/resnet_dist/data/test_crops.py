"""Crop geometry: torchvision's algorithm on our draws, inside the image, the same on every machine."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
import torchvision.transforms.transforms as torchvision_transforms
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import functional
from torchvision.transforms.functional import _compute_resized_output_size

from resnet_dist.config.recipe import CenterCrop, PadCrop, RandomResizedCrop
from resnet_dist.data.crops import Views, center_crop, crop, num_draws, random_resized_crop
from resnet_dist.data.ffcv_kernel import whole_pixel_boxes
from resnet_dist.data.keyed_random import Stream, sample_keys, uniform
from tests.resnet_dist.data.replayed import Replayed

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
SIDE = st.integers(1, 3000)


def sides(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def draws_of(num_samples: int, num: int = 23) -> np.ndarray:
    return uniform(sample_keys(Stream.AUGMENTATION, 21, 3, np.arange(num_samples)), num)


def boxes_of(views: Views) -> np.ndarray:
    return np.stack([views[name] for name in ("box_top", "box_left", "box_height", "box_width")], axis=1)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (32, 32), (60, 900), (900, 60), (17, 23)])
def test_random_resized_crop_is_torchvisions(height: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = draws_of(300)
    ours = boxes_of(random_resized_crop(np.full(300, height), np.full(300, width), 224, SCALE, RATIO, draws))
    theirs = []
    image = torch.empty(3, height, width)
    for row in draws:
        tries = [u for pair in zip(row[3:13], row[13:], strict=True) for u in pair]
        monkeypatch.setattr(torchvision_transforms, "torch", Replayed(uniform=tries, randint=row[1:3]))
        theirs.append(torchvision_transforms.RandomResizedCrop.get_params(image, list(SCALE), list(RATIO)))
    assert ours.tolist() == [list(box) for box in theirs]


def test_an_image_too_long_for_any_try_is_cropped_in_the_middle() -> None:
    boxes = boxes_of(random_resized_crop(sides(10, 400), sides(400, 10), 224, (0.9, 1.0), RATIO, draws_of(2)))
    assert boxes.tolist() == [[0, 193, 10, 13], [193, 0, 13, 10]]


@given(SIDE, SIDE, st.floats(0.01, 1.0), st.floats(0.3, 1.0), st.integers(0, 2**32 - 1))
def test_a_crop_is_inside_the_image(height: int, width: int, least_area: float, flattest: float, seed: int) -> None:
    draws = uniform(sample_keys(Stream.AUGMENTATION, seed, 0, range(8)), 23)
    views = random_resized_crop(
        np.full(8, height), np.full(8, width), 224, (least_area, 1.0), (flattest, 1 / flattest), draws
    )
    top, left, h, w = boxes_of(views).T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (h >= 1).all()
    assert (w >= 1).all()
    assert (top + h <= height).all()
    assert (left + w <= width).all()


def test_the_geometry_never_changes() -> None:
    """Boxes and flips of all random transforms for 2000 samples: part of a recipe's meaning, on every machine."""
    heights, widths = np.arange(2000) % 613 + 1, np.arange(2000) % 457 + 1
    digests = {}
    for transform in (
        RandomResizedCrop(kind="random_resized_crop", size=224),
        PadCrop(kind="pad_crop", size=32),
    ):
        views = crop(transform, heights, widths, draws_of(2000, num_draws(transform)))
        boxes, flips = whole_pixel_boxes(views, transform.size), views["mirrored"] == 1
        digests[transform.kind] = hashlib.sha256(boxes.astype("<i8").tobytes() + flips.tobytes()).hexdigest()[:16]
    assert digests == {"random_resized_crop": "b2ade97cb7f744cf", "pad_crop": "c61ecd2e70b10013"}


@pytest.mark.parametrize("sizes", [(224, 256), (176, 232), (32, 32), (7, 9)])
@given(SIDE, SIDE)
def test_center_crop_is_torchvisions_resize_and_crop(sizes: tuple[int, int], height: int, width: int) -> None:
    """Its sizes and window, from its own functions; the box is the whole image."""
    size, resize = sizes
    resized_height, resized_width = _compute_resized_output_size((height, width), [resize])
    window = []

    def note(_: torch.Tensor, top: int, left: int, *__: int) -> None:
        window.extend([top, left])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "crop", note)
        functional.center_crop(torch.empty(1, 1, 1).expand(3, resized_height, resized_width), [size, size])
    view = center_crop(sides(height), sides(width), size, resize)
    assert view.tolist() == [(0, 0, height, width, resized_height, resized_width, *window, 0)]


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [
        (256, 256, [16, 16, 224, 224]),
        (512, 768, [32, 160, 448, 448]),
        (375, 500, [23, 85, 328, 328]),  # 375 * 224 / 256 = 328.1
        (333, 250, [57, 16, 219, 219]),  # 250 * 224 / 256 = 218.75
        (1, 9, [0, 4, 1, 1]),
    ],
)
def test_a_window_of_a_resized_image_becomes_whole_pixels(height: int, width: int, box: list[int]) -> None:
    """For libffcv: to half a pixel the share of the image that the window shows, and inside the image."""
    views = center_crop(sides(height), sides(width), 224, 256)
    assert whole_pixel_boxes(views, 224).tolist() == [box]


@given(SIDE, SIDE)
def test_the_whole_pixels_are_inside_the_image(height: int, width: int) -> None:
    top, left, h, w = whole_pixel_boxes(center_crop(sides(height), sides(width), 224, 256), 224)[0]
    assert 0 <= top <= height - h
    assert 0 <= left <= width - w
    assert h >= 1
    assert w >= 1


def test_pad_crop_reaches_every_offset_and_flips_half() -> None:
    transform = PadCrop(kind="pad_crop", size=32, pad=4)
    views = crop(transform, np.full(20_000, 32), np.full(20_000, 32), draws_of(20_000, num_draws(transform)))
    boxes = whole_pixel_boxes(views, 32)
    offsets, counts = np.unique(boxes[:, :2], axis=0, return_counts=True)
    assert offsets.tolist() == [[top, left] for top in range(-4, 5) for left in range(-4, 5)]
    assert counts.min() > 180  # 247 expected
    assert (boxes[:, 2:] == 32).all()
    assert views["mirrored"].mean() == pytest.approx(0.5, abs=0.015)


def test_flip_can_be_left_out() -> None:
    transform = PadCrop(kind="pad_crop", size=32, flip=False)
    assert not crop(transform, np.full(50, 32), np.full(50, 32), draws_of(50, 3))["mirrored"].any()
    center = CenterCrop(kind="center_crop", size=32, resize=32)
    assert crop(center, sides(32), sides(32), draws_of(1, 0)).tolist() == [(0, 0, 32, 32, 32, 32, 0, 0, 0)]
