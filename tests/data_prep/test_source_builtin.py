"""Sources are found by name, and those without files make the same images every time."""

from __future__ import annotations

import io
import pickle
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from data_prep.errors import UserError
from data_prep.sources import SOURCES, SourceOptions, open_source
from data_prep.sources.splits import SplitRequest


def named(split: str) -> SplitRequest:
    return SplitRequest(split, explicit=True)


# --- names ------------------------------------------------------------------------------------------------------------


def test_an_unknown_source_is_refused() -> None:
    with pytest.raises(UserError, match="--source tars: unknown; known sources: cifar10, cifar100, digits, hf-parquet"):
        open_source("tars", None)


def test_an_option_of_another_source_is_refused() -> None:
    with pytest.raises(UserError, match="--class-order: --source digits does not take it; it belongs to hf-parquet"):
        open_source("digits", None, options=SourceOptions(class_order="text"))


@pytest.mark.parametrize("source", sorted(set(SOURCES) - {"digits", "synthetic"}))
def test_a_source_says_what_input_it_needs(source: str) -> None:
    with pytest.raises(
        UserError, match=f"--source {source} needs --input: .*{'folder' if '1' not in source else 'tar'}"
    ):
        open_source(source)


# --- digits -----------------------------------------------------------------------------------------------------------


def test_digits_splits_are_disjoint_and_stratified() -> None:
    whole, train, val = (
        open_source("digits", None, request) for request in (SplitRequest(), named("train"), SplitRequest("val"))
    )
    assert (len(whole), len(train), len(val)) == (1797, 1442, 355)
    keys = {name: {source.key(i) for i in range(len(source))} for name, source in (("train", train), ("val", val))}
    assert not keys["train"] & keys["val"]
    assert keys["train"] | keys["val"] == {whole.key(i) for i in range(1797)}
    assert [val.description.split, whole.description.split] == ["val", "all"]
    counts = Counter(val[i].label for i in range(355))
    assert [counts[label] for label in range(10)] == [35, 36, 35, 36, 36, 36, 36, 35, 34, 36]
    assert len({source.description.identity for source in (whole, train, val)}) == 3


def test_digits_are_the_real_ones() -> None:
    from sklearn.datasets import load_digits

    whole = pickle.loads(pickle.dumps(open_source("digits", None)))
    bunch = load_digits()
    for index in (0, 5, 1796):
        sample = whole[index]
        image = Image.open(io.BytesIO(sample.data))
        assert (image.format, image.size, image.mode) == ("JPEG", (32, 32), "RGB")
        shrunk = np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX)).astype(float)
        assert np.corrcoef(shrunk.ravel(), bunch.images[index].ravel())[0, 1] > 0.95
        assert sample.label == bunch.target[index]
        assert whole.class_names[sample.label] == str(bunch.target[index])


def test_digits_take_no_input() -> None:
    with pytest.raises(UserError, match="takes no --input"):
        open_source("digits", "/data")
    with pytest.raises(UserError, match="holds the splits train, val"):
        open_source("digits", None, named("test2"))


# --- synthetic --------------------------------------------------------------------------------------------------------


def test_synthetic_is_as_asked_and_repeatable() -> None:
    source = open_source("synthetic", "n=30,size=20..40,classes=4,seed=3")
    again = open_source("synthetic", "n=30,size=20..40,classes=4,seed=3")
    sides = set()
    for i in range(30):
        sample = source[i]
        assert sample == again[i]
        assert sample.label == i % 4
        image = Image.open(io.BytesIO(sample.data))
        assert image.format == "JPEG"
        sides |= set(image.size)
    assert min(sides) >= 20
    assert max(sides) <= 40
    assert len(sides) > 10
    others = [
        open_source("synthetic", f"n=30,size=20..40,classes=4,seed={s}", r)
        for s, r in ((4, SplitRequest()), (3, named("val")))
    ]
    assert all(source[0].data != other[0].data for other in others)


@pytest.mark.parametrize(
    "location",
    ["n=0", "size=9..8", "size=0", "size=20000", "n=x", "colour=red", "format=gif", "classes=0", "seed=-1", "n"],
)
def test_synthetic_parameters_are_checked(location: str) -> None:
    with pytest.raises(UserError, match=r"^--input "):
        open_source("synthetic", location)
