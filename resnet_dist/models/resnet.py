"""The ResNets of He et al. 2015, "Deep Residual Learning for Image Recognition", and what later papers changed in them.

Read from top to bottom: options, convolutions, shortcuts, blocks, the nets. Modules have torchvision's names (`conv1`,
`bn1`, `layer1`, `downsample`, `fc`), and timm's where torchvision has none, so state dicts interchange with theirs.
A seed's first weights are torchvision's too: the order in which modules are made and initialised is part of that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_dist.models.keyed_noise import DropPath, KeyedDropout

Shortcut = Literal["A", "B", "C"]
SHORTCUTS: tuple[str, ...] = get_args(Shortcut)
ActivationOrder = Literal["original", "bn_after_addition", "relu_before_addition", "relu_only_pre", "pre"]


@dataclass(frozen=True)
class NetOptions:
    """What can be chosen about a net beyond its name: the keys of a recipe's `model` section, explained there
    (`config.recipe.ModelConfig`). The defaults are the paper's net in torchvision's form."""

    shortcut: Shortcut | None = None
    """None: a plain net, without shortcuts."""
    zero_init_residual: bool = False
    bottleneck_stride: Literal["3x3", "1x1"] = "3x3"
    groups: int = 1
    base_width: int = 64
    activation_order: ActivationOrder = "original"
    stem: Literal["conv7", "deep", "deep_tiered", "deep_strided"] = "conv7"
    pooled_projection: bool = False
    se_ratio: float = 0.0
    blur_pool: bool = False
    drop_path: float = 0.0
    dropout: float = 0.0
    gate: Literal["exclusive", "shortcut_only"] | None = None
    gate_bias: float = 0.0
    shortcut_scale: float = 1.0
    residual_scale: float = 1.0
    shortcut_dropout: float = 0.0

    def chosen(self) -> dict[str, Any]:
        """The options that differ from their default.

        >>> NetOptions(shortcut="C", dropout=0.1).chosen()
        {'shortcut': 'C', 'dropout': 0.1}
        """
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}


def chosen_options(model: Mapping[str, Any]) -> dict[str, Any]:
    """The options that differ from their default, of the arguments of `build_model`.

    >>> chosen_options({"name": "resnet50", "num_classes": 10, "dropout": 0.1, "groups": 1})
    {'dropout': 0.1}
    """
    return NetOptions(**{key: value for key, value in model.items() if key not in ("name", "num_classes")}).chosen()


# ---- Convolutions ----------------------------------------------------------------------------------------------------


class BlurredConv2d(nn.Conv2d):
    """A strided convolution behind a 3x3 binomial blur: Zhang 2019, "Making convolutional networks shift-invariant
    again".

    The blur is at the convolution's input and in full resolution, as in ffcv-imagenet's rn50 configs. It is not in
    the state dict, whose keys are those of the convolution alone.
    """

    blur: Tensor

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        binomial = torch.tensor([1.0, 2.0, 1.0]) / 4
        kernel = torch.outer(binomial, binomial).expand(self.in_channels, 1, 3, 3).contiguous()
        self.register_buffer("blur", kernel, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.conv2d(x, self.blur.to(x.dtype), padding=1, groups=self.in_channels))


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, *, groups: int = 1, blur: bool = False) -> nn.Conv2d:
    """Without bias, like all convolutions before a batch norm. `blur`: anti-aliased where there is a stride."""
    return _conv(in_channels, out_channels, 3, stride, groups, blur)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1, *, blur: bool = False) -> nn.Conv2d:
    return _conv(in_channels, out_channels, 1, stride, 1, blur)


def _conv(in_channels: int, out_channels: int, kernel_size: int, stride: int, groups: int, blur: bool) -> nn.Conv2d:
    kind = BlurredConv2d if blur and stride > 1 else nn.Conv2d
    return kind(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)


# ---- Beside and behind the residual function -------------------------------------------------------------------------


class ZeroPadShortcut(nn.Module):
    """Option A: every `stride`-th pixel, then zeros for the channels that the input lacks. No parameters."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels = out_channels - in_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))


