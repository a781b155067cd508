"""The options beyond the paper's nets: timm as oracle where it has the net, hand arithmetic elsewhere."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import timm
import torch
from torch import nn

from resnet_dist.data.keyed_random import uniform
from resnet_dist.errors import UserError
from resnet_dist.models import build_model
from resnet_dist.models.keyed_noise import DropPath, KeyedDropout, LaunchNoise, keyed_uniform
from resnet_dist.models.preactivation import PreactivationBasicBlock
from resnet_dist.models.registry import LAYERS_PER_BLOCK, POSTACTIVATION, PREACTIVATION, BlockKind
from resnet_dist.models.resnet import ActivationOrder, BlurredConv2d, CifarResNet, NetOptions, ResidualBlock, Shortcut
from resnet_dist.training.launches import layer_keys

RESNET_D = {"stem": "deep", "pooled_projection": True}
RESNET_T = {"stem": "deep_tiered", "pooled_projection": True}
RESNET_RS = {"stem": "deep_strided", "pooled_projection": True, "se_ratio": 0.25}
SE_RESNEXT = {"groups": 32, "base_width": 4, "se_ratio": 1 / 16, **RESNET_D}


@pytest.mark.parametrize(
    ("timm_name", "name", "options", "parameters"),
    [
        ("resnet152d", "resnet152", RESNET_D, 60_212_040),
        ("resnetrs152", "resnet152", RESNET_RS, 86_621_576),
        ("resnet200", "resnet200", {}, 64_673_832),
        ("resnet10t", "resnet10", RESNET_T, 5_435_488),
        ("resnet14t", "resnet14", RESNET_T, 10_081_632),
        ("resnet26", "resnet26", {}, 15_995_176),
        ("seresnext26d_32x4d", "resnet26", SE_RESNEXT, 16_809_512),
        ("resnext50d_32x4d", "resnext50_32x4d", RESNET_D, 25_048_136),
        ("resnext101_32x16d", "resnet101", {"groups": 32, "base_width": 16}, 194_026_792),
        ("seresnet269d", "resnet269", {"se_ratio": 1 / 16, **RESNET_D}, 113_672_760),
        ("resnetrs270", "resnet270", RESNET_RS, 129_861_448),
        ("resnetrs350", "resnet350", RESNET_RS, 163_956_168),
        ("resnetrs420", "resnet420", RESNET_RS, 191_891_656),
    ],
)
def test_keys_shapes_and_counts_are_timms(
    timm_name: str, name: str, options: dict[str, object], parameters: int
) -> None:
    with torch.device("meta"):
        ours, theirs = build_model(name, 1000, **options), timm.create_model(timm_name)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == parameters


@pytest.mark.parametrize(
    ("timm_name", "name", "options"),
    [
        ("resnet50d", "resnet50", RESNET_D),
        ("resnetrs50", "resnet50", RESNET_RS),
        ("resnet14t", "resnet14", RESNET_T),
        ("seresnext26d_32x4d", "resnet26", SE_RESNEXT),
    ],
)
def test_logits_are_timms(timm_name: str, name: str, options: dict[str, object]) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model(timm_name, num_classes=5).eval()
    ours = build_model(name, 5, **options).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 48, 40)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)


def test_blur_keeps_keys_and_what_is_constant() -> None:
    torch.manual_seed(0)
    with torch.device("meta"):
        plain, blurred = build_model("resnet50", 10), build_model("resnet50", 10, blur_pool=True)
    assert plain.state_dict().keys() == blurred.state_dict().keys()
    strided = {k for k, m in plain.named_modules() if isinstance(m, nn.Conv2d) and m.stride[0] == 2 and k != "conv1"}
    assert {k for k, m in blurred.named_modules() if isinstance(m, BlurredConv2d)} == strided
    conv = BlurredConv2d(4, 2, 3, 2, 1, bias=False)
    inside = conv(torch.ones(1, 4, 9, 9))[:, :, 1:-1, 1:-1]
    torch.testing.assert_close(inside, conv.weight.sum((1, 2, 3)).view(1, 2, 1, 1).expand_as(inside))
    impulse = torch.zeros(1, 1, 5, 5)
    impulse[0, 0, 2, 2] = 16
    centre = BlurredConv2d(1, 1, 1, 2, 0, bias=False)
    nn.init.ones_(centre.weight)
    assert centre(impulse)[0, 0].tolist() == [[0, 0, 0], [0, 4, 0], [0, 0, 0]]


@pytest.mark.parametrize("name", ["resnet20", "resnet50"])
def test_preactivation_units_are_an_identity_plus_what_they_learn(name: str) -> None:
    """With all last convolutions at 0, what the stem made reaches the end unchanged, but where dimensions grow."""
    net = build_model(name, 10, activation_order="pre").eval()
    seen: dict[str, torch.Tensor] = {}
    stem = net.maxpool if name == "resnet50" else net.relu
    stem.register_forward_hook(lambda _m, _i, out: seen.__setitem__("stem", out.clone()))
    net.layer1.register_forward_hook(lambda _m, _i, out: seen.__setitem__("stage", out.clone()))
    for block in (m for m in net.modules() if isinstance(m, ResidualBlock)):
        nn.init.zeros_(block.conv2.weight if isinstance(block, PreactivationBasicBlock) else block.conv3.weight)
    net(torch.randn(2, 3, 32, 32))
    first = net.layer1[0].downsample
    assert torch.equal(seen["stage"], first(seen["stem"]))
    assert isinstance(net.layer1[0].preactivation, nn.Identity)
    assert not list(net.layer1[1].downsample.parameters())


@pytest.mark.parametrize("order", get_args(ActivationOrder))
@pytest.mark.parametrize("kind", LAYERS_PER_BLOCK)
@pytest.mark.parametrize("shortcut", ["A", None])
def test_every_parameter_gets_a_gradient(shortcut: Shortcut | None, kind: BlockKind, order: ActivationOrder) -> None:
    """Every kind of block in every order, gated, and in a plain net."""
    torch.manual_seed(0)
    options = NetOptions(shortcut, activation_order=order, se_ratio=0.25)
    if shortcut is not None:
        options = replace(options, gate="exclusive", gate_bias=-1.0)
    blocks = PREACTIVATION if order == "pre" else POSTACTIVATION
    net = CifarResNet(blocks[kind], (1, 2, 1), 10, options)
    net(torch.randn(2, 3, 16, 16)).square().sum().backward()
    # A narrow layer of squeeze-and-excitation can be dead for two images.
    gradients = {key: p.grad for key, p in net.named_parameters()}
    assert [key for key, gradient in gradients.items() if gradient is None] == []
    assert [key for key, g in gradients.items() if g is not None and not g.any() and ".se." not in key] == []


@pytest.mark.parametrize("order", ["original", "pre"])
def test_skips_over_one_layer_take_the_parameters_of_skips_over_two(order: ActivationOrder) -> None:
    with torch.device("meta"):
        ones, twos = (build_model(name, 10, activation_order=order) for name in ("resnet110_1layer", "resnet110"))
    count = [sum(p.numel() for p in net.parameters()) for net in (ones, twos)]
    assert count[0] == count[1]
    assert sum(isinstance(m, ResidualBlock) for m in ones.modules()) == 108


def block_of(**options: object) -> ResidualBlock:
    return PreactivationBasicBlock(4, 4, 1, options=NetOptions(shortcut="A", **options))  # type: ignore[arg-type]


def test_joins_by_hand() -> None:
    x, f = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    assert torch.equal(block_of().join(x, f.clone()), f + x)
    assert torch.equal(block_of(shortcut_scale=0.5, residual_scale=0.5).join(x, f.clone()), 0.5 * x + 0.5 * f)
    for gate in ("exclusive", "shortcut_only"):
        block = block_of(gate=gate, gate_bias=-2.0)
        assert block.gate is not None
        g = torch.sigmoid(block.gate(x))
        expected = (1 - g) * x + (g * f if gate == "exclusive" else f)
        assert torch.equal(block.join(x, f.clone()), expected)


def test_gates_start_with_their_bias_in_every_block() -> None:
    net = build_model("resnet20", 10, gate="shortcut_only", gate_bias=-6.0)
    biases = [m.gate.bias for m in net.modules() if isinstance(m, ResidualBlock)]
    assert len(biases) == 9
    assert all(torch.all(bias == -6.0) for bias in biases)


def test_torchs_draws_are_the_loaders_draws() -> None:
    keys = [0, 1, -1, 2**63 - 1, -(2**63), 123456789]
    for key in keys:
        ours = keyed_uniform(torch.tensor(key), 50).numpy()
        assert ours.tolist() == uniform(torch.tensor([key]).numpy().view("uint64"), 50)[0].tolist()


def test_drop_path_is_a_function_of_seed_step_micro_batch_and_layer() -> None:
    net = build_model("resnet20", 10, drop_path=0.5).train()
    noise, images = LaunchNoise(net), torch.randn(16, 3, 8, 8)
    assert [m.rate for m in net.modules() if isinstance(m, DropPath)] == [0.5 * i / 8 for i in range(9)]
    before = torch.get_rng_state()

    def logits(seed: int, step: int, micro_batch: int) -> torch.Tensor:
        micro_batches = range(micro_batch, micro_batch + 1)
        noise.set_keys(torch.from_numpy(layer_keys(seed, step, micro_batches, len(noise))))
        return net(images)

    first = logits(0, 7, 1)
    assert torch.equal(logits(0, 7, 1), first)
    for other in ((1, 7, 1), (0, 8, 1), (0, 7, 2)):
        assert not torch.equal(logits(*other), first)
    assert torch.equal(torch.get_rng_state(), before)
    keys = layer_keys(0, 7, range(1, 4), 9)
    assert len(set(keys.flatten().tolist())) == 27
    assert keys[:, 1:2].tolist() == layer_keys(0, 7, range(2, 3), 9).tolist()


def test_merged_micro_batches_have_the_masks_that_each_has_alone() -> None:
    keys, x = torch.from_numpy(layer_keys(0, 3, range(2, 5), 2)), torch.randn(12, 4, 3, 3)
    net = nn.Sequential(DropPath(0.5), KeyedDropout(0.3)).train()
    noise = LaunchNoise(net)
    noise.set_keys(keys)
    together = net(x)
    for number, (part, expected) in enumerate(zip(x.chunk(3), together.chunk(3), strict=True)):
        noise.set_keys(keys[:, number : number + 1])
        assert torch.equal(net(part), expected)


def test_masks_have_the_rate_and_keep_the_mean() -> None:
    drop = KeyedDropout(0.3).train()
    drop.keys.fill_(5)
    out = drop(torch.ones(100, 1000))
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert (out == 0).double().mean().item() == pytest.approx(0.3, abs=0.007)  # 5 sigma
    assert torch.equal(drop.eval()(torch.ones(3)), torch.ones(3))
    path = DropPath(0.25).train()
    whole = path(torch.ones(1000, 2, 3, 3))
    assert all(len(sample.unique()) == 1 for sample in whole)
    assert (whole[:, 0, 0, 0] == 0).double().mean().item() == pytest.approx(0.25, abs=0.07)


def test_torchvisions_dropout_is_keyed_too() -> None:
    with torch.device("meta"):
        nets = [build_model(name, 10) for name in ("vgg16", "googlenet")]
    for net, num_layers in zip(nets, (2, 1), strict=True):
        assert not [m for m in net.modules() if isinstance(m, nn.Dropout)]
        assert len(LaunchNoise(net)) == num_layers


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vgg16", {"se_ratio": 0.25}, r"model\.se_ratio: 'vgg16' is torchvision's"),
        ("resnet20", {"stem": "deep"}, r"model\.stem: 'resnet20' is a CIFAR net"),
        ("resnet18", {"bottleneck_stride": "1x1"}, r"model\.bottleneck_stride: 'resnet18' has no bottlenecks"),
        ("resnet34", {"groups": 2}, r"model\.groups: 'resnet34' has no bottlenecks"),
        ("wide_resnet50_2", {"base_width": 4}, r"model\.base_width: 'wide_resnet50_2' says it in its name"),
        ("plain20", {"gate": "exclusive", "drop_path": 0.1}, r"model\.drop_path and model\.gate: 'plain20' is a plain"),
        ("resnet50", {"activation_order": "pre", "zero_init_residual": True}, r"model\.zero_init_residual: 'resnet50'"),
        ("resnet20", {"gate_bias": -3.0}, r"model\.gate_bias: 'resnet20' has no gate"),
    ],
)
def test_options_that_a_net_does_not_have(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_model(name, 10, **options)
