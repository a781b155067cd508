"""torchvision's and timm's own nets are the oracle: their tensors, found by `match_keys`, give their logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from resnet_dist.errors import UserError
from resnet_dist.models import build_model
from resnet_dist.weights.keys import head_of, match_keys
from resnet_dist.weights.source import load_model
from tests.resnet_dist.weights.randomised import randomise


@torch.no_grad()
def logits(net: nn.Module, size: int = 64) -> Tensor:
    return net.eval()(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2)))


def renamed(state: Mapping[str, Tensor], rules: Mapping[str, str]) -> dict[str, Tensor]:
    """As another project names the same tensors."""

    def other(name: str) -> str:
        for old, new in rules.items():
            name = name.replace(old, new)
        return name

    return {other(name): value for name, value in state.items()}


BOTTLENECK_NAMES = {
    # Hugging Face's transformers
    "transformers": {
        "layer1.": "resnet.encoder.stages.0.layers.",
        "layer2.": "resnet.encoder.stages.1.layers.",
        "layer3.": "resnet.encoder.stages.2.layers.",
        "layer4.": "resnet.encoder.stages.3.layers.",
        ".downsample.0": ".shortcut.convolution",
        ".downsample.1": ".shortcut.normalization",
        ".conv1": ".layer.0.convolution",
        ".bn1": ".layer.0.normalization",
        ".conv2": ".layer.1.convolution",
        ".bn2": ".layer.1.normalization",
        ".conv3": ".layer.2.convolution",
        ".bn3": ".layer.2.normalization",
        "fc.": "classifier.1.",
    },
    # detectron2
    "detectron2": {
        "layer1.": "res2.",
        "layer2.": "res3.",
        "layer3.": "res4.",
        "layer4.": "res5.",
        ".downsample.0.": ".shortcut.",
        ".downsample.1.": ".shortcut.norm.",
        ".bn1.": ".conv1.norm.",
        ".bn2.": ".conv2.norm.",
        ".bn3.": ".conv3.norm.",
        "fc.": "linear.",
    },
    # pytorchcv
    "pytorchcv": {
        "layer": "features.stage",
        ".0.": ".unit1.",
        ".1.": ".unit2.",
        ".downsample.unit1": ".identity_conv.conv",
        ".downsample.unit2": ".identity_conv.bn",
        ".bn1.": ".body.conv1.bn.",
        ".bn2.": ".body.conv2.bn.",
        ".bn3.": ".body.conv3.bn.",
        "fc.": "output.",
    },
    "mmpretrain": {"fc.": "head.fc.", "layer": "backbone.layer"},
}


@pytest.mark.parametrize("rules", BOTTLENECK_NAMES.values(), ids=BOTTLENECK_NAMES.keys())
@pytest.mark.parametrize("order", [list, sorted], ids=["in order", "alphabetical"])
def test_names_of_other_projects(rules: Mapping[str, str], order: Callable[[list[str]], list[str]]) -> None:
    net = randomise(build_model("resnet26", 7))
    theirs = renamed(net.state_dict(), rules)
    assert theirs.keys() != net.state_dict().keys()
    matched = match_keys({name: theirs[name] for name in order(list(theirs))}, net, "weights")
    assert (matched.missing, matched.unexpected, matched.head_differs) == ((), (), False)
    for name, value in net.state_dict().items():
        assert torch.equal(matched.state[name], value), name


def test_alphabetical_names_without_numbers_do_not_say_the_order_of_equal_layers() -> None:
    net = build_model("resnet18", 7)
    weights = renamed(net.state_dict(), {"layer1.0.bn1": "layer1.0.post", "layer1.0.bn2": "layer1.0.final"})
    assert torch.equal(
        match_keys(weights, net, "weights").state["layer1.0.bn1.weight"], weights["layer1.0.post.weight"]
    )
    with pytest.raises(UserError, match=r"^weights: .* whether layer1\.0\.final or layer1\.0\.post comes first"):
        match_keys({name: weights[name] for name in sorted(weights)}, net, "weights")


def test_another_number_of_classes_leaves_the_head_out() -> None:
    weights = build_model("resnet18", 10).state_dict()
    matched = match_keys(weights, build_model("resnet18", 4), "weights")
    assert (matched.head_differs, matched.missing, matched.unexpected) == (True, (), ())
    assert "fc.weight" not in matched.state
    assert len(matched.state) == len(weights) - 2


def test_a_backbone_has_no_head() -> None:
    net = build_model("resnet18", 10)
    weights = {name: value for name, value in net.state_dict().items() if not name.startswith("fc.")}
    matched = match_keys(weights, net, "weights")
    assert (matched.head_differs, matched.missing) == (True, ("fc.weight", "fc.bias"))


def test_tensors_outside_of_the_blocks_that_the_net_lacks_are_named() -> None:
    net = build_model("resnet18", 10)
    weights = {**net.state_dict(), "aux.fc2.weight": torch.zeros(3, 4)}
    assert match_keys(weights, net, "weights").unexpected == ("aux.fc2.weight",)


@pytest.mark.parametrize(
    ("given", "wanted", "reason"),
    [
        (("resnet50", {}), ("resnet18", {}), r"its net has 3, 4, 6, 3 blocks of 3 convolutions, as resnet50"),
        (("resnet18", {}), ("resnet50", {}), r"as resnet18"),
        (("resnet34", {}), ("resnet18", {}), r"has layer1.2.conv1.weight, .* the net has no place; .* as resnet34"),
        (("resnet18", {}), ("resnet34", {}), r"has no layer1.2.conv1.weight, .* of the net"),
        (("resnet20", {"shortcut": "B"}), ("resnet20", {}), r"has layer2.0.downsample.0.weight, .* no place"),
        (("resnet20", {}), ("resnet20", {"shortcut": "B"}), r"has no layer2.0.downsample.0.weight"),
        (("resnet50", {"se_ratio": 0.25}), ("resnet50", {}), r"has layer1.0.se.fc1.weight, .* no place"),
        (("resnet50", {}), ("resnet50", {"stem": "deep"}), r"conv1.weight"),
        (("vgg16", {}), ("resnet18", {}), r"these are weights of another net"),
    ],
)
def test_weights_of_another_net_are_refused(
    given: tuple[str, dict[str, object]], wanted: tuple[str, dict[str, object]], reason: str
) -> None:
    with torch.device("meta"):
        weights, net = build_model(given[0], 10, **given[1]).state_dict(), build_model(wanted[0], 10, **wanted[1])
    with pytest.raises(UserError, match=f"^weights: .*{reason}"):
        match_keys(weights, net, "weights")


def test_head_of() -> None:
    with torch.device("meta"):
        assert [head_of(build_model(name, 10)) for name in ("resnet18", "vgg16", "googlenet")] == [
            "fc",
            "classifier.6",
            "fc",
        ]


class PaddedOnBothSides(nn.Module):
    """akamaster's option A."""

    def forward(self, x: Tensor) -> Tensor:
        added = x.shape[1] // 2
        return nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, added, added))


