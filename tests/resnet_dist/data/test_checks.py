"""The data of a run: the same on all nodes, its classes the same wherever a run, a model and data meet."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

from data_prep.beton.manifest import Manifest, load_manifest, manifest_path
from data_prep.beton.stage import stage
from data_prep.converter.convert import convert
from data_prep.sources.datasets.builtin import Synthetic
from resnet_dist.config.loading import recipe_from_tree, to_yaml
from resnet_dist.config.profile import Profile, Workers
from resnet_dist.config.recipe import Recipe
from resnet_dist.data.checks import (
    known_pictures,
    lopsided,
    mixed_pictures,
    other_pictures,
    picture_settings,
    with_class_weights,
)
from resnet_dist.errors import UserError
from resnet_dist.evaluation.evaluate import evaluate
from resnet_dist.evaluation.protocols import Protocol
from resnet_dist.launch.preflight import Prepared, describe_run, prepare
from resnet_dist.launch.worker import require_same_data
from resnet_dist.studies.study import study_recipe
from resnet_dist.sweeps.ledger import open_ledger
from resnet_dist.sweeps.prepare import prepare_sweep
from resnet_dist.training.checkpoint import METADATA, CheckpointMetadata, Identity, checkpoint_name, write_checkpoint
from resnet_dist.training.model import build_classifier
from resnet_dist.weights.export import export_model
from tests.resnet_dist.tiny_data import write_tiny_digits

RECIPE = Path(__file__).parents[3] / "resnet_dist/recipes/digits_resnet20.yaml"


def beton(path: Path, num_samples: int) -> Path:
    source = Synthetic(num_samples=num_samples, min_side=8, max_side=8)
    convert(source, path)
    return path


APPLY = {"exif": "apply", "background": [255, 0, 0], "max_side": 500}
PLAIN = {"exif": "ignore", "background": None, "max_side": None}


@pytest.mark.parametrize(
    ("settings", "found", "is_mixed"),
    [
        ({"exif": "apply", "quality": 95}, {**PLAIN, "exif": "apply"}, False),  # as earlier versions wrote it
        ({**APPLY, "quality": 95}, APPLY, False),
        ({}, PLAIN, False),
        ({"inputs": [APPLY, {"inputs": [APPLY, APPLY]}]}, APPLY, False),
        ({"inputs": [APPLY, {"inputs": [APPLY, {**APPLY, "exif": "ignore"}]}]}, {**APPLY, "exif": "ignore"}, True),
        ({"inputs": [APPLY, {**APPLY, "max_side": 64}]}, {**APPLY, "max_side": None}, False),
    ],
)
def test_how_pictures_were_converted_is_read_from_a_manifest(
    tmp_path: Path, settings: Any, found: dict[str, Any], is_mixed: bool
) -> None:
    manifest = replace(load_manifest(beton(tmp_path / "all.beton", 2)), settings=settings)
    assert picture_settings(manifest) == found
    assert (mixed_pictures(manifest, "x.beton") is not None) is is_mixed


@pytest.mark.parametrize("bad", [{"exif": "perhaps"}, {"background": [1, 2]}, {"background": "red"}, {"max_side": -1}])
def test_settings_that_no_conversion_has_are_refused(tmp_path: Path, bad: Any) -> None:
    manifest = replace(load_manifest(beton(tmp_path / "all.beton", 2)), settings={**PLAIN, **bad})
    with pytest.raises(UserError, match="are not ones that data-prep writes"):
        picture_settings(manifest)
    assert known_pictures({**PLAIN, **bad}) is None


def test_data_converted_differently_is_reported() -> None:
    assert other_pictures(APPLY, {**APPLY, "max_side": None}, "a", "b") is None
    assert str(other_pictures(PLAIN, APPLY, "runs/a", "val.beton")).startswith(
        "runs/a was converted with --exif ignore, val.beton with apply: the model sees other pixels"
    )
    assert "--background None" in str(other_pictures(PLAIN, {**PLAIN, "background": [0, 0, 0]}, "a", "b"))


# The names of the classes and their order go wherever a run and its model go, and are compared wherever two meet.


ANIMALS = ("ant", "bee", "cat", "dog")
SWAPPED = ("ant", "cat", "bee", "dog")
MINERALS = ("agate", "beryl", "coral", "opal")


def rename(beton: Path, names: Sequence[str], **fields: object) -> Path:
    """Other names for the same images, as another order of folders would give them."""
    tree = json.loads(manifest_path(beton).read_text()) | {"class_names": list(names)} | fields
    manifest_path(beton).write_text(json.dumps(tree))
    return beton


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data set of four classes under tmp_path/digits."""
    folder = write_tiny_digits(tmp_path)
    for name in ("train", "val"):  # when both are there: convert compares the classes of splits
        rename(folder / f"{name}.beton", ANIMALS)
    return folder


