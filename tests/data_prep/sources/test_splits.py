"""Names of splits are recognised in any spelling, and never where they are ambiguous."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.sources.splits import (
    SplitRequest,
    choose_split,
    is_split_name,
    requested_split,
    split_of_whole,
    splits_in,
)
from tests.data_prep.sources.opening import named, refuses

TRAIN = (
    "train Training TRAIN train_set train-set TrainSet trainset train2017 trn trains train_images 1_train "
    "training_data trainingset TRAININGSET imagestrain TrainImages2"
)
VAL = "val VAL valid Validation validations validation_set val2017 dev devset eval Evaluation minival"
TEST = "test Testing TESTS test_set testset Test-Images tst holdout hold_out HoldOut hold-out-set"


@pytest.mark.parametrize(("split", "names"), [("train", TRAIN), ("val", VAL), ("test", TEST)])
def test_names_that_are_a_split(split: str, names: str) -> None:
    found = {name: (set(splits_in(name)), is_split_name(name)) for name in names.split()}
    assert found == dict.fromkeys(names.split(), ({split}, True))
    assert splits_in(names) == {split}


@pytest.mark.parametrize(
    ("name", "splits"),
    [
        ("train_station", {"train"}),
        ("cars-train", {"train"}),
        ("imagenet1k-validation-0001", {"val"}),
        ("valid-00000-of-00001-0a1b2c3d4e5f6789", {"val"}),
        ("trainA", {"train"}),
        ("trainval", {"train", "val"}),
        ("Train_Val", {"train", "val"}),
        ("train-test-split", {"train", "test"}),
        *((name, set()) for name in ("cat", "contest", "latest", "valley", "device", "images", "sets", "2017", "all")),
        ("trainstation", set()),
        ("évaluation", set()),
        ("dataset" * 40 + "x", set()),  # and not after ages
    ],
)
def test_names_of_a_split_and_more_or_of_none(name: str, splits: set[str]) -> None:
    assert (splits_in(name), is_split_name(name)) == (splits, False)


@pytest.mark.parametrize(
    ("names", "split"),
    [
        ("train Train flowers_train train2017", "train"),
        ("validation", "val"),
        ("cifar10-test", "test"),
        ("trainval all cifar", None),
    ],
)
def test_the_outputs_name_asks_for_a_split(names: str, split: str | None) -> None:
    for name in names.split():
        assert requested_split(None, Path(f"/train/{name}.beton")) == SplitRequest(split)
        assert requested_split("Odd", Path(f"{name}.beton")) == named("Odd")


@pytest.mark.parametrize(
    ("available", "request_", "chosen"),
    [
        ("Training Testing", SplitRequest("train"), "Training"),
        ("Training Testing", SplitRequest("val"), "Testing"),
        ("TRAIN VAL", named("train"), "TRAIN"),
        ("train_set test_set", named("test"), "test_set"),
        ("trn dev tst", SplitRequest("val"), "dev"),
        ("train train_extra", SplitRequest("train"), "train"),
        ("train_set train_extra", SplitRequest("train"), "train_set"),
        ("train trainval", named("TrainVal"), "trainval"),
        ("train holdout", SplitRequest("test"), "holdout"),
        ("train validation test", named("val"), "validation"),
        ("train val", named("validation"), "val"),
        ("all", SplitRequest(), "all"),
        ("all", named("all"), "all"),
        ("train", named("all"), "train"),
    ],
)
def test_a_split_is_found_by_what_its_name_means(available: str, request_: SplitRequest, chosen: str) -> None:
    assert choose_split(available.split(), request_, "here") == chosen


@pytest.mark.parametrize(
    ("available", "request_", "message"),
    [
        ("trainA, trainB", SplitRequest("train"), "of which trainA, trainB may be what the output's name .train. asks"),
        ("train, val", SplitRequest(), "say which with --split"),
        ("train, val", SplitRequest("test"), "none of which is what the output's name .test. asks for"),
        ("train, test", named("validation"), "none of which is what --split validation asks for"),
        ("train, test", named("train_extra"), "none of which is what --split train_extra asks for"),
        ("trainval, test", SplitRequest("train"), "none of which is what the output's name"),
        ("train, val", named("all"), "--split all does not combine"),
    ],
)
def test_ambiguity_is_refused_with_the_choices(available: str, request_: SplitRequest, message: str) -> None:
    refuses(
        f"here: holds the splits {available}[,;] .*{message}", choose_split, available.split(", "), request_, "here"
    )


def test_all_of_a_source_without_splits_is_taken_only_on_request() -> None:
    assert split_of_whole(SplitRequest(), "here") == "all"
    assert split_of_whole(named("all"), "here") == split_of_whole(named("All"), "here") == "all"
    assert split_of_whole(SplitRequest("train"), "here", ["images", "Training"]) == "train"
    assert split_of_whole(named("val"), "here", ["validation"]) == "val"
    assert split_of_whole(SplitRequest("val"), "here", ["test"]) == "val"  # a test set may be used for validation
    for request_, names, message in [
        (SplitRequest("train"), [], "is not divided into splits, but the output's name .train. asks .*--split all"),
        (SplitRequest("val"), ["train"], "is train, by the name train, but .* .val. asks for another.*--split all"),
        (SplitRequest("test"), ["val"], "is val, by the name val"),
        (SplitRequest("train"), ["trainval"], "is not divided into splits"),
        (named("val"), [], "--split val: here is not divided into splits; --split all"),
    ]:
        refuses(message, split_of_whole, request_, "here", names)
