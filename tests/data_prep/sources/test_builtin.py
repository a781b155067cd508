"""Sources are found by name, and those without files make the same images every time."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from data_prep.sources import SOURCES
from data_prep.sources.splits import SplitRequest
from tests.data_prep.sources.opening import keys_of, named, opened, refused

# --- names ------------------------------------------------------------------------------------------------------------


def test_names_options_and_inputs_are_checked() -> None:
    refused("--source tars: unknown; known sources: cifar10, cifar100, digits, hf-parquet", "tars")
    message = "--class-order: --source digits does not take it; it belongs to hf-parquet"
    refused(message, "digits", class_order="text")
    refused("takes no --input", "digits", "/data")
    refused("holds the splits train, val", "digits", None, named("test2"))


@pytest.mark.parametrize("source", sorted(set(SOURCES) - {"digits", "synthetic"}))
def test_a_source_says_what_input_it_needs(source: str) -> None:
    refused(f"--source {source} needs --input: .*{'folder' if '1' not in source else 'tar'}", source)


# --- digits -----------------------------------------------------------------------------------------------------------


def test_digits_splits_are_disjoint_and_stratified() -> None:
    requests = (SplitRequest(), named("train"), SplitRequest("val"))
    whole, train, val = (opened("digits", None, request) for request in requests)
    assert (len(whole), len(train), len(val)) == (1797, 1442, 355)
    assert sorted(keys_of(train) + keys_of(val)) == sorted(keys_of(whole)) == sorted(set(keys_of(whole)))
    assert [val.description.split, whole.description.split] == ["val", "all"]
    assert np.bincount(val.labels).tolist() == [35, 36, 35, 36, 36, 36, 36, 35, 34, 36]
    assert len({source.description.identity for source in (whole, train, val)}) == 3


def test_digits_are_the_real_ones() -> None:
    whole = pickle.loads(pickle.dumps(opened("digits")))
    bunch = load_digits()
    for index in (0, 5, 1796):
        sample = whole[index]
        image = Image.open(io.BytesIO(sample.data))
        assert (image.format, image.size, image.mode) == ("JPEG", (32, 32), "RGB")
        shrunk = np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX)).astype(float)
        assert np.corrcoef(shrunk.ravel(), bunch.images[index].ravel())[0, 1] > 0.95
        assert whole.class_names[sample.label] == str(bunch.target[index]) == str(sample.label)


# --- synthetic --------------------------------------------------------------------------------------------------------


def test_synthetic_is_as_asked_and_repeatable() -> None:
    source, again = (opened("synthetic", "n=30,size=20..40,classes=4,seed=3") for _ in range(2))
    sides = set()
    for i in range(30):
        sample = source[i]
        assert sample == again[i]
        assert sample.label == i % 4
        image = Image.open(io.BytesIO(sample.data))
        assert image.format == "JPEG"
        sides |= set(image.size)
    assert (min(sides) >= 20, max(sides) <= 40, len(sides) > 10) == (True, True, True)
    assert opened("synthetic", "n=30,size=20..40,classes=4,seed=4")[0].data != source[0].data
    assert opened("synthetic", "n=30,size=20..40,classes=4,seed=3", named("val"))[0].data != source[0].data


@pytest.mark.parametrize(
    "location",
    ["n=0", "size=9..8", "size=0", "size=20000", "n=x", "colour=red", "format=gif", "classes=0", "seed=-1", "n"],
)
def test_synthetic_parameters_are_checked(location: str) -> None:
    refused(r"^--input ", "synthetic", location)