@pytest.fixture
def recipe() -> Recipe:
    return study_recipe(
        "resnet8", overrides=["model.num_classes=4", "train.global_batch_size=8", "train.micro_batch_size=8"]
    )


@pytest.fixture
def profile(tmp_path: Path) -> Profile:
    return Profile(
        workers=Workers(min=1, max=1),
        cpus_per_worker=1,
        data_root=str(tmp_path),
        storage=str(tmp_path / "runs"),
        tracking_uri="sqlite:////m.db",
    )


@pytest.fixture
def prepared(data: Path, recipe: Recipe, profile: Profile) -> Callable[[], Prepared]:
    return lambda: prepare(recipe, profile, "r")


FROM_DATA = ["data.mean=from_data", "data.std=from_data"]


def test_mean_and_deviation_of_the_data_become_numbers_before_a_run_has_an_identity(
    data: Path, recipe: Recipe, profile: Profile
) -> None:
    written = recipe_from_tree(recipe.model_dump(mode="json"), dict(key.split("=") for key in FROM_DATA))
    found = load_manifest(data / "train.beton").statistics
    prepared = prepare(written, profile, "r")
    numbers = recipe_from_tree(
        recipe.model_dump(mode="json"),
        {f"data.{name}": [round(level, 3) for level in found[name]] for name in ("mean", "std")},
    )
    assert prepared.recipe == numbers
    assert prepared.identity == prepare(numbers, profile, "r").identity != prepare(recipe, profile, "r").identity
    assert "from_data" not in describe_run(written, profile, "r")
    with pytest.raises(UserError, match=r"data\.mean or data\.std is from_data, and here is no training data"):
        build_classifier(written)


def test_data_without_them_is_refused_with_the_command_that_adds_them(
    data: Path, recipe: Recipe, profile: Profile
) -> None:
    written = recipe_from_tree(recipe.model_dump(mode="json"), {"data.std": "from_data"})
    rename(data / "train.beton", ANIMALS, statistics={})
    with pytest.raises(UserError, match=r"no mean .* data\.std: from_data; .*`data-prep statistics .*/train\.beton`"):
        prepare(written, profile, "r")
    rename(data / "train.beton", ANIMALS, statistics={**STATISTICS, "std": [0.0, 0.0, 0.0]})
    with pytest.raises(UserError, match="its mean and deviation are not usable: data: std must be positive"):
        prepare(written, profile, "r")


STATISTICS = {"size": 128, "mean": [1.0, 2.0, 3.0], "std": [1.0, 1.0, 1.0], "num_images": 1, "num_pixels": 1}


def save(prepared: Prepared, recipe: Recipe, step: int = 2) -> Path:
    """A checkpoint of the run, as training writes it."""
    folder = prepared.run_dir / checkpoint_name(1, step)
    folder.mkdir(parents=True)
    metadata = CheckpointMetadata(
        1, step, prepared.identity, recipe.model_dump(mode="json"), {"val/top1": 50.0}, files={}
    )
    write_checkpoint(folder, state={"net": build_classifier(recipe).net.state_dict()}, metadata=metadata)
    return folder


def forget_names(checkpoint: Path) -> None:
    """As earlier versions wrote it."""
    metadata = json.loads((checkpoint / METADATA).read_text())
    del metadata["identity"]["class_names"]
    (checkpoint / METADATA).write_text(json.dumps(metadata))


def test_val_and_train_agree(data: Path, prepared: Callable[[], Prepared]) -> None:
    assert prepared().identity.class_names == ANIMALS
    rename(data / "val.beton", SWAPPED)
    with pytest.raises(
        UserError, match=r"class 1 is 'bee' in train\.beton, 'cat' in val\.beton; the names are the same"
    ):
        prepared()


