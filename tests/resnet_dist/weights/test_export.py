"""Exported files predict as the net does, for any number of images, and are always checked first."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from resnet_dist.errors import Fault, UserError
from resnet_dist.studies.study import study_recipe
from resnet_dist.training.model import build_classifier
from resnet_dist.weights import export
from resnet_dist.weights.export import export_model
from resnet_dist.weights.source import TrainedModel

NAMES = tuple("0123456789")


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> TrainedModel:
    recipe = study_recipe("resnet8")
    trained = TrainedModel("models:/digits@champion", recipe, build_classifier(recipe).eval(), NAMES)
    monkeypatch.setattr(export, "load_model", lambda source, uri: trained)
    return trained


@pytest.mark.parametrize("name", ["net.pt2", "net.pt", pytest.param("net.onnx", marks=pytest.mark.slow)])
def test_the_file_gives_the_nets_logits_and_a_card_says_how_to_use_it(
    model: TrainedModel, tmp_path: Path, name: str
) -> None:
    if name.endswith("onnx"):
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    done = export_model("any", tmp_path / "new" / name)
    assert done.max_difference <= export.TOLERANCE * done.largest_logit
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [name, f"{name}.json"]
    card = json.loads(done.card.read_text())
    assert card["class_names"] == list(NAMES)
    assert card["input"]["shape"] == ["N", 8, 8, 3]
    assert card["preprocessing"][0].startswith("resize so that the shorter side is 8 px")
    assert card["decoding"] == [
        "do not rotate the picture by its EXIF orientation; make it RGB of 8 bits: of 16 bits the upper 8, "
        "drop alpha, no colour profile"
    ]
    (warning,) = done.warnings
    assert warning.startswith("models:/digits@champion: does not know how its data was converted")
    assert card["recipe_hash"] == model.recipe_hash


def test_the_card_says_what_conversion_did_to_the_data(
    model: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = {"exif": "apply", "background": [255, 0, 0], "max_side": 500}
    trained = replace(model, pictures=pictures)
    monkeypatch.setattr(export, "load_model", lambda source, uri: trained)
    done = export_model("any", tmp_path / "net.pt")
    first, second = json.loads(done.card.read_text())["decoding"]
    assert first.startswith("rotate the picture by its EXIF orientation")
    assert "composite it onto the colour [255, 0, 0]" in first
    assert second.startswith("shrink it so that the longer side is at most 500 px")
    assert done.warnings == ()


def test_a_file_that_predicts_differently_is_not_kept(
    model: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(export._RUNNERS, "pt2", lambda path, images: model.classifier(images) + 0.1)
    with pytest.raises(Fault, match=r"differ by up to 0\.1"):
        export_model("any", tmp_path / "net.pt2")
    assert list(tmp_path.iterdir()) == []


def test_nets_that_cannot_be_exported_are_refused(
    model: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"its name must end in one of \.onnx, \.pt2, \.pt, \.ts"):
        export_model("any", tmp_path / "net.bin")
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(UserError, match=r"folder\.pt2: is a folder"):
        export_model("any", tmp_path / "folder.pt2")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"net\.pt2: cannot be written"):
        export_model("any", tmp_path / "file" / "net.pt2")
    nameless = TrainedModel("runs/demo", model.recipe, model.classifier, None)
    monkeypatch.setattr(export, "load_model", lambda source, uri: nameless)
    with pytest.raises(UserError, match=r"give --data FILE\.beton"):
        export_model("runs/demo", tmp_path / "net.pt2")


def test_a_net_that_gives_nan_is_reported(model: TrainedModel, tmp_path: Path) -> None:
    with torch.no_grad():
        next(model.classifier.parameters()).fill_(torch.nan)
    with pytest.raises(Fault, match="gives NaN or infinity for image 0 of the check"):
        export_model("any", tmp_path / "net.pt2")
    assert list(tmp_path.iterdir()) == []


def test_logits_that_are_nan_do_not_pass(model: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(export._RUNNERS, "pt2", lambda path, images: torch.full((len(images), 10), float("nan")))
    with pytest.raises(Fault):
        export_model("any", tmp_path / "net.pt2")
