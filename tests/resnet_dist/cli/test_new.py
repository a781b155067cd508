"""`resnet-dist new`: it reads a real beton, and the run that it prints can start."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import resnet_dist.cli
from resnet_dist.config.loading import load_profile, load_recipe
from resnet_dist.errors import UserError
from resnet_dist.launch.preflight import prepare
from resnet_dist.models import build_model
from tests.resnet_dist.tiny_data import write_tiny_digits

ROOT = Path(__file__).parents[3]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with my/train.beton and my/val.beton."""
    write_tiny_digits(tmp_path).rename(tmp_path / "my")
    shutil.copytree(ROOT / "cluster" / "profiles", tmp_path / "cluster" / "profiles")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: str) -> None:
    command: Any = typer.main.get_command(resnet_dist.cli.app)
    command.main(["new", *words], standalone_mode=False)


def test_the_printed_command_names_a_run_that_can_start(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("--data", "my/train.beton", "--output", "my.yaml")
    out, err = capsys.readouterr()
    assert out.startswith("my.yaml: resnet20 for 16 images of 4 classes\nnext  resnet-dist train my.yaml --on ")
    assert err == ""
    words = shlex.split(out.splitlines()[1])
    assert f"#   {shlex.join(words[1:])}" in (folder / "my.yaml").read_text().splitlines()
    profile = load_profile(words[words.index("--on") + 1], [words[words.index("--profile-set") + 1]])
    prepared = prepare(load_recipe(words[3]), profile, "run")
    assert prepared.plan.total_steps == 200
    assert prepared.warnings == ()


def test_an_existing_recipe_is_kept_unless_forced(folder: Path) -> None:
    (folder / "my.yaml").write_text("mine")
    with pytest.raises(UserError, match=r"my\.yaml: already exists"):
        run("--data", "my/train.beton", "--output", "my.yaml")
    assert (folder / "my.yaml").read_text() == "mine"
    run("--data", "my/train.beton", "--output", "my.yaml", "--force")
    assert load_recipe("my.yaml").model.num_classes == 4


def test_missing_validation_data_is_warned_of(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "my" / "val.beton").unlink()
    run("--data", "my/train.beton", "--output", "my.yaml", "--net", "resnet50")
    err = capsys.readouterr().err
    assert "my/val.beton: does not exist" in err
    assert "resnet50 shrinks pictures 32 times, and these have 8 px" in err


def test_published_weights_bring_their_transform_and_are_not_downloaded(folder: Path) -> None:
    run("--data", "my/train.beton", "--from", "torchvision:resnet18.IMAGENET1K_V1", "--output", "my.yaml")
    recipe = load_recipe("my.yaml")
    assert (recipe.model.name, recipe.model.num_classes) == ("resnet18", 4)
    assert recipe.model.init is not None
    assert recipe.model.init.weights == "torchvision:resnet18.IMAGENET1K_V1"
    assert recipe.data.mean == (123.675, 116.28, 103.53)


def test_a_file_of_weights_is_checked_against_the_net(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(build_model("resnet20", 10).state_dict(), "w.pth")
    with pytest.raises(UserError, match=r"w\.pth: "):
        run("--data", "my/train.beton", "--from", "w.pth", "--net", "resnet32", "--output", "my.yaml")
    run("--data", "my/train.beton", "--from", "w.pth", "--output", "my.yaml")
    assert "which mean and std" in capsys.readouterr().err
    profile = load_profile("cluster/profiles/laptop.yaml", [f"data_root={folder}"])
    prepared = prepare(load_recipe("my.yaml"), profile, "run")
    assert prepared.recipe.model.init is not None
    assert prepared.recipe.model.init.digest is not None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "my/val.beton"], "give FOLDER/train.beton"),
        (["--data", "none/train.beton"], "none/train.beton: does not exist"),
        (["--data", "my/train.beton", "--net", "resnet51"], "there is no net 'resnet51'"),
        (["--data", "my/train.beton", "--net", "a: b"], "there is no net 'a: b'"),
        (["--data", "my/train.beton", "--net", "resnet50", "--from", "timm:resnet18.a1_in1k"], "is of a resnet18"),
    ],
)
def test_mistakes_write_nothing(folder: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(*words, "--output", "my.yaml")
    assert not (folder / "my.yaml").exists()
