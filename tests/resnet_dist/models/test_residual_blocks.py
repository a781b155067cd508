"""What a block computes: shortcut options, the start as the identity."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from resnet_dist.errors import UserError
from resnet_dist.models import MODEL_NAMES, build_model
from resnet_dist.models.resnet import (
    ActivationOrder,
    BasicBlock,
    Bottleneck,
    NetOptions,
    PostactivationBlock,
    Shortcut,
    SingleBlock,
    ZeroPadShortcut,
    build_shortcut,
)


def test_option_a_takes_every_second_pixel_and_pads_with_zeros() -> None:
    x = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).reshape(2, 3, 4, 4)
    out = ZeroPadShortcut(3, 5, stride=2)(x)
    assert out.shape == (2, 5, 2, 2)
    assert torch.equal(out[:, :3], x[:, :, [0, 2]][:, :, :, [0, 2]])
    assert not out[:, 3:].any()
    channels_last = x.to(memory_format=torch.channels_last)
    assert ZeroPadShortcut(3, 5, stride=2)(channels_last).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("option", "when_same", "when_growing"),
    [
        ("A", nn.Identity, ZeroPadShortcut),
        ("B", nn.Identity, nn.Sequential),
        ("C", nn.Sequential, nn.Sequential),
        (None, type(None), type(None)),
    ],
)
def test_where_an_option_projects(option: Shortcut | None, when_same: type, when_growing: type) -> None:
    options = NetOptions(shortcut=option)
    assert type(build_shortcut(16, 16, 1, options)) is when_same
    assert type(build_shortcut(16, 32, 2, options)) is when_growing
    assert type(build_shortcut(64, 256, 1, options)) is when_growing


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_a_block_adds_its_shortcut_before_the_last_relu(block: type[BasicBlock] | type[Bottleneck]) -> None:
    torch.manual_seed(0)
    residual, plain = (block(16, 8, 2, options=NetOptions(shortcut=option)) for option in ("B", None))
    assert isinstance(residual.downsample, nn.Module)
    plain.load_state_dict(residual.state_dict(), strict=False)
    before_relu: list[torch.Tensor] = []
    plain.last_norm.register_forward_hook(lambda _module, _inputs, out: before_relu.append(out.clone()))
    x = torch.randn(4, 16, 6, 6)
    assert torch.equal(plain(x), before_relu[0].relu())
    torch.testing.assert_close(residual(x), (before_relu[0] + residual.downsample(x)).relu())


@pytest.mark.parametrize("block", [SingleBlock, BasicBlock, Bottleneck])
@pytest.mark.parametrize("order", ["bn_after_addition", "relu_before_addition", "relu_only_pre"])
def test_activation_orders_by_hand(block: type[PostactivationBlock], order: ActivationOrder) -> None:
    """He et al. 2016, figure 4 (b), (c), (d): the block's own convolutions, and the sum by hand."""
    torch.manual_seed(0)
    made = block(32, 8 if block is Bottleneck else 32, 1, options=NetOptions(shortcut="A", activation_order=order))
    nn.init.uniform_(made.last_norm.bias)
    x = torch.randn(4, 32, 6, 6)
    norm = copy.deepcopy(made.last_norm)
    if order == "bn_after_addition":
        expected = norm(made.convolved(x) + x).relu()
    elif order == "relu_before_addition":
        expected = norm(made.convolved(x)).relu() + x
    else:
        expected = norm(made.convolved(x.relu())) + x
    torch.testing.assert_close(made(x), expected)


def test_a_projection_takes_the_activated_input_where_relu_comes_first() -> None:
    """He et al. 2016, appendix: there "these projection shortcuts are also with pre-activation"."""
    made = Bottleneck(32, 16, 2, options=NetOptions(shortcut="B", activation_order="relu_only_pre"))
    x = torch.randn(4, 32, 6, 6)
    assert made.downsample is not None
    expected = copy.deepcopy(made.last_norm)(made.convolved(x.relu())) + copy.deepcopy(made.downsample)(x.relu())
    torch.testing.assert_close(made(x), expected)


@pytest.mark.parametrize(("name", "side"), [("resnet20", 32), ("resnet50", 64)])
def test_zero_init_residual_starts_every_block_as_its_shortcut(name: str, side: int) -> None:
    net = build_model(name, 10, zero_init_residual=True)
    blocks = [m for m in net.modules() if isinstance(m, BasicBlock | Bottleneck)]
    inputs_and_outputs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for block in blocks:
        block.register_forward_hook(lambda _block, inputs, out: inputs_and_outputs.append((inputs[0].clone(), out)))
    net.eval()(torch.randn(2, 3, side, side))
    assert len(inputs_and_outputs) == len(blocks)
    for block, (x, out) in zip(blocks, inputs_and_outputs, strict=True):
        assert block.downsample is not None
        assert torch.equal(out, block.downsample(x).relu())


def test_unknown_names_and_options_are_the_users_mistakes() -> None:
    with pytest.raises(UserError, match=r"no net 'resnet51'.*resnet18.*plain110") as raised:
        build_model("resnet51", 10)
    assert all(name in str(raised.value) for name in MODEL_NAMES)
    with pytest.raises(UserError, match=r"model\.shortcut: 'resnet20' has no option 'D'; take one of A, B, C"):
        build_model("resnet20", 10, shortcut="D")
    with pytest.raises(UserError, match=r"^model\.shortcut: 'plain20' is a plain net .*resnet20"):
        build_model("plain20", 10, shortcut="A")
    with pytest.raises(UserError, match=r"^model\.zero_init_residual: 'plain34' is a plain net"):
        build_model("plain34", 10, zero_init_residual=True)