@pytest.mark.parametrize("classes", [10, 4])
def test_option_a_that_pads_on_both_sides_is_the_same_function(classes: int) -> None:
    theirs = build_model("resnet20", 10)
    for stage in ("layer2", "layer3"):
        theirs.get_submodule(f"{stage}.0").downsample = PaddedOnBothSides()
    randomise(theirs.double())
    weights = renamed(theirs.state_dict(), {"fc.": "linear."})
    ours = build_model("resnet20", classes).double()
    matched = match_keys(weights, ours, "weights")
    ours.load_state_dict(matched.state, strict=not matched.head_differs)
    assert matched.head_differs == (classes != 10)
    if classes == 10:
        images = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            torch.testing.assert_close(ours.eval()(images), theirs(images), rtol=1e-12, atol=1e-12)


def test_the_padding_of_another_projects_option_a_is_an_assumption(tmp_path: Path) -> None:
    net, file = build_model("resnet20", 10), tmp_path / "resnet20.th"
    ours = net.state_dict()
    (note,) = match_keys(ours, net, str(file)).notes
    assert note.startswith(f"{file}: ")
    assert "assumed behind the others" in note
    torch.save(ours, file)
    assert load_model(str(file), recipe="resnet_dist/recipes/cifar10_resnet20.yaml").notes == (note,)
    assert match_keys(renamed(ours, {"fc.": "linear."}), net, str(file)).notes == ()
    backbone = {name: value for name, value in ours.items() if not name.startswith("fc.")}
    assert match_keys(backbone, net, str(file)).notes == (note,)
    assert match_keys(ours, net, str(tmp_path)).notes == (), "a run of this project"
    file.with_name(f"{file.name}.json").write_text('{"recipe_hash": "0"}')
    assert match_keys(ours, net, str(file)).notes == (), "written by export"
    projecting = build_model("resnet20", 10, shortcut="B")
    assert match_keys(projecting.state_dict(), projecting, str(tmp_path / "b.th")).notes == ()
