"""Operations equal torchvision's on Pillow's images, bit for bit; draws have the expected distributions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import InterpolationMode, functional
from torchvision.transforms import autoaugment as theirs
from torchvision.transforms import transforms as their_transforms

from resnet_dist.config.recipe import (
    ColorJitter,
    Lighting,
    RandAugment,
    RandomErasing,
    RandomResizedCrop,
    TrivialAugmentWide,
)
from resnet_dist.data import augment
from resnet_dist.data.augment import (
    OPERATION,
    OperationKind,
    Operations,
    apply_operations,
    draw_operations,
    operation,
    rand_augment_table,
    trivial_augment_wide_table,
)
from resnet_dist.data.keyed_random import Stream, sample_keys, splitmix64, uniform
from tests.resnet_dist.data.replayed import Replayed

Pixels = NDArray[np.uint8]

JITTER = ColorJitter(kind="color_jitter", brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
ERASING = RandomErasing(kind="random_erasing", probability=0.25)
EVERYTHING = (
    JITTER,
    Lighting(kind="lighting"),
    RandAugment(kind="rand_augment"),
    TrivialAugmentWide(kind="trivial_augment_wide"),
    ERASING,
)


def keys_of(num: int) -> NDArray[np.uint64]:
    return sample_keys(Stream.PIXELS, 21, 3, np.arange(num))


def applied(operations: Operations, image: Pixels) -> Pixels:
    images = image[None].copy()
    apply_operations(np.ascontiguousarray(operations.reshape(1, -1)), images)
    return images[0]


@pytest.fixture(scope="module")
def picture() -> Pixels:
    """33 x 33 px: half of them noise, half of them smooth and dark, so that stretching the levels does something."""
    rng = np.random.default_rng(8)
    image = rng.integers(0, 256, (33, 33, 3), dtype=np.uint8)
    small = Image.fromarray(rng.integers(30, 180, (4, 3, 3), dtype=np.uint8))
    image[:17] = np.asarray(small.resize((33, 17), Image.Resampling.BICUBIC))
    return image


def test_rand_augment_leaves_its_operations_out_with_the_rest_of_the_probability() -> None:
    always = draw_operations([RandAugment(kind="rand_augment", ops=3)], 32, keys_of(4000))
    half = draw_operations([RandAugment(kind="rand_augment", ops=3, probability=0.5)], 32, keys_of(4000))
    left_out = half["kind"] == OperationKind.IDENTITY
    assert np.array_equal(half[~left_out], always[~left_out])
    # An operation of 14 is the identity anyhow.
    assert left_out.mean(axis=0) == pytest.approx(0.5 + 0.5 / 14, abs=0.025)
    assert left_out.all(axis=1).mean() == pytest.approx((0.5 + 0.5 / 14) ** 3, abs=0.025)
    assert not half["values"][left_out & (always["kind"] != OperationKind.IDENTITY)].any()


# Each operation


@pytest.mark.parametrize("policy", ["rand_augment", "trivial_augment_wide"])
@pytest.mark.parametrize("size", [33, 32])
def test_every_operation_at_every_magnitude_is_torchvisions(policy: str, size: int, picture: Pixels) -> None:
    image = picture[:size, :size]
    if policy == "rand_augment":
        table = np.stack([rand_augment_table(magnitude, 31, size) for magnitude in range(31)], axis=1)
        space = theirs.RandAugment()._augmentation_space(31, (size, size))
    else:
        table = trivial_augment_wide_table(31, size)
        space = theirs.TrivialAugmentWide()._augmentation_space(31)
    assert table.shape == (len(space), 31, 2)
    for number, (name, (magnitudes, signed)) in enumerate(space.items()):
        for bin_ in range(31):
            magnitude = float(magnitudes[bin_]) if magnitudes.ndim else 0.0
            for negative in (0, 1):
                value = -magnitude if signed and negative else magnitude
                expected = theirs._apply_op(Image.fromarray(image), name, value, InterpolationMode.NEAREST, None)
                ours = applied(table[number, bin_, negative], image)
                assert np.array_equal(ours, np.asarray(expected)), (name, bin_, negative)


@pytest.mark.parametrize("size", [160, 224])
def test_geometry_at_the_usual_sizes(size: int) -> None:
    image = np.random.default_rng(4).integers(0, 256, (size, size, 3), dtype=np.uint8)
    table, space = trivial_augment_wide_table(31, size), theirs.TrivialAugmentWide()._augmentation_space(31)
    for number, name in enumerate(list(space)[:6]):
        for bin_ in (3, 15, 20, 30):
            magnitude = float(space[name][0][bin_]) if space[name][0].ndim else 0.0
            expected = theirs._apply_op(Image.fromarray(image), name, -magnitude, InterpolationMode.NEAREST, None)
            assert np.array_equal(applied(table[number, bin_, 1], image), np.asarray(expected)), (name, bin_)


@pytest.mark.parametrize("turn", [-0.5, -0.1, 0.0, 0.03, 0.25, 0.5])
def test_hue_on_every_colour(turn: float) -> None:
    """Every fifth level of each channel: 140,608 colours."""
    levels = np.arange(0, 256, 5, dtype=np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 3)
    side = int(np.ceil(np.sqrt(len(colours))))
    image = np.resize(colours, (side, side, 3))
    ours = applied(operation(OperationKind.HUE, float(np.mod(np.trunc(255 * turn), 256))), image)
    assert np.array_equal(ours, np.asarray(functional.adjust_hue(Image.fromarray(image), turn)))


def test_the_smallest_images(picture: Pixels) -> None:
    for size in (1, 2, 3):
        for kind in OperationKind:
            one = applied(operation(kind, 1.5, 0.2, 0.3, 0.4, 0.9, 0.1, 7), np.ascontiguousarray(picture[:size, :size]))
            assert one.shape == (size, size, 3)
    flat = np.full((4, 4, 3), 77, np.uint8)
    for kind in (OperationKind.AUTOCONTRAST, OperationKind.EQUALIZE):
        assert np.array_equal(applied(operation(kind), flat), flat)


def test_adding_rounds_and_stays_within_the_levels() -> None:
    image = np.array([[[0, 100, 255]]], np.uint8)
    assert applied(operation(OperationKind.ADD, -3.0, 1.5, 9.0), image).tolist() == [[[0, 102, 255]]]
    assert applied(operation(OperationKind.ADD, 0.49, -1.5, -0.6), image).tolist() == [[[0, 99, 254]]]
    assert applied(operation(OperationKind.INVERT), image).tolist() == [[[255, 155, 0]]]


def test_erasing_covers_its_rectangle_only(picture: Pixels) -> None:
    ours = applied(operation(OperationKind.ERASE, 5, 7, 11, 20, 1, 2, 3), picture)
    expected = picture.copy()
    expected[5:16, 7:27] = (1, 2, 3)
    assert np.array_equal(ours, expected)
    beyond = applied(operation(OperationKind.ERASE, 30, -4, 99, 99, 1, 2, 3), picture)
    assert (beyond[30:] == (1, 2, 3)).all()
    assert np.array_equal(beyond[:30], picture[:30])


# What is drawn


def test_draws_never_change() -> None:
    """A change here changes every run made with augmentation: the values are part of a recipe's meaning."""
    drawn = draw_operations(EVERYTHING, 224, keys_of(500))
    assert drawn.shape == (500, 4 + 1 + 2 + 1 + 1)
    digest = hashlib.sha256(drawn["kind"].tobytes() + np.round(drawn["values"], 9).tobytes()).hexdigest()
    assert digest == "9d202c85117069a95f597ee7e021cf8f074601b6b29800bfb402b20c98d9a2f6"


