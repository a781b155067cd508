"""Validation images that are also training images are reported, or refused if there are more than a few."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from data_prep.beton.digest import digest_file
from data_prep.beton.manifest import load_manifest, manifest_path
from data_prep.converter.convert import ConvertReport, convert
from data_prep.converter.settings import ConvertSettings
from data_prep.sources import open_source
from data_prep.sources.splits import SplitRequest
from resnet_dist.config.profile import Profile, Workers
from resnet_dist.config.recipe import Recipe, recipe_changes, recipe_hash
from resnet_dist.data.checks import training_data_note
from resnet_dist.errors import UserError
from resnet_dist.evaluation.evaluate import evaluate
from resnet_dist.evaluation.protocols import Protocol
from resnet_dist.launch.preflight import Prepared, describe_run, prepare
from resnet_dist.studies.study import study_recipe
from resnet_dist.training.checkpoint import CheckpointMetadata, checkpoint_name, write_checkpoint
from resnet_dist.training.model import build_classifier

CLASSES = ("ant", "bee")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], bytes]:
    """The files of 300 different images."""
    from data_prep.sources.datasets.builtin import Synthetic

    source = Synthetic(num_samples=300, min_side=8, max_side=8)
    return lambda number: source[number].data


@pytest.fixture
def make(tmp_path: Path, images: Callable[[int], bytes]) -> Callable[..., ConvertReport]:
    """`make("train", [0, 1, 2])`: a beton of these images, every other one of a class."""

    def make(split: str, numbers: Sequence[int], **settings: object) -> ConvertReport:
        tree = tmp_path / "trees" / split
        shutil.rmtree(tree, ignore_errors=True)
        for place, number in enumerate(numbers):
            path = tree / CLASSES[place % 2] / f"{place:03d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(images(number))
        source = open_source("image-folder", str(tree), SplitRequest(None, explicit=False))
        output = tmp_path / "data" / "pets" / f"{split}.beton"
        for old in output.parent.glob(f"{split}.*"):
            old.unlink()
        chosen = ConvertSettings(**settings)  # type: ignore[arg-type]
        return convert(source, output, settings=chosen)

    return make


@pytest.fixture
def profile(tmp_path: Path) -> Profile:
    return Profile(
        workers=Workers(min=1, max=1),
        cpus_per_worker=1,
        data_root=str(tmp_path / "data"),
        storage=str(tmp_path / "runs"),
        tracking_uri="sqlite:////m.db",
    )


def recipe(**overrides: object) -> Recipe:
    sizes = ["model.num_classes=2", "train.global_batch_size=4", "train.micro_batch_size=4", "data.dataset=pets"]
    return study_recipe("resnet8", overrides=[*sizes, *(f"data.{key}={value}" for key, value in overrides.items())])


@pytest.fixture
def prepared(profile: Profile) -> Callable[..., Prepared]:
    return lambda **overrides: prepare(recipe(**overrides), profile, "r")


def test_data_that_share_nothing_are_not_spoken_of(make, prepared) -> None:
    assert make("train", range(12)).warnings == ()
    assert make("val", range(12, 20)).warnings == ()
    assert prepared().warnings == ()


def test_the_same_data_for_both_are_reported_at_conversion_and_refused(make, prepared, profile: Profile) -> None:
    make("train", range(12))
    (line,) = make("val", range(12)).warnings
    assert line.startswith("val.beton is the same data as train.beton beside it: accuracy there says nothing")
    with pytest.raises(UserError, match=r"train\.beton and .*val\.beton are the same data \(digest blake3_tree:"):
        prepared()
    (warning,) = prepared(allow_overlap="true").warnings
    assert "data.allow_overlap is set" in warning
    assert warning in describe_run(recipe(allow_overlap="true"), profile, "r")


@pytest.mark.parametrize(
    ("settings", "of_val"),
    [
        ({}, {}),
        ({"check": "headers"}, {}),
        ({"encode": "raw"}, {"encode": "original"}),
        ({"max_side": 5}, {"encode": "jpeg", "quality": 40}),
    ],
)
def test_images_that_both_have_are_found_however_they_are_stored(
    make, prepared, settings: dict[str, object], of_val: dict[str, object]
) -> None:
    make("train", range(12), **settings)
    (line,) = make("val", [20, 7, 21, 3], **of_val).warnings
    assert "2 of 4 samples of val.beton are in train.beton beside it too" in line
    with pytest.raises(UserError) as refused:
        prepared()
    # Samples are ordered by class: 20, 21, 7, 3; and in train 0, 2, 4, 6, ..., 1, 3, 5, 7
    assert "2 of 4 samples of" in str(refused.value)
    assert "val.beton (50.00%) are in" in str(refused.value)
    assert "(first: sample 2 is its sample 9); at most 1% may be" in str(refused.value)
    assert "data.allow_overlap=true" in str(refused.value)


def test_shared_samples_are_reported_whichever_split_is_made_last(make) -> None:
    make("val", [1, 2])
    (line,) = make("train", [0, 1]).warnings
    assert line.startswith("1 of 2 samples of val.beton are in train.beton")
    lines = make("test", [1, 5]).warnings
    assert [line.partition(" (first")[0] for line in lines] == [
        "1 of 2 samples of test.beton are in train.beton beside it too",
        "1 of 2 samples of test.beton are in val.beton beside it too",
    ]


def test_a_few_shared_images_are_only_reported(make, prepared) -> None:
    make("train", [*range(10), 200])
    make("val", range(100, 250))
    (warning,) = prepared().warnings
    assert "1 of 150 samples of" in warning
    assert "(0.67%)" in warning


def test_duplicates_within_one_split_are_ignored(make, prepared) -> None:
    make("train", [0, 0, 1, 1])
    make("val", [2, 2, 3, 3])
    assert prepared().warnings == ()


def test_betons_of_earlier_versions_are_compared_by_digest(make, prepared, tmp_path: Path) -> None:
    make("train", range(4))
    make("val", range(4))
    for split in ("train", "val"):
        beton = tmp_path / "data" / "pets" / f"{split}.beton"
        beton.with_suffix(".samples.bin").unlink()
        earlier, path = digest_file(beton, "xxh3_128"), manifest_path(beton)
        tree = json.loads(path.read_text()) | {"schema_version": 2, "digest": earlier.whole, "chunks": earlier.chunks}
        path.write_text(json.dumps({key: value for key, value in tree.items() if key != "samples_digest"}))
    with pytest.raises(UserError, match="are the same data"):
        prepared()
    make("val", range(1, 5))
    (warning,) = prepared().warnings
    assert "share images was not checked" in warning
    assert "train.beton was made without <name>.samples.bin" in warning


def test_allowing_overlap_does_not_change_the_recipe() -> None:
    plain, allowed = recipe(), recipe(allow_overlap="true")
    assert recipe_hash(plain) == recipe_hash(allowed)
    assert recipe_changes(plain.model_dump(mode="json"), allowed.model_dump(mode="json")) == []


def test_an_evaluation_on_the_training_data_is_reported(make, prepared, tmp_path: Path) -> None:
    make("train", range(4))
    make("val", range(4, 8))
    run = prepared()
    folder = run.run_dir / checkpoint_name(1, 2)
    folder.mkdir(parents=True)
    metadata = CheckpointMetadata(1, 2, run.identity, recipe().model_dump(mode="json"), {}, files={})
    write_checkpoint(folder, state={"net": build_classifier(recipe()).net.state_dict()}, metadata=metadata)
    train = tmp_path / "data" / "pets" / "train.beton"
    (warning,) = evaluate([str(run.run_dir)], train, Protocol()).warnings
    assert warning == f"{train}: the model was trained on it: accuracy there says nothing about new images"
    val = load_manifest(train.with_name("val.beton"))
    assert training_data_note(val, train.with_name("val.beton"), run.identity.data_digest) is None
    assert training_data_note(val, train, "") is None
