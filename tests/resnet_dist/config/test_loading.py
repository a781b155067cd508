"""Recipes and profiles: what is read, what is refused, and what the messages say."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from resnet_dist.config.loading import flatten, load_profile, load_recipe, recipe_from_yaml, to_yaml
from resnet_dist.config.profile import absolute_paths
from resnet_dist.config.recipe import Recipe, recipe_hash
from resnet_dist.errors import UserError

RECIPE = """
seed: 3
model: {name: resnet20, num_classes: 10}
data:
  dataset: digits
  train: {kind: pad_crop, size: 32, pad: 2, flip: false}
  eval: {kind: center_crop, size: 32, resize: 32}
  mean: [0, 0, 0]
  std: [1, 1, 1]
train: {global_batch_size: 128, micro_batch_size: 64, total_epochs: 2}
optim: {name: sgd, lr: 1e-1, weight_decay: 1e-4}
schedule: {kind: cosine}
eval: {batch_size: 250}
"""
PROFILE = "{workers: 2, cpus_per_worker: 1, data_root: data, storage: runs, tracking_uri: 'sqlite:///m.db'}"


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def mistake(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_exponents_are_numbers(recipe_file: Path) -> None:
    assert yaml.safe_load("1e-3") == "1e-3"  # the trap the schema closes
    assert load_recipe(recipe_file).optim.lr == 0.1
    assert load_recipe(recipe_file, ["optim.lr=5e-2"]).optim.lr == 0.05


def test_overrides_are_typed_by_the_schema(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["recipe.train.total_epochs=7", "data.mean=[1, 2, 3]", "train.max_steps=null"])
    assert (recipe.train.total_epochs, recipe.data.mean, recipe.train.max_steps) == (7, (1.0, 2.0, 3.0), None)


def test_a_whole_section_can_be_replaced(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["schedule={kind: step, milestone_fractions: [0.5]}"])
    assert recipe.schedule.kind == "step"


def test_an_unknown_key_is_named_with_the_valid_ones(recipe_file: Path) -> None:
    text = mistake(recipe_file, "optim.lrr=1")
    assert "optim.lrr: unknown key; did you mean lr? valid keys here: clip_grad_norm, decay, lr," in text
    assert str(recipe_file) in text


def test_an_unknown_key_in_a_kind_of_section(recipe_file: Path) -> None:
    assert "data.train.padd: unknown key; did you mean pad? valid keys here: augment, flip, kind, pad, size" in mistake(
        recipe_file, "data.train.padd=1"
    )


def test_a_wrong_type_is_named_with_its_value(recipe_file: Path) -> None:
    assert "train.total_epochs: should be a valid integer" in mistake(recipe_file, "train.total_epochs=soon")
    assert "'soon'" in mistake(recipe_file, "train.total_epochs=soon")


def test_all_mistakes_are_reported_at_once(recipe_file: Path) -> None:
    text = mistake(recipe_file, "optim.lrr=1", "train.micro_batch_size=60", "seed=-1", "schedule.kind=cosin")
    assert text.count("(") >= 4
    for part in ("4 mistakes", "optim.lrr", "multiple of micro_batch_size (60)", "seed", "schedule"):
        assert part in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr", "expected key.path=value"),
        ("optim.lr.x=1", "optim.lr is a value, not a section"),
        ("optim.lr=[", "not valid YAML"),
        ("optim.lr=.nan", "finite"),
        ("data.eval.size=40", "must not be larger than resize (32)"),
        ("data.dataset=../secrets", "data.dataset"),
        ("data.mean=[0.485, 0.456, 0.406]", "look like shares of 1"),
        ("data.std=[0.229, 0.224, 0.225]", "multiply them by 255"),
        ("data.mean=[500, 0, 0]", "not grey levels"),
        ("data.mean=[-1, 0, 0]", "not grey levels"),
        ("train.total_epochs=yes", "total_epochs is a number, got true"),
        ("optim.lr=true", "is a number, got true"),
        ("train.max_steps=on", "is a number, got true"),
        ("seed=010", "in two ways"),
        ("optim.lr=1:30.5", "in two ways"),
    ],
)
def test_bad_overrides(recipe_file: Path, override: str, message: str) -> None:
    assert message in mistake(recipe_file, override)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("seed: 1\nseed: 2\n", "'seed' occurs twice"),
        ("- a\n", "expected a mapping"),
        ("a: [", "not valid YAML"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_bad_files(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    assert message in mistake(path)


def test_a_missing_file_is_a_mistake(tmp_path: Path) -> None:
    assert "cannot be read" in mistake(tmp_path / "none.yaml")


def test_resolved_yaml_loads_to_an_equal_recipe_and_hash(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    again = recipe_from_yaml(to_yaml(recipe), "a checkpoint")
    assert again == recipe
    assert recipe_hash(again) == recipe_hash(recipe)


def test_the_hash_sees_every_leaf_and_no_default_spelt_out(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    spelt_out = load_recipe(recipe_file, ["optim.momentum=0.9"])
    changed = [load_recipe(recipe_file, [o]) for o in ("seed=4", "optim.momentum=0.8", "data.train.flip=true")]
    assert recipe_hash(spelt_out) == recipe_hash(recipe)
    assert len({recipe_hash(r) for r in (recipe, *changed)}) == 4


@given(st.integers(1, 64), st.integers(1, 64))
def test_micro_batches_are_whole(num_micro_batches: int, micro_batch_size: int) -> None:
    tree = yaml.safe_load(RECIPE)
    tree["train"] |= {"global_batch_size": num_micro_batches * micro_batch_size, "micro_batch_size": micro_batch_size}
    assert Recipe.model_validate(tree).train.num_micro_batches == num_micro_batches


def test_flatten_gives_dotted_leaves(recipe_file: Path) -> None:
    flat = flatten(load_recipe(recipe_file))
    assert flat["optim.lr"] == "0.1"
    assert flat["schedule.warmup.epochs"] == "0.0"
    assert all(not isinstance(v, dict) for v in flat.values())


def test_profile_paths_become_absolute(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(PROFILE)
    profile = absolute_paths(load_profile(path, ["profile.workers=3"]), Path("/base"))
    assert (str(profile.workers), profile.data_root, profile.storage) == ("3", "/base/data", "/base/runs")


def test_data_behind_a_url_needs_a_cache(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(PROFILE.replace("data_root: data", "data_root: 's3://b/data'"))
    with pytest.raises(UserError, match=r"data_root s3://b/data: is a URL, and workers read files; set cache"):
        absolute_paths(load_profile(path), Path("/base"))
    profile = absolute_paths(load_profile(path, ["cache=nvme"]), Path("/base"))
    assert (profile.data_root, profile.cache) == ("s3://b/data", "/base/nvme")


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ("{AWS_SECRET_ACCESS_KEY: abc}", r"AWS_SECRET_ACCESS_KEY is a secret"),
        *((f"{{{key}: abc}}", f"{key} is a secret") for key in ("WANDB_API_KEY", "HF_PASSWD", "aws_access_key_id")),
        *((f"{{{key}: hunter2}}", f"{key} is a secret") for key in ("GITHUB_PAT", "DATABASE_URL", "SMTP_PWD")),
        ("{HTTPS_PROXY: 'http://me:hun/ter2@proxy:3128'}", r"HTTPS_PROXY is a secret"),
        ("{MY_TOKEN: [hunter2]}", r"MY_TOKEN is a secret"),
        ("{NVIDIA_TF32_OVERRIDE: 0}", r"NVIDIA_TF32_OVERRIDE changes the arithmetic"),
        ("{NCCL_IB_DISABLE: yes}", r"NCCL_IB_DISABLE"),
    ],
)
def test_no_secret_and_no_arithmetic_in_a_profiles_env(tmp_path: Path, env: str, message: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(PROFILE.replace("{workers", f"{{env: {env}, workers"))
    with pytest.raises(UserError, match=message) as caught:
        load_profile(path)
    assert "hun" not in str(caught.value)


def test_numbers_in_a_profiles_env_become_text(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(PROFILE.replace("{workers", "{env: {OMP_NUM_THREADS: 1}, workers"))
    assert load_profile(path).env == {"OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(("written", "expected"), [("3", (3, 3)), ("1..8", (1, 8)), ("{min: 2, max: 4}", (2, 4))])
def test_workers_are_a_number_or_a_range(tmp_path: Path, written: str, expected: tuple[int, int]) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(PROFILE)
    workers = load_profile(path, [f"workers={written}"]).workers
    assert (workers.min, workers.max, workers.elastic) == (*expected, expected[0] != expected[1])


@pytest.mark.parametrize(
    ("written", "message"), [("two", "like 1..8"), ("8..1", "must ascend"), ("0", "greater than 0")]
)
def test_wrong_workers(tmp_path: Path, written: str, message: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(PROFILE)
    with pytest.raises(UserError, match=message):
        load_profile(path, [f"workers={written}"])


def test_a_url_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(PROFILE)
    profile = absolute_paths(load_profile(path, ["storage=s3://bucket/runs"]), Path("/base"))
    assert profile.storage == "s3://bucket/runs"


def test_every_recipe_and_profile_of_the_project_loads() -> None:
    root = Path(__file__).parents[3]
    recipes = sorted((root / "resnet_dist" / "recipes").rglob("*.yaml"))
    profiles = sorted((root / "cluster" / "profiles").rglob("*.yaml"))
    assert len(recipes) >= 3
    assert len(profiles) >= 1
    for path in recipes:
        load_recipe(path)
    for path in profiles:
        load_profile(path)