def test_a_class_that_val_lacks_is_named(data: Path, prepared: Callable[[], Prepared]) -> None:
    rename(data / "val.beton", ("ant", "cat", "dog"), class_counts=[3, 3, 2])
    with pytest.raises(
        UserError, match=r"val\.beton has no 'bee'; class 1 is 'bee' in train\.beton \(4 classes\), 'cat'"
    ):
        prepared()
    rename(data / "val.beton", ANIMALS, class_counts=[4, 0, 2, 2])
    assert prepared().warnings == (f"{data}/val.beton: has no images of 'bee'",)


def lopsided_manifest(counts: tuple[int, ...]) -> Manifest:
    """Of as many classes, by number of images. Nothing else of it is used."""
    return cast(
        Manifest,
        SimpleNamespace(class_counts=counts, num_samples=sum(counts), class_names=tuple("abcdefgh"[: len(counts)])),
    )


def test_balanced_class_weights_become_scikit_learns(recipe: Recipe) -> None:
    assert with_class_weights(recipe, lopsided_manifest((4, 4))) is recipe
    asked = recipe_from_tree(recipe.model_dump(mode="json"), {"train.loss.class_weights": "balanced"})
    labels = np.repeat([0, 1, 3], [7, 90, 3])
    found = with_class_weights(asked, lopsided_manifest((7, 90, 0, 3))).train.loss.class_weights
    expected = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=labels)
    assert found == pytest.approx((expected[0], expected[1], 1.0, expected[2]), rel=1e-5)
    assert found == (4.7619, 0.37037, 1.0, 11.1111)


def test_a_run_has_the_numbers_of_balanced_class_weights(
    data: Path, prepared: Callable[[], Prepared], recipe: Recipe, profile: Profile
) -> None:
    asked = recipe_from_tree(recipe.model_dump(mode="json"), {"train.loss.class_weights": "balanced"})
    run = prepare(asked, profile, "r")
    assert run.recipe.train.loss.class_weights == (1.0, 1.0, 1.0, 1.0)
    written = recipe_from_tree(recipe.model_dump(mode="json"), {"train.loss.class_weights": [1, 1, 1, 1]})
    assert run.identity == prepare(written, profile, "r").identity != prepared().identity


def test_lopsided_data_is_reported_unless_the_recipe_deals_with_it(recipe: Recipe) -> None:
    assert lopsided(recipe, lopsided_manifest((732, 1300, 1300, 0)), "t") is None  # as ImageNet's
    warning = lopsided(recipe, lopsided_manifest((5000, 12, 300)), "t.beton")
    assert str(warning).startswith("t.beton: is lopsided: 5,000 images of 'a', 12 of 'b'; consider data.sampling.kind=")
    for key, value in (("train.loss.class_weights", "balanced"), ("data.sampling", {"kind": "balanced"})):
        other = recipe_from_tree(recipe.model_dump(mode="json"), {key: value})
        assert lopsided(other, lopsided_manifest((5000, 12)), "t") is None


@pytest.mark.parametrize(
    ("names", "words"), [(SWAPPED, "class 1 is 'bee' in the run, 'cat'.*their order is not"), (MINERALS, "class 0 is")]
)
def test_a_run_resumes_only_with_its_own_names(
    data: Path, prepared: Callable[[], Prepared], recipe: Recipe, names: tuple[str, ...], words: str
) -> None:
    save(prepared(), recipe)
    assert prepared().warnings == ()
    for beton in ("train.beton", "val.beton"):
        rename(data / beton, names)
    with pytest.raises(UserError, match=f"{words}.*use a new --name"):
        prepared()


def test_a_run_without_names_resumes_with_a_word(prepared: Callable[[], Prepared], recipe: Recipe) -> None:
    forget_names(save(prepared(), recipe))
    (warning,) = prepared().warnings
    assert "keeps no class names" in warning


def test_every_node_has_the_runs_data_and_names(data: Path, prepared: Callable[[], Prepared]) -> None:
    job = prepared().job()
    require_same_data(job)
    require_same_data(replace(job, identity=replace(job.identity, class_names=())))
    with pytest.raises(UserError, match=r"holds data train=[0-9a-f]{32} val=.*, the run is of train=.*; put the same"):
        require_same_data(replace(job, train_beton=data / "val.beton"))
    rename(data / "val.beton", SWAPPED)
    with pytest.raises(UserError, match=r"other class names: class 1 is 'cat' in this node's betons, 'bee' in the run"):
        require_same_data(job)


