"""Exported files predict as the net does, for any number of images, and are always checked first."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torchvision.models
from safetensors import safe_open
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

import resnet_dist.models
from resnet_dist.config.loading import load_recipe
from resnet_dist.errors import Fault, UserError
from resnet_dist.models import build_model
from resnet_dist.studies.study import study_recipe
from resnet_dist.training.model import build_classifier
from resnet_dist.weights import export
from resnet_dist.weights.export import export_model
from resnet_dist.weights.keys import match_keys
from resnet_dist.weights.libraries import Keys, library_net
from resnet_dist.weights.source import TrainedModel

NAMES = tuple("0123456789")
DIGITS = Path(__file__).parents[3] / "resnet_dist/recipes/digits_resnet20.yaml"


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


def of_net(monkeypatch: pytest.MonkeyPatch, name: str, **options: Any) -> TrainedModel:
    """A model with statistics that no initialisation gives."""
    sets = [f"model.{key}={value}" for key, value in {"name": name, **options}.items()]
    crops = ["data.eval.size=64", "data.eval.resize=72", "data.eval.interpolation=bicubic"]
    recipe = load_recipe(DIGITS, [*sets, *crops, "data.mean=[120, 110, 100]", "data.std=[60, 50, 40]"])
    trained = TrainedModel("runs/demo", recipe, build_classifier(recipe).eval(), NAMES, "da7a", {"exif": "ignore"})
    for norm in (module for module in trained.classifier.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.running_mean.uniform_(-0.1, 0.1)
        norm.running_var.uniform_(0.5, 1.5)
    monkeypatch.setattr(export, "load_model", lambda source, uri: trained)
    return trained


RESNET_T = {"stem": "deep_tiered", "pooled_projection": "true"}


@pytest.mark.parametrize(
    ("name", "options", "keys", "suffix", "made_by"),
    [
        ("resnet18", {}, None, ".pth", "torchvision.models.resnet18(num_classes=10)"),
        ("resnet10", RESNET_T, None, ".safetensors", "timm.create_model('resnet10t', num_classes=10)"),
        ("resnet20", {"shortcut": "B"}, "own", ".safetensors", "build_model('resnet20', 10, shortcut='B')"),
    ],
)
def test_weights_load_into_the_librarys_net_and_give_the_logits_of_the_model(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
    options: dict[str, Any],
    keys: Keys | None,
    suffix: str,
    made_by: str,
) -> None:
    """By the line of code that its card has."""
    model = of_net(monkeypatch, name, **options)
    path = tmp_path / f"net{suffix}"
    done = export_model("any", path, keys=keys, licence="CC-BY-4.0")
    card = json.loads(done.card.read_text())
    assert made_by in card["load"]
    names = {"torchvision": torchvision, "timm": timm, "torch": torch, "safetensors": safetensors}
    exec(card["load"], names | {"resnet_dist": resnet_dist, "FILE": path}, found := {})
    net = found["net"].eval()
    images = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8)
    floats = images.permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        logits = net((floats - torch.tensor(card["mean"]).view(3, 1, 1)) / torch.tensor(card["std"]).view(3, 1, 1))
        own = model.classifier(images)
    assert own.std(dim=0).min() > 1e-3, "images that all look alike would prove nothing"
    torch.testing.assert_close(logits, own, rtol=0, atol=1e-4 * float(own.abs().max()))
    assert card["input"]["dtype"] == "float32"
    assert card["preprocessing"][-1].startswith("divide by 255, subtract `mean`")
    if suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        assert json.loads(metadata["class_names"]) == list(NAMES)
        assert json.loads(metadata["mean"]) == [0.470588, 0.431373, 0.392157]
        assert json.loads(metadata["transform"]) == {"resize": 72, "size": 64, "interpolation": "bicubic"}
        assert (metadata["license"], metadata["data_digest"], metadata["source"]) == ("CC-BY-4.0", "da7a", "runs/demo")


def test_vgg_gets_timms_names_and_shapes() -> None:
    """Its fully connected layers are convolutions there. Without values, which would take 0.5 GB."""
    model = {"name": "vgg11_bn", "num_classes": 10}
    with torch.device("meta"):
        ours, theirs = build_model(**model).state_dict(), library_net(model, "timm").build()
    state = match_keys(ours, theirs, "vgg").state
    assert [(key, value.shape) for key, value in state.items()] == [
        (key, value.shape) for key, value in theirs.state_dict().items()
    ]
    assert state.keys() != ours.keys()


def test_what_a_library_does_not_have_is_refused(
    model: TrainedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"--keys timm: timm has no net .* model\.name: resnet8 .* use --keys own"):
        export_model("any", tmp_path / "net.pth", keys="timm")
    with pytest.raises(UserError, match=r"--keys own: is for files of weights, \.pth and \.safetensors"):
        export_model("any", tmp_path / "net.pt2", keys="own")
    of_net(monkeypatch, "resnet26", bottleneck_stride="1x1")  # the same tensors, another function
    with pytest.raises(UserError, match=r"--keys timm"):
        export_model("any", tmp_path / "net.pth", keys="timm")
    assert list(tmp_path.iterdir()) == []


def test_an_exported_backbone_trains_a_detector(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """How the paper's experiments on PASCAL and COCO begin; docs/5_watch_recover_publish.md shows these lines."""
    of_net(monkeypatch, "resnet18")
    done = export_model("any", tmp_path / "net.pth")
    state, card = torch.load(done.path), json.loads(done.card.read_text())
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=3)
    problems = backbone.body.load_state_dict(state, strict=False)
    assert (problems.missing_keys, problems.unexpected_keys) == ([], ["fc.weight", "fc.bias"])
    detector = FasterRCNN(
        backbone, num_classes=3, image_mean=card["mean"], image_std=card["std"], min_size=64, max_size=96
    )
    optimizer = torch.optim.SGD([p for p in detector.parameters() if p.requires_grad], lr=0.01)
    picture = torch.rand(3, 64, 80)
    truth = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 48.0]]), "labels": torch.tensor([1])}
    losses = detector.train()([picture], [truth])
    sum(losses.values()).backward()
    optimizer.step()
    assert all(loss.isfinite() for loss in losses.values())
    after = backbone.body.state_dict()
    assert torch.equal(after["conv1.weight"], state["conv1.weight"])  # frozen
    assert not torch.equal(after["layer4.1.conv2.weight"], state["layer4.1.conv2.weight"])


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
    with pytest.raises(UserError, match=r"its name must end in one of \.onnx, \.pt2, \.pt, \.ts, \.pth, \.safetensors"):
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