def projection(in_channels: int, out_channels: int, stride: int, options: NetOptions, *, norm: bool) -> nn.Sequential:
    """W_s of He et al. 2015, equation 2: a 1x1 convolution and its batch norm (keys `0.*` and `1.*`, torchvision's).

    `pooled_projection`: a 2x2 average takes the stride, because a strided 1x1 convolution skips three pixels of four
    (ResNet-D; He et al. 2018, section 4.2; keys `1.*` and `2.*`, timm's).
    """
    pool: list[nn.Module] = []
    if options.pooled_projection:
        pool = [nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False) if stride > 1 else nn.Identity()]
        stride = 1
    conv = conv1x1(in_channels, out_channels, stride, blur=options.blur_pool)
    return nn.Sequential(*pool, conv, *([nn.BatchNorm2d(out_channels)] if norm else []))


def build_shortcut(
    in_channels: int, out_channels: int, stride: int, options: NetOptions, *, norm: bool = True
) -> nn.Module | None:
    """The shortcut options of He et al. 2015, section 3.3: [N, in_channels, H, W] -> [N, out_channels, H/s, W/s].

    A pads with zeros and has no parameters; B projects where the shape changes and is the identity elsewhere; C
    projects everywhere (popular summaries swap A and B). None in a plain net.

    >>> build_shortcut(64, 64, 1, NetOptions(shortcut="B"))
    Identity()
    """
    same_shape = stride == 1 and in_channels == out_channels
    if options.shortcut is None:
        return None
    if options.shortcut == "C" or (options.shortcut == "B" and not same_shape):
        return projection(in_channels, out_channels, stride, options, norm=norm)
    return nn.Identity() if same_shape else ZeroPadShortcut(in_channels, out_channels, stride)