def test_a_staged_copy_takes_the_sources_names(data: Path, tmp_path: Path) -> None:
    staged = stage(data / "val.beton", tmp_path / "cache")
    rename(data / "val.beton", MINERALS)
    assert stage(data / "val.beton", tmp_path / "cache") == staged
    assert load_manifest(staged).class_names == MINERALS


def test_evaluate_refuses_data_of_other_classes(data: Path, prepared: Callable[[], Prepared], recipe: Recipe) -> None:
    run = save(prepared(), recipe)
    beton = data / "val.beton"
    right = evaluate([str(run)], beton, Protocol())
    assert right.warnings == ()
    rename(beton, MINERALS)
    refused = r"class 0 is 'ant' in .*step=0*2, 'agate' in .*val\.beton; convert it .* add --ignore-class-names"
    for sources in ([str(run)], [str(run), str(run)]):
        with pytest.raises(UserError, match=refused):
            evaluate(sources, beton, Protocol())
    assert evaluate([str(run)], beton, Protocol(), ignore_class_names=True).result.top1 == right.result.top1
    rename(beton, ANIMALS[:3], class_counts=[3, 3, 2])
    with pytest.raises(UserError, match=r"class 3 is 'dog' in .*missing"):
        evaluate([str(run)], beton, Protocol())


def test_evaluate_reports_what_it_could_not_compare(
    data: Path, prepared: Callable[[], Prepared], recipe: Recipe
) -> None:
    old, new = save(prepared(), recipe), save(prepared(), recipe, step=4)
    forget_names(old)
    done = evaluate([str(old), str(new)], data / "val.beton", Protocol())
    (warning,) = done.warnings
    assert warning.startswith(f"{old}: keeps no class names")


def test_a_checkpoint_alone_is_exported_with_its_names(
    data: Path, prepared: Callable[[], Prepared], recipe: Recipe, tmp_path: Path
) -> None:
    run = save(prepared(), recipe)
    done = export_model(str(run), tmp_path / "net.pt")
    assert json.loads(done.card.read_text())["class_names"] == list(ANIMALS)
    rename(data / "val.beton", MINERALS)
    with pytest.raises(UserError, match=r"class 0 is 'ant' in .*'agate' in .*leave --data out"):
        export_model(str(run), tmp_path / "other.pt", data=data / "val.beton")
    assert not (tmp_path / "other.pt").exists()
    forget_names(run)
    done = export_model(str(run), tmp_path / "net.pt", data=data / "val.beton")
    assert json.loads(done.card.read_text())["class_names"] == list(MINERALS)
    assert "keeps no class names" in done.warnings[0]


def test_damaged_names_make_a_damaged_card(prepared: Callable[[], Prepared], recipe: Recipe) -> None:
    run = save(prepared(), recipe)
    metadata: dict[str, Any] = json.loads((run / METADATA).read_text())
    metadata["identity"]["class_names"] = [1, 2, 3, 4]
    (run / METADATA).write_text(json.dumps(metadata))
    assert prepared().lost == (run.name,)
    assert Identity("r", "d", ("a",)).matches(Identity("r", "d"))


def test_a_sweep_resumes_only_with_its_own_names(data: Path, tmp_path: Path, recipe: Recipe, profile: Profile) -> None:
    (tmp_path / "base.yaml").write_text(to_yaml(recipe))
    space = tmp_path / "space.yaml"
    space.write_text("base: base.yaml\nspace: {optim.lr: {kind: choice, values: [0.1, 0.2]}}\nsearch: {kind: grid}\n")
    sweep = prepare_sweep(space, [], profile, "s")
    assert tuple(sweep.began.class_names) == ANIMALS
    with open_ledger(sweep.sweep_dir) as ledger:
        ledger.append(sweep.began)
    prepare_sweep(space, [], profile, "s")
    for beton in ("train.beton", "val.beton"):
        rename(data / beton, SWAPPED)
    with pytest.raises(UserError, match="class 1 is 'bee' in the sweep, 'cat' in data_root"):
        prepare_sweep(space, [], profile, "s")
