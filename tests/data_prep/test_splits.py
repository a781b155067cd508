"""Names of splits are recognised in any spelling, and never where they are ambiguous."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.errors import UserError
from data_prep.sources.splits import (
    SplitRequest,
    choose_split,
    is_split_name,
    requested_split,
    split_of_whole,
    splits_in,
)


def named(split: str) -> SplitRequest:
    return SplitRequest(split, explicit=True)


@pytest.mark.parametrize(
    ("split", "names"),
    [
        (
            "train",
            "train Training TRAIN train_set train-set TrainSet trainset train2017 trn trains train_images 1_train",
        ),
        ("train", "training_data trainingset TRAININGSET imagestrain TrainImages2"),
        ("val", "val VAL valid Validation validations validation_set val2017 dev devset eval Evaluation minival"),
        ("test", "test Testing TESTS test_set testset Test-Images tst holdout hold_out HoldOut hold-out-set"),
    ],
)
def test_names_that_are_a_split(split: str, names: str) -> None:
    assert {name: (set(splits_in(name)), is_split_name(name)) for name in names.split()} == {
        name: ({split}, True) for name in names.split()
    }
    spaced = names.replace("_", "  ").split("  ")[0]
    assert splits_in(spaced) == {split}


def test_names_of_a_split_and_more() -> None:
    for name, splits in {
        "train_station": {"train"},
        "cars-train": {"train"},
        "imagenet1k-validation-0001": {"val"},
        "valid-00000-of-00001-0a1b2c3d4e5f6789": {"val"},
        "trainA": {"train"},
        "trainval": {"train", "val"},
        "Train_Val": {"train", "val"},
        "train-test-split": {"train", "test"},
    }.items():
        assert (splits_in(name), is_split_name(name)) == (splits, False), name


def test_names_of_no_split() -> None:
    names = "cat trainstation contest latest valley value device images dataset sets évaluation 2017 all"
    for name in names.split():
        assert (splits_in(name), is_split_name(name)) == (set(), False), name
    assert splits_in("dataset" * 40 + "x") == set()  # and not after ages


@pytest.mark.parametrize(
    ("output", "split"),
    [
        ("train.beton", "train"),
        ("Train.beton", "train"),
        ("validation.beton", "val"),
        ("flowers_train.beton", "train"),
        ("cifar10-test.beton", "test"),
        ("train2017.beton", "train"),
        ("trainval.beton", None),
        ("all.beton", None),
        ("cifar.beton", None),
    ],
)
def test_the_outputs_name_asks_for_a_split(output: str, split: str | None) -> None:
    assert requested_split(None, Path("/train") / output) == SplitRequest(split)  # type: ignore[arg-type]
    assert requested_split("Odd", Path(output)) == named("Odd")


@pytest.mark.parametrize(
    ("available", "request_", "chosen"),
    [
        (["Training", "Testing"], SplitRequest("train"), "Training"),
        (["Training", "Testing"], SplitRequest("val"), "Testing"),
        (["TRAIN", "VAL"], named("train"), "TRAIN"),
        (["train_set", "test_set"], named("test"), "test_set"),
        (["trn", "dev", "tst"], SplitRequest("val"), "dev"),
        (["train", "train_extra"], SplitRequest("train"), "train"),
        (["train_set", "train_extra"], SplitRequest("train"), "train_set"),
        (["train", "trainval"], named("TrainVal"), "trainval"),
        (["train", "holdout"], SplitRequest("test"), "holdout"),
        (["train", "validation", "test"], named("val"), "validation"),
        (["train", "val"], named("validation"), "val"),
        (["all"], SplitRequest(), "all"),
        (["all"], named("all"), "all"),
        (["train"], named("all"), "train"),
    ],
)
def test_a_split_is_found_by_what_its_name_means(available: list[str], request_: SplitRequest, chosen: str) -> None:
    assert choose_split(available, request_, "here") == chosen


@pytest.mark.parametrize(
    ("available", "request_", "message"),
    [
        (
            ["trainA", "trainB"],
            SplitRequest("train"),
            "of which trainA, trainB may be what the output's name .train. asks for",
        ),
        (["train", "val"], SplitRequest(), "say which with --split"),
        (["train", "val"], SplitRequest("test"), "none of which is what the output's name .test. asks for"),
        (["train", "test"], named("validation"), "none of which is what --split validation asks for"),
        (["train", "test"], named("train_extra"), "none of which is what --split train_extra asks for"),
        (["trainval", "test"], SplitRequest("train"), "none of which is what the output's name"),
        (["train", "val"], named("all"), "--split all does not combine"),
    ],
)
def test_ambiguity_is_refused_with_the_choices(available: list[str], request_: SplitRequest, message: str) -> None:
    with pytest.raises(UserError, match=f"here: holds the splits {', '.join(available)}[,;] .*{message}"):
        choose_split(available, request_, "here")


def test_all_of_a_source_without_splits_is_taken_only_on_request() -> None:
    assert split_of_whole(SplitRequest(), "here") == "all"
    assert split_of_whole(named("all"), "here") == split_of_whole(named("All"), "here") == "all"
    assert split_of_whole(SplitRequest("train"), "here", ["images", "Training"]) == "train"
    assert split_of_whole(named("val"), "here", ["validation"]) == "val"
    for request_, names, message in [
        (
            SplitRequest("train"),
            [],
            "is not divided into splits, but the output's name .train. asks for a split.*--split all",
        ),
        (
            SplitRequest("val"),
            ["train"],
            "is train, by the name train, but the output's name .val. asks for another split.*--split all",
        ),
        (SplitRequest("train"), ["trainval"], "is not divided into splits"),
        (named("val"), [], "--split val: here is not divided into splits; --split all"),
    ]:
        with pytest.raises(UserError, match=message):
            split_of_whole(request_, "here", names)


def test_a_folder_called_test_may_be_taken_for_val() -> None:
    assert split_of_whole(SplitRequest("val"), "here", ["test"]) == "val"
    with pytest.raises(UserError, match="is val, by the name val"):
        split_of_whole(SplitRequest("test"), "here", ["val"])
