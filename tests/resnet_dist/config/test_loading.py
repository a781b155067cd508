"""Recipes and profiles: what is read, what is refused, and what the messages say."""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path

import pytest
import yaml

from resnet_dist.config.loading import flatten, load_profile, load_recipe, recipe_from_yaml, to_yaml
from resnet_dist.config.profile import Profile, absolute_paths
from resnet_dist.config.recipe import recipe_hash
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
CROP = "data.train={kind: random_resized_crop, size: 32"
BICUBIC = "{kind: center_crop, size: 32, resize: 32, interpolation: bicubic}"
TRAIN = "train: {kind: pad_crop, size: 32}"
PROFILES = Path(__file__).parents[3] / "cluster/profiles"
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


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("optim.weight_decay=1e-4", "optim.weight_decay", 1e-4),
        ("optim.lr=5e-2", "optim.lr", 0.05),
        ("recipe.train.total_epochs=7", "train.total_epochs", 7),
        ("data.mean=[1, 2, 3]", "data.mean", (1.0, 2.0, 3.0)),
        ("train.max_steps=null", "train.max_steps", None),
        ("schedule={kind: step, milestone_fractions: [0.5]}", "schedule.kind", "step"),
        ("train.loss.class_weights=balanced", "train.loss.kind", "cross_entropy"),
    ],
)
def test_the_schema_types_files_and_overrides(recipe_file: Path, override: str, path: str, value: object) -> None:
    """PyYAML reads 1e-1 as a string."""
    assert yaml.safe_load("1e-1") == "1e-1"
    assert load_recipe(recipe_file).optim.lr == 0.1
    assert attrgetter(path)(load_recipe(recipe_file, [override])) == value


def test_all_mistakes_are_reported_at_once(recipe_file: Path) -> None:
    text = mistake(recipe_file, "optim.lrr=1", "train.micro_batch_size=60", "seed=-1", "schedule.kind=cosin")
    assert text.count("(") >= 4
    for part in ("4 mistakes", "optim.lrr", "multiple of micro_batch_size (60)", "seed", "schedule"):
        assert part in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "optim.lrr=1",
            "recipe.yaml: optim.lrr: unknown key; did you mean lr? valid keys here: clip_grad_norm, decay, freeze,",
        ),
        (
            "data.train.padd=1",
            "data.train.padd: unknown key; did you mean pad? valid keys here: augment, flip, kind, pad",
        ),
        ("train.total_epochs=soon", "train.total_epochs: should be a valid integer"),
        ("train.total_epochs=soon", "got 'soon'"),
        ("train.micro_batch_size=60", "must be a multiple of micro_batch_size (60)"),
        (
            "data.train={kind: random_resized_crop, size: 32, scale: [0.9, 0.1]}",
            "data.train.scale: must ascend, got [0.9, 0.1]",
        ),
        (
            "data.train={kind: random_resized_crop, size: 32, scale: [0.5, 1.5]}",
            "data.train.scale.1: should be less than or equal to 1",
        ),
        (
            "train.loss={kind: bce, class_weights: [1, 2]}",
            "class_weights has 2 numbers, expected one for each of the 10 classes",
        ),
        ("train.loss={kind: bce, class_weights: equal}", "class_weights: should be null, balanced, or a list"),
        ("data.sampling={kind: balanced, power: 2}", "data.sampling.power: should be less than or equal to 1"),
        ("data.sampling={kind: weighted, weights: {cat: -1}}", "data.sampling.weights.cat: should be greater than"),
        ("optim.lr", "expected key.path=value"),
        ("optim.lr.x=1", "optim.lr is a value, not a section"),
        ("optim.lr=[", "not valid YAML"),
        ("optim.lr=.nan", "finite"),
        ("data.eval.size=40", "must not be larger than resize (32)"),
        (
            f"data={{dataset: d, decoder: ffcv, mean: [0, 0, 0], std: [1, 1, 1], eval: {BICUBIC}, {TRAIN}}}",
            "eval.interpolation: bicubic needs decoder: native",
        ),
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


def test_rare_classes_are_made_up_for_once(recipe_file: Path) -> None:
    both = ["data.sampling.kind=balanced", "train.loss.class_weights=balanced"]
    assert "would both make up for rare classes" in mistake(recipe_file, *both)


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


def test_flatten_gives_dotted_leaves(recipe_file: Path) -> None:
    flat = flatten(load_recipe(recipe_file))
    assert flat["optim.lr"] == "0.1"
    assert flat["schedule.warmup.epochs"] == "0.0"
    assert all(not isinstance(v, dict) for v in flat.values())


def profile_of(tmp_path: Path, *overrides: str, text: str = PROFILE) -> Profile:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    return load_profile(path, overrides)


def test_profile_paths_become_absolute_and_urls_stay(tmp_path: Path) -> None:
    sets = ("profile.workers=3", "sweeps=s3://bucket/runs")
    profile = absolute_paths(profile_of(tmp_path, *sets), Path("/base"))
    assert (str(profile.workers), profile.data_root, profile.storage) == ("3", "/base/data", "/base/runs")
    assert profile.sweeps == "s3://bucket/runs"


def test_data_behind_a_url_needs_a_cache(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data_root s3://b/data: is a URL, and workers read files; set cache"):
        absolute_paths(profile_of(tmp_path, "data_root=s3://b/data"), Path("/base"))
    profile = absolute_paths(profile_of(tmp_path, "data_root=s3://b/data", "cache=nvme"), Path("/base"))
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
    with pytest.raises(UserError, match=message) as caught:
        profile_of(tmp_path, text=PROFILE.replace("{workers", f"{{env: {env}, workers"))
    assert "hun" not in str(caught.value)


def test_numbers_in_a_profiles_env_become_text(tmp_path: Path) -> None:
    assert profile_of(tmp_path, "env={OMP_NUM_THREADS: 1}").env == {"OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(("written", "expected"), [("3", (3, 3)), ("1..8", (1, 8)), ("{min: 2, max: 4}", (2, 4))])
def test_workers_are_a_number_or_a_range(tmp_path: Path, written: str, expected: tuple[int, int]) -> None:
    workers = profile_of(tmp_path, f"workers={written}").workers
    assert (workers.min, workers.max, workers.elastic) == (*expected, expected[0] != expected[1])


@pytest.mark.parametrize(
    ("written", "message"), [("two", "like 1..8"), ("8..1", "must ascend"), ("0", "greater than 0")]
)
def test_wrong_workers(tmp_path: Path, written: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        profile_of(tmp_path, f"workers={written}")


@pytest.mark.parametrize("written", ["many", "0", "-1", "1.5"])
def test_a_launch_has_auto_or_a_number_of_micro_batches(tmp_path: Path, written: str) -> None:
    assert profile_of(tmp_path, "micro_batches_per_launch=auto").micro_batches_per_launch == "auto"
    assert profile_of(tmp_path, "micro_batches_per_launch=2").micro_batches_per_launch == 2
    with pytest.raises(UserError, match=r"p.yaml: micro_batches_per_launch: should be auto or a number from 1, got"):
        profile_of(tmp_path, f"micro_batches_per_launch={written}")


@pytest.mark.parametrize("path", sorted(PROFILES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_profile_of_the_project_loads(path: Path) -> None:
    load_profile(path)
