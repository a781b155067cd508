"""Growing training images; ffcv-imagenet's own sizes are in the tests of the recipes."""

from __future__ import annotations

from typing import Any

import pytest

from resnet_dist.config.recipe import DataConfig, train_size

CROP = {"kind": "random_resized_crop", "size": 192}


def config(train: dict[str, Any] = CROP, **progressive: object) -> DataConfig:
    return DataConfig.model_validate(
        {
            "dataset": "imagenet",
            "train": train,
            "eval": {"kind": "center_crop", "size": 224, "resize": 256},
            "mean": [0, 0, 0],
            "std": [1, 1, 1],
            "progressive_size": progressive or None,
        }
    )


def test_sizes_between_are_multiples_and_the_ends_need_not_be() -> None:
    data = config(train={**CROP, "size": 250}, start_size=100, ramp=(0.2, 0.8), multiple=16)
    assert [train_size(data, epoch, 10) for epoch in range(11)] == [
        *[100, 100, 100],
        *[128, 144, 176, 192, 224],
        *[250, 250, 250],
    ]


def test_shares_of_the_run_are_not_lost_to_binary_fractions() -> None:
    data = config(start_size=160, ramp=(0.29, 0.29))
    assert [train_size(data, epoch, 100) for epoch in (28, 29, 30)] == [160, 160, 192]


def test_without_it_the_size_is_the_crops() -> None:
    assert train_size(config(), 3, 10) == 192


@pytest.mark.parametrize(
    ("train", "progressive", "message"),
    [
        ({"kind": "pad_crop", "size": 32}, {"start_size": 16, "ramp": (0, 1)}, "pad_crop does not"),
        (CROP, {"start_size": 193, "ramp": (0, 1)}, r"train\.size \(192\) or less"),
        (CROP, {"start_size": 160, "ramp": (0.5, 0.4)}, "must ascend"),
    ],
)
def test_mistakes(train: dict[str, Any], progressive: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(train, **progressive)