class SqueezeExcitation(nn.Module):
    """Weights every channel by a function of all channels' means (Hu et al. 2017). Keeps the shape.

    The narrow layer has `ratio * channels` units, rounded to a multiple of 8. Keys `fc1` and `fc2`, two 1x1
    convolutions with biases, as in timm.
    """

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        width = max(8, round(channels * ratio / 8) * 8)
        self.fc1 = nn.Conv2d(channels, width, kernel_size=1)
        self.fc2 = nn.Conv2d(width, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return x * weights


# ---- Blocks ----------------------------------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """Base of all blocks, also of the pre-activation ones: the shortcut and how it is added.

    A subclass makes its convolutions first and then calls `add_shortcut`: the order of torchvision's first weights.

    Args:
        in_channels: of the block's input.
        channels: width of its 3x3 convolutions; the output has `expansion` times as many.
        stride: of the whole block.
    """

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, options: NetOptions) -> None:
        super().__init__()
        self.out_channels = channels * self.expansion
        # Where the shape changes, a block that begins with an activation takes it for its shortcut too: He et al.
        # 2016, appendix ("these projection shortcuts are also with pre-activation").
        self.shares_activation = stride > 1 or in_channels != self.out_channels

    @staticmethod
    def final_activation(channels: int, options: NetOptions) -> nn.Module:
        """The layers between the last block and the pooling."""
        return nn.Identity()

    def drop_preactivation(self) -> None:
        """For the first block of a net: the stem ends with the activation that the block would begin with."""

    def add_shortcut(self, in_channels: int, stride: int, options: NetOptions, *, norm: bool = True) -> None:
        out = self.out_channels
        self.downsample = build_shortcut(in_channels, out, stride, options, norm=norm)
        self.se = SqueezeExcitation(out, options.se_ratio) if options.se_ratio else None
        self.drop_path = DropPath(options.drop_path) if options.drop_path else None
        self.gate: nn.Conv2d | None = None
        if options.gate:
            self.gate = conv1x1(in_channels, out, stride)
            self.gate.bias = nn.Parameter(torch.zeros(out))
        self.shortcut_dropout = KeyedDropout(options.shortcut_dropout) if options.shortcut_dropout else None
        self._gates_residual = options.gate == "exclusive"
        self._scales = options.shortcut_scale, options.residual_scale

    def join(self, x: Tensor, residual: Tensor) -> Tensor:
        """Shortcut of the block's input x plus the residual function's output, before any activation.

        With a gate g = sigmoid(W x + b): exclusive, (1 - g) * shortcut + g * residual, as in highway networks;
        shortcut_only, (1 - g) * shortcut + residual (He et al. 2016, section 3.1). A plain net has the residual alone.
        """
        if self.se is not None:
            residual = self.se(residual)
        if self.drop_path is not None:
            residual = self.drop_path(residual)
        if self.downsample is None:
            return residual
        shortcut: Tensor = self.downsample(x)
        if self.shortcut_dropout is not None:
            shortcut = self.shortcut_dropout(shortcut)
        if self._scales != (1.0, 1.0):
            shortcut, residual = self._scales[0] * shortcut, self._scales[1] * residual
        if self.gate is not None:
            gate = torch.sigmoid(self.gate(x))
            return (1 - gate) * shortcut + (gate * residual if self._gates_residual else residual)
        residual += shortcut
        return residual


class PostactivationBlock(ResidualBlock):
    """A batch norm follows each convolution, and a ReLU follows each norm but the last (He et al. 2015, figure 5).

    `activation_order` says where that last norm and the remaining ReLU go around the sum: `original`, or one of He et
    al. 2016, figure 4, b to d.
    """

    relu: nn.ReLU

    def __init__(self, in_channels: int, channels: int, stride: int, options: NetOptions) -> None:
        super().__init__(in_channels, channels, stride, options)
        self.order = options.activation_order
        if self.order == "relu_only_pre":
            self.preactivation = nn.ReLU()  # not in place: the shortcut may take the block's input

    @staticmethod
    def final_activation(channels: int, options: NetOptions) -> nn.Module:
        return nn.ReLU(inplace=True) if options.activation_order == "relu_only_pre" else nn.Identity()

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The norm that ends the residual function."""
        raise NotImplementedError

    def convolved(self, x: Tensor) -> Tensor:
        """The output of the block's last convolution."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if self.order == "bn_after_addition":
            return self.relu(self.last_norm(self.join(x, self.convolved(x))))
        if self.order == "relu_before_addition":
            # A copy, because `join` adds in place and the backward pass of a ReLU needs its output.
            return self.join(x, self.relu(self.last_norm(self.convolved(x))).clone())
        if self.order == "relu_only_pre":
            activated = self.preactivation(x)
            return self.join(activated if self.shares_activation else x, self.last_norm(self.convolved(activated)))
        return self.relu(self.join(x, self.last_norm(self.convolved(x))))


class SingleBlock(PostactivationBlock):
    """[N, in_channels, H, W] -> [N, channels, H/s, W/s]: one 3x3 convolution (He et al. 2016, table 1, "1-layer")."""

    def __init__(self, in_channels: int, channels: int, stride: int, options: NetOptions) -> None:
        super().__init__(in_channels, channels, stride, options)
        self.conv1 = conv3x3(in_channels, channels, stride, blur=options.blur_pool)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.add_shortcut(in_channels, stride, options)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn1

    def convolved(self, x: Tensor) -> Tensor:
        return self.conv1(x)


class BasicBlock(PostactivationBlock):
    """[N, in_channels, H, W] -> [N, channels, H/s, W/s]: two 3x3 convolutions (He et al. 2015, figure 5, left)."""

    def __init__(self, in_channels: int, channels: int, stride: int, options: NetOptions) -> None:
        super().__init__(in_channels, channels, stride, options)
        self.conv1 = conv3x3(in_channels, channels, stride, blur=options.blur_pool)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.add_shortcut(in_channels, stride, options)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn2

    def convolved(self, x: Tensor) -> Tensor:
        return self.conv2(self.relu(self.bn1(self.conv1(x))))


class Bottleneck(PostactivationBlock):
    """[N, in_channels, H, W] -> [N, 4 * channels, H/s, W/s]: 1x1 down, 3x3, 1x1 up (He et al. 2015, figure 5, right).

    The stride is on the 3x3 convolution (torchvision, "v1.5") or, as in the paper, on the first 1x1, which NVIDIA
    measured to be about 5 % faster and 0.5 points of top-1 worse in ResNet-50. The width between the 1x1 convolutions
    is that of ResNeXt and of the wide nets too: see `inner_width`.
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, options: NetOptions) -> None:
        super().__init__(in_channels, channels, stride, options)
        first, second = (stride, 1) if options.bottleneck_stride == "1x1" else (1, stride)
        width = inner_width(channels, options)
        self.conv1 = conv1x1(in_channels, width, first, blur=options.blur_pool)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, second, groups=options.groups, blur=options.blur_pool)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, self.out_channels)
        self.bn3 = nn.BatchNorm2d(self.out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.add_shortcut(in_channels, stride, options)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn3

    def convolved(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.conv3(self.relu(self.bn2(self.conv2(out))))


def inner_width(channels: int, options: NetOptions) -> int:
    """Channels of a bottleneck's 3x3 convolution: `groups` groups of `base_width` where `channels` is 64, and in
    proportion elsewhere (torchvision's rule; ResNeXt, Xie et al. 2016, and Wide ResNet, Zagoruyko, Komodakis 2016).

    >>> inner_width(64, NetOptions()), inner_width(64, NetOptions(groups=32, base_width=4))
    (64, 128)
    """
    return channels * options.base_width // 64 * options.groups


# ---- The nets --------------------------------------------------------------------------------------------------------


def stem_convolution(channels: int, options: NetOptions) -> nn.Module:
    """`conv1`, to half the size: the paper's 7x7, or the D stem's three 3x3 (He et al. 2018, section 4.2).

    Keys of the D stem are timm's (`conv1.0`, `.1`, `.3`, `.4`, `.6`). `deep_tiered`: the first 3x3 has a quarter fewer
    channels (timm's nets with a `t`).
    """
    if options.stem == "conv7":
        return nn.Conv2d(3, channels, kernel_size=7, stride=2, padding=3, bias=False)
    half = channels // 2
    first = 3 * half // 4 if options.stem == "deep_tiered" else half
    return nn.Sequential(
        conv3x3(3, first, 2),
        nn.BatchNorm2d(first),
        nn.ReLU(inplace=True),
        conv3x3(first, half),
        nn.BatchNorm2d(half),
        nn.ReLU(inplace=True),
        conv3x3(half, channels),
    )


def stem_pooling(channels: int, options: NetOptions) -> nn.Module:
    """`maxpool`, to a quarter: 3x3 maximum, or with `deep_strided` a 3x3 convolution (ResNet-RS; Bello et al. 2021)."""
    if options.stem != "deep_strided":
        return nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
    conv = conv3x3(channels, channels, 2, blur=options.blur_pool)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


class Stage(nn.Sequential):
    """The blocks of one map size; the first of them takes the stride and the new width."""

    def __init__(
        self,
        block: type[ResidualBlock],
        in_channels: int,
        channels: int,
        num_blocks: int,
        options: NetOptions,
        *,
        stride: int,
        after_stem: bool = False,
    ) -> None:
        blocks = [block(in_channels, channels, stride, options)]
        if after_stem:
            blocks[0].drop_preactivation()
        while len(blocks) < num_blocks:
            blocks.append(block(blocks[-1].out_channels, channels, 1, options))
        super().__init__(*blocks)
        self.out_channels = blocks[-1].out_channels


class ResNet(nn.Module):
    """The ImageNet nets of He et al. 2015, table 1: [N, 3, H, W] -> logits [N, num_classes].

    Made for 224 px (stages of 56, 28, 14 and 7 px); takes any size from 32 px.

    Args:
        block: `BasicBlock`, `Bottleneck`, or one of `preactivation.py`.
        num_blocks: of each of the four stages, (3, 4, 6, 3) in ResNet-50.

    >>> net = ResNet(Bottleneck, (3, 4, 6, 3), 1000, NetOptions(shortcut="B"))
    >>> sum(p.numel() for p in net.parameters())
    25557032
    """

    def __init__(
        self, block: type[ResidualBlock], num_blocks: tuple[int, ...], num_classes: int, options: NetOptions
    ) -> None:
        super().__init__()
        self.conv1 = stem_convolution(64, options)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = stem_pooling(64, options)
        self.layer1 = Stage(block, 64, 64, num_blocks[0], options, stride=1, after_stem=True)
        self.layer2 = Stage(block, self.layer1.out_channels, 128, num_blocks[1], options, stride=2)
        self.layer3 = Stage(block, self.layer2.out_channels, 256, num_blocks[2], options, stride=2)
        self.layer4 = Stage(block, self.layer3.out_channels, 512, num_blocks[3], options, stride=2)
        self.end = block.final_activation(self.layer4.out_channels, options)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = KeyedDropout(options.dropout) if options.dropout else nn.Identity()
        self.fc = nn.Linear(self.layer4.out_channels, num_classes)
        init_weights(self, options)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.end(self.layer4(self.layer3(self.layer2(self.layer1(x)))))
        return self.fc(self.dropout(self.avgpool(x).flatten(1)))


class CifarResNet(nn.Module):
    """[N, 3, H, W] -> logits [N, num_classes]; made for 32 px. Arguments as `ResNet`, with three stages.

    The CIFAR nets of He et al. 2015, section 4.2: 6n + 2 layers in three stages of 32, 16 and 8 px, 16 to 64 filters.
    With bottlenecks (He et al. 2016) 9n + 2 layers, and four times as many filters at the end of each block.
    """

    def __init__(
        self, block: type[ResidualBlock], num_blocks: tuple[int, ...], num_classes: int, options: NetOptions
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(3, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = Stage(block, 16, 16, num_blocks[0], options, stride=1, after_stem=True)
        self.layer2 = Stage(block, self.layer1.out_channels, 32, num_blocks[1], options, stride=2)
        self.layer3 = Stage(block, self.layer2.out_channels, 64, num_blocks[2], options, stride=2)
        self.end = block.final_activation(self.layer3.out_channels, options)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = KeyedDropout(options.dropout) if options.dropout else nn.Identity()
        self.fc = nn.Linear(self.layer3.out_channels, num_classes)
        init_weights(self, options)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.end(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.dropout(self.avgpool(x).flatten(1)))


def init_weights(net: nn.Module, options: NetOptions) -> None:
    """He initialisation of the convolutions (fan-out form, as torchvision); batch norms keep gamma = 1 and beta = 0.

    `zero_init_residual` sets the last gamma of every residual function to 0, so that each block starts as its shortcut
    alone (Goyal et al. 2017, section 5.1). Gates start with the bias `gate_bias`. Of L blocks the i-th, from 0, drops
    its path with i / (L - 1) of the rate (Huang et al. 2016, linear decay; as timm).
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, ResidualBlock):
            if module.gate is not None and module.gate.bias is not None:
                nn.init.constant_(module.gate.bias, options.gate_bias)
            if options.zero_init_residual and isinstance(module, PostactivationBlock):
                nn.init.zeros_(module.last_norm.weight)
    blocks = [module for module in net.modules() if isinstance(module, ResidualBlock)]
    for index, block in enumerate(blocks):
        if block.drop_path is not None:
            block.drop_path.rate = options.drop_path * (index / max(1, len(blocks) - 1))
