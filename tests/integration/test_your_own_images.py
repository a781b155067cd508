"""docs/your_own_images.md runs from top to bottom, in this process: from its sample pictures to predictions."""

from __future__ import annotations

import base64
import re
import shlex
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import mlflow
import pandas
import pytest
import torch
from torchvision.models import resnet18
from typer.main import get_command

import data_prep.cli
import resnet_dist.cli
import resnet_dist.launch.train as train_module
from resnet_dist.launch.execute import in_process
from tests.test_guides import commands

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "your_own_images.md"
APPS: dict[str, Any] = {"data-prep": data_prep.cli.app, "resnet-dist": resnet_dist.cli.app}
CHEAPER = {
    "convert": ["--workers", "0"],
    "train": ["--set", "train.total_epochs=1", "--set", "schedule.warmup.epochs=0"],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder; trainings run in this process."""
    (tmp_path / "cluster").symlink_to(ROOT / "cluster")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(train_module, "ray_session", lambda profile: nullcontext())
    monkeypatch.setattr(train_module, "wait_for_capacity", lambda profile, log: None)
    monkeypatch.setattr(train_module, "ray_group", in_process)
    yield tmp_path
    mlflow.set_tracking_uri(None)  # a process has one: the next tests' would be this one's


def run(command: str, weights: dict[str, str]) -> None:
    program, *words = shlex.split(command)
    words = [weights.get(word, word) for word in words]
    get_command(APPS[program]).main([*words, *CHEAPER.get(words[0], [])], standalone_mode=False)


def test_the_page_leads_from_pictures_to_predictions(folder: Path) -> None:
    text = PAGE.read_text(encoding="utf-8").partition("## What fine-tuning gains")[0]
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(code, {})
    torch.save(resnet18().state_dict(), "resnet18.pth")  # untrained, in place of published weights
    steps = [command for command in commands(PAGE) if command in text.replace("\\\n    ", "")]
    for command in steps:
        if shlex.split(command)[0] in APPS and "train photos.yaml" not in command:  # as tuned.yaml, and takes as long
            run(command, {"torchvision:resnet18.IMAGENET1K_V1": "resnet18.pth"})
    for made in re.findall(r"--(?:output|image|predictions|worst) (\S+)", text):
        assert (folder / made).exists(), made

    mlflow.set_tracking_uri(f"sqlite:///{folder}/runs/mlflow.db")
    model = mlflow.pyfunc.load_model(*re.findall(r"--model-uri (\S+)", text))
    picture = base64.b64encode(next(folder.glob("photos/china/*.jpg")).read_bytes()).decode()
    assert set(model.predict(pandas.DataFrame({"image": [picture]}))["class"]) <= {"china", "flower"}
