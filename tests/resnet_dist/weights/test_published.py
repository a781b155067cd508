"""torchvision's and timm's own nets are the oracle: with the same weights, found by name or structure, equal logits."""

from __future__ import annotations

import csv
import hashlib
from importlib import resources
from pathlib import Path

import pytest
import timm
import torch
import torchvision.models
from torch import Tensor, nn

from resnet_dist.errors import UserError
from resnet_dist.models import MODEL_NAMES, build_model
from resnet_dist.weights.keys import match_keys
from resnet_dist.weights.published import published, published_file
from resnet_dist.weights.source import load_model
from tests.resnet_dist.weights.randomised import randomise


@torch.no_grad()
def logits(net: nn.Module, images: Tensor) -> Tensor:
    return net.eval()(images)


@pytest.fixture(autouse=True)
def _empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    "name",
    [
        "resnet10t.c3_in1k",
        "resnet18d.ra2_in1k",
        "resnet50c.gluon_in1k",
        "resnet26.bt_in1k",
        "resnetrs50.tf_in1k",
        "seresnext26d_32x4d.bt_in1k",
        "vgg11.tv_in1k",
    ],
)
def test_timms_nets_give_equal_logits(name: str) -> None:
    theirs = timm.create_model(name, pretrained=False)
    if "vgg" not in name:  # which has no norms
        randomise(theirs)
    with torch.device("meta"):
        ours = build_model(**published(f"timm:{name}").model)
    matched = match_keys(theirs.state_dict(), ours, name)
    assert (matched.missing, matched.unexpected, matched.head_differs) == ((), (), False)
    ours.load_state_dict(matched.state, assign=True)
    images = torch.randn(2, 3, *([224, 224] if "vgg" in name else [72, 80]), generator=torch.Generator().manual_seed(2))
    expected = logits(theirs, images)
    torch.testing.assert_close(logits(ours, images), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("resnetblur50.bt_in1k", "BlurPool2d"),
        ("resnetaa50.a1h_in1k", r"its layer2.0.conv2 is .*stride=\(1, 1\)"),
        ("ecaresnet50t.a1_in1k", "its layer1.0.se.conv is Conv1d"),
        ("resnet50_gn.a1h_in1k", "GroupNorm"),
        ("resnet50s.gluon_in1k", "its stem has 64, 64, 128 channels"),
        ("resnetv2_50.a1h_in1k", "ResNetV2"),
        ("skresnet18.ra_in1k", "SelectiveKernelBasic"),
        ("legacy_seresnet18.in1k", "SENet"),
        ("resnet50.bamboo", "has no classifier"),
    ],
)
def test_nets_of_timm_that_cannot_be_built_are_refused_in_one_line(name: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"^timm:{name}: is of a net that this project does not have: .*{reason}"):
        published(f"timm:{name}")


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("wide_resnet50_2.tv2_in1k", {"name": "wide_resnet50_2"}),
        ("resnext101_32x16d.fb_wsl_ig1b_ft_in1k", {"name": "resnet101", "groups": 32, "base_width": 16}),
        ("seresnext50_32x4d.racm_in1k", {"name": "resnext50_32x4d", "se_ratio": 0.0625}),
        ("resnet26t.ra2_in1k", {"name": "resnet26", "stem": "deep_tiered", "pooled_projection": True}),
    ],
)
def test_nets_of_timm_as_options(name: str, model: dict[str, object]) -> None:
    assert published(f"timm:{name}").model == {**model, "num_classes": 1000}


def test_timms_test_transform_and_accuracy() -> None:
    known = published("timm:resnet50.a1_in1k")
    assert (known.size, known.resize, known.interpolation) == (288, 288, "bicubic")
    assert (known.top1, known.top5) == (81.240, 95.112)
    known = published("timm:resnet18d.ra2_in1k")  # 288 / 0.95 = 303.2
    assert (known.size, known.resize) == (288, 303)