def test_an_added_entry_changes_no_earlier_one() -> None:
    for length in range(len(EVERYTHING)):
        part, whole = (draw_operations(EVERYTHING[:n], 64, keys_of(20)) for n in (length, len(EVERYTHING)))
        assert np.array_equal(part, whole[:, : part.shape[1]])
    assert draw_operations((), 64, keys_of(20)).shape == (20, 0)


def test_an_image_draws_the_same_alone() -> None:
    together = draw_operations(EVERYTHING, 64, keys_of(20))
    for k in range(20):
        assert np.array_equal(draw_operations(EVERYTHING, 64, keys_of(20)[k : k + 1]), together[k : k + 1])


def test_colour_jitter_is_torchvisions(picture: Pixels, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = their_transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
    draws = uniform(splitmix64(keys_of(60), 0), 8)
    orders = set()
    for k, operations in enumerate(draw_operations((JITTER,), 33, keys_of(60))):
        order = np.argsort(draws[k, 4:], kind="stable")
        orders.add(tuple(order.tolist()))
        replayed = Replayed(randperm=[order], uniform=draws[k, :4].tolist())
        monkeypatch.setattr(their_transforms, "torch", replayed)
        assert np.array_equal(applied(operations, picture), np.asarray(reference(Image.fromarray(picture))))
    assert len(orders) > 18


def test_random_erasing_is_torchvisions(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = their_transforms.RandomErasing(p=0.25, value=[124, 116, 104])
    draws = uniform(splitmix64(keys_of(300), 0), 23)
    image = np.zeros((40, 40, 3), np.uint8)
    num_erased = 0
    for k, operations in enumerate(draw_operations((ERASING,), 40, keys_of(300))):
        tries = [u for pair in zip(draws[k, 3:13], draws[k, 13:], strict=True) for u in pair]
        replayed = Replayed(rand=[draws[k, 0]], uniform=tries, randint=draws[k, 1:3].tolist())
        monkeypatch.setattr(their_transforms, "torch", replayed)
        expected = reference(torch.from_numpy(image.copy()).permute(2, 0, 1)).permute(1, 2, 0).numpy()
        assert np.array_equal(applied(operations, image), expected), k
        num_erased += int(operations["kind"][0] == OperationKind.ERASE)
    assert 50 < num_erased < 100


def test_jitter_without_strength_changes_nothing(picture: Pixels) -> None:
    """Also no round trip to hue and back, which would change pixels."""
    none = draw_operations((ColorJitter(kind="color_jitter"),), 33, keys_of(5))
    assert all(np.array_equal(applied(operations, picture), picture) for operations in none)


def test_policies_draw_every_operation_as_often() -> None:
    drawn = draw_operations((EVERYTHING[2], EVERYTHING[3]), 224, keys_of(14_000))
    for column in range(3):
        _, counts = np.unique(drawn["kind"][:, column], return_counts=True)
        assert len(counts) == 10  # five geometric ones share a kind
        assert sorted(counts)[-1] == pytest.approx(5000, rel=0.05)
        assert all(count == pytest.approx(1000, rel=0.15) for count in sorted(counts)[:-1])
    strengths = drawn["values"][drawn["kind"][:, 2] == OperationKind.BRIGHTNESS, 2, 0]
    assert len(np.unique(strengths)) == 61
    assert pytest.approx(strengths.min()) == 0.01
    assert pytest.approx(strengths.max()) == 1.99


def test_lighting_is_the_published_noise() -> None:
    """Shifts have the covariance sum of (0.1 * value)**2 * vector * vector' of the colours' components."""
    shifts = draw_operations((Lighting(kind="lighting"),), 8, keys_of(40_000))["values"][:, 0, :3]
    vectors, values = np.array(augment._EIGENVECTORS), np.array(augment._EIGENVALUES)
    expected = (vectors * (25.5 * values) ** 2) @ vectors.T
    assert np.abs(shifts.mean(axis=0)).max() < 0.1
    assert np.allclose(np.cov(shifts.T), expected, rtol=0.03)


# In the loader


def test_a_batch_is_augmented_after_its_crop_and_flip(photo_beton: Path, open_loader: Callable[..., Any]) -> None:
    ids, crop = np.arange(40), RandomResizedCrop(kind="random_resized_crop", size=48)
    operations = draw_operations(EVERYTHING, 48, sample_keys(Stream.PIXELS, 7, 5, ids))
    plain = open_loader(photo_beton, crop, batch_size=40)
    augmented = open_loader(photo_beton, crop.model_copy(update={"augment": EVERYTHING}), batch_size=40)
    (before,), (after,) = plain.epoch(5, ids), augmented.epoch(5, ids)
    for k in range(40):
        assert np.array_equal(applied(operations[k], before.images[k].numpy()), after.images[k].numpy())


def test_operations_are_laid_out_as_in_c() -> None:
    assert OPERATION.itemsize == 72
    with pytest.raises(ValueError, match="expected a contiguous"):
        apply_operations(np.zeros((2, 1), OPERATION), np.zeros((1, 4, 4, 3), np.uint8))
