"""Growing training images; ffcv-imagenet's own sizes are in the tests of the recipes."""

from __future__ import annotations

from pathlib import Path

import pytest

from resnet_dist.config.loading import load_recipe
from resnet_dist.config.recipe import DataConfig, train_size
from resnet_dist.errors import UserError

RECIPE = Path(__file__).parents[3] / "resnet_dist/recipes/resnet50_ffcv.yaml"


def growing(progressive: str, *overrides: str) -> DataConfig:
    return load_recipe(RECIPE, [*overrides, f"data.progressive_size={progressive}"]).data


@pytest.mark.parametrize(
    ("progressive", "size", "epochs", "expected"),
    [
        # Sizes between are multiples; the ends need not be.
        (
            "{start_size: 100, ramp: [0.2, 0.8], multiple: 16}",
            250,
            10,
            {0: 100, 2: 100, 3: 128, 4: 144, 7: 224, 8: 250},
        ),
        # 0.29 * 100 is less than 29 in binary.
        ("{start_size: 160, ramp: [0.29, 0.29]}", 192, 100, {28: 160, 29: 160, 30: 192}),
        ("null", 192, 10, {3: 192}),
    ],
)
def test_sizes_by_epoch(progressive: str, size: int, epochs: int, expected: dict[int, int]) -> None:
    data = growing(progressive, f"data.train.size={size}")
    assert {epoch: train_size(data, epoch, epochs) for epoch in expected} == expected


@pytest.mark.parametrize(
    ("overrides", "progressive", "message"),
    [
        (["data.train={kind: pad_crop, size: 32}"], "{start_size: 16, ramp: [0, 1]}", "pad_crop does not"),
        ([], "{start_size: 193, ramp: [0, 1]}", r"train\.size \(192\) or less"),
        ([], "{start_size: 160, ramp: [0.5, 0.4]}", "must ascend"),
    ],
)
def test_mistakes(overrides: list[str], progressive: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        growing(progressive, *overrides)