def test_every_accuracy_of_timm_is_of_weights_that_it_has() -> None:
    with (resources.files("resnet_dist.weights") / "timm_accuracy.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["model"] for row in rows} <= set(timm.list_models(pretrained=True))
    assert all(0 < float(row["top1"]) < float(row["top5"]) < 100 for row in rows)


def test_every_entry_of_torchvision_is_known() -> None:
    nets = [name for name in torchvision.models.list_models(module=torchvision.models) if name in MODEL_NAMES]
    assert {"resnet152", "resnext101_64x4d", "wide_resnet101_2", "vgg19_bn", "googlenet"} <= set(nets)
    for net in nets:
        for entry in torchvision.models.get_model_weights(net):
            known = published(f"torchvision:{net}.{entry.name}")
            accuracy = entry.meta["_metrics"].get("ImageNet-1K", {}).get("acc@1")
            assert known.top1 == accuracy or entry.name == "IMAGENET1K_FEATURES"
            assert (known.model["name"], known.size) == (net, 224)
    known = published("torchvision:resnet152.IMAGENET1K_V2")
    assert (known.resize, known.interpolation, known.mean) == (232, "bilinear", (123.675, 116.28, 103.53))


def test_googlenets_inputs_are_converted_by_mean_and_deviation(tmp_path: Path) -> None:
    theirs = torchvision.models.googlenet(aux_logits=True, transform_input=True, init_weights=False)
    torch.save(randomise(theirs).state_dict(), tmp_path / "googlenet.pth")
    source = "torchvision:googlenet.IMAGENET1K_V1"
    model = load_model(source, weights=tmp_path / "googlenet.pth")
    assert all(name.startswith("aux") for name in model.unexpected)
    images = torch.randint(0, 256, (2, 96, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    prepared = torchvision.models.get_weight("GoogLeNet_Weights.IMAGENET1K_V1").transforms(crop_size=96, resize_size=96)
    expected = logits(theirs, prepared(images.permute(0, 3, 1, 2)))
    torch.testing.assert_close(logits(model.classifier, images), expected, rtol=1e-4, atol=1e-3)


def test_a_file_in_the_cache_is_checked_against_the_digest_in_its_name(tmp_path: Path) -> None:
    path = tmp_path / "torch" / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"something else")
    with pytest.raises(
        UserError, match=r"resnet18-f37072fd\.pth: is damaged: its SHA-256 does not begin with f37072fd"
    ):
        published_file("torchvision:resnet18.IMAGENET1K_V1")
    assert not hashlib.sha256(b"something else").hexdigest().startswith("f37072fd")


def test_without_a_file_one_line_says_which_to_bring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(url: str, method: str = "GET") -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr("resnet_dist.weights.published._open", no_network)
    with pytest.raises(UserError) as caught:
        published_file("torchvision:resnet152.IMAGENET1K_V1")
    assert "download https://download.pytorch.org/models/resnet152-394f9c45.pth elsewhere" in str(caught.value)
    assert f"put it into {tmp_path / 'torch' / 'hub' / 'checkpoints'}" in str(caught.value)
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set.*resolve/main/model\.safetensors.*--weights FILE"):
        published_file("timm:resnet50.a1_in1k")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("torchvision:resnet152", "take one of torchvision:resnet152.IMAGENET1K_V1, "),
        ("torchvision:resnet152.V1", "take one of torchvision:resnet152.IMAGENET1K_V1, "),
        (
            "torchvision:vit_b_16.IMAGENET1K_V1",
            "is not a net of torchvision and of this project; take one of googlenet, ",
        ),
        ("timm:resnet50.a9", "take one of timm:resnet50.a1_in1k, .* and 7 more"),
        ("timm:resnet5000.a1", "timm has no weights of a net 'resnet5000'"),
    ],
)
def test_unknown_names_list_the_known_ones(source: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"^{source}: .*{reason}"):
        published(source)
