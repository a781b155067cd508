"""The ImageNet nets of He et al. 2015, table 1: 7x7 stem, stages of 56, 28, 14 and 7 px, global average, classifier.

State-dict keys, shapes and first values are torchvision's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_dist.models.keyed_noise import DropPath, KeyedDropout


class ImageNetResNet(nn.Module):
    """[N, 3, H, W] -> logits [N, num_classes]; made for 224 px, takes any size from 32 px on."""

    def __init__(
        self, make_block: BlockFactory, num_blocks: tuple[int, ...], num_classes: int, options: NetOptions
    ) -> None:
        super().__init__()
        self.conv1 = first_convolution(options)
        self.bn1 = nn.BatchNorm2d(WIDTH)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = first_pooling(options)
        self.layer1 = Stage(make_block, WIDTH, 64, num_blocks[0], stride=1)
        self.layer2 = Stage(make_block, self.layer1.out_channels, 128, num_blocks[1], stride=2)
        self.layer3 = Stage(make_block, self.layer2.out_channels, 256, num_blocks[2], stride=2)
        self.layer4 = Stage(make_block, self.layer3.out_channels, 512, num_blocks[3], stride=2)
        self.layer1.follow_stem()
        self.end = self.layer4.final_activation()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = KeyedDropout(options.dropout) if options.dropout else nn.Identity()
        self.fc = nn.Linear(self.layer4.out_channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.end(self.layer4(self.layer3(self.layer2(self.layer1(x)))))
        return self.fc(self.dropout(self.avgpool(x).flatten(1)))


# What a recipe may choose about a net beyond its name, with the neutral value of each choice.


ActivationOrder = Literal["original", "bn_after_addition", "relu_before_addition", "relu_only_pre", "pre"]
Stem = Literal["conv7", "deep", "deep_strided"]
Gate = Literal["exclusive", "shortcut_only"]


@dataclass(frozen=True)
class NetOptions:
    """Meanings: `config.recipe_model.ModelConfig`, which has the same fields. The defaults are the paper's net in
    torchvision's form."""

    shortcut: Shortcut | None = None
    zero_init_residual: bool = False
    bottleneck_stride: Literal["3x3", "1x1"] = "3x3"
    activation_order: ActivationOrder = "original"
    stem: Stem = "conv7"
    pooled_projection: bool = False
    se_ratio: float = 0.0
    blur_pool: bool = False
    drop_path: float = 0.0
    dropout: float = 0.0
    gate: Gate | None = None
    gate_bias: float = 0.0
    shortcut_scale: float = 1.0
    residual_scale: float = 1.0
    shortcut_dropout: float = 0.0

    def with_shortcut(self, shortcut: Shortcut | None) -> NetOptions:
        return replace(self, shortcut=shortcut)

    def chosen(self) -> dict[str, Any]:
        """The options that differ from their neutral value."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}


# The convolutions that blocks and stems are made of, with the blur that anti-aliasing nets put before strides.


class BlurredConv2d(nn.Conv2d):
    """A strided convolution behind a 3x3 binomial blur (Zhang 2019, "Making convolutional networks shift-invariant
    again"; in this place, at the convolution's input and in full resolution, as in ffcv-imagenet's rn50 configs).

    Same parameters and state-dict keys as the convolution alone.
    """

    blur: Tensor

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, padding: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        binomial = torch.tensor([1.0, 2.0, 1.0]) / 4
        kernel = torch.outer(binomial, binomial).expand(in_channels, 1, 3, 3).contiguous()
        self.register_buffer("blur", kernel, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.conv2d(x, self.blur.to(x.dtype), padding=1, groups=self.in_channels))


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, *, blur: bool = False) -> nn.Conv2d:
    return _conv(in_channels, out_channels, 3, stride, blur)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1, *, blur: bool = False) -> nn.Conv2d:
    return _conv(in_channels, out_channels, 1, stride, blur)


def _conv(in_channels: int, out_channels: int, kernel_size: int, stride: int, blur: bool) -> nn.Conv2d:
    padding = kernel_size // 2
    if blur and stride > 1:
        return BlurredConv2d(in_channels, out_channels, kernel_size, stride, padding)
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=padding, bias=False)


# What runs beside the residual function: the shortcut options A, B and C of He et al. 2015, section 3.3.


Shortcut = Literal["A", "B", "C"]
SHORTCUTS: tuple[str, ...] = get_args(Shortcut)


class ZeroPadShortcut(nn.Module):
    """Option A: every `stride`-th pixel, then zeros for the channels that the input lacks. No parameters."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels = out_channels - in_channels
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))


def projection(
    in_channels: int, out_channels: int, stride: int, *, pooled: bool = False, norm: bool = True, blur: bool = False
) -> nn.Sequential:
    """W_s of the paper's equation 2: a 1x1 convolution and its batch norm (keys `0.*` and `1.*`, as in torchvision).

    `pooled`: a 2x2 average takes the stride instead of the convolution, which would skip three pixels of four
    (ResNet-D, He et al. 2018, section 4.2; keys `1.*` and `2.*`, as in timm). Without `norm`: the pre-activation nets'.
    """
    pool: list[nn.Module] = []
    if pooled:
        pool = [nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False) if stride > 1 else nn.Identity()]
        stride = 1
    conv = conv1x1(in_channels, out_channels, stride, blur=blur)
    return nn.Sequential(*pool, conv, *([nn.BatchNorm2d(out_channels)] if norm else []))


def build_shortcut(
    option: Shortcut | None,
    in_channels: int,
    out_channels: int,
    stride: int,
    *,
    pooled: bool = False,
    norm: bool = True,
    blur: bool = False,
) -> nn.Module | None:
    """[N, in_channels, H, W] -> [N, out_channels, H / stride, W / stride] beside one block; None in a plain net."""
    same_shape = stride == 1 and in_channels == out_channels
    if option is None:
        return None
    if option == "C" or (option == "B" and not same_shape):
        return projection(in_channels, out_channels, stride, pooled=pooled, norm=norm, blur=blur)
    return nn.Identity() if same_shape else ZeroPadShortcut(in_channels, out_channels, stride)


# Squeeze-and-excitation (Hu et al. 2017): every channel is weighted by what the whole map holds.


class SqueezeExcitation(nn.Module):
    """[N, channels, H, W] -> the same shape. The narrow layer has `ratio * channels` units, rounded to a multiple of 8.

    Keys `fc1` and `fc2`, two 1x1 convolutions with biases, as in timm.
    """

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        width = max(8, round(channels * ratio / 8) * 8)
        self.fc1 = nn.Conv2d(channels, width, kernel_size=1)
        self.fc2 = nn.Conv2d(width, channels, kernel_size=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return x * weights


# What all blocks share: the shortcut beside the residual function, and how the two become one.


class ResidualBlock(nn.Module):
    """Base of the blocks. A block's own convolutions come first, then `add_shortcut`: the order of first weights is
    torchvision's.
    """

    out_channels: int

    def add_shortcut(
        self, in_channels: int, out_channels: int, stride: int, options: NetOptions, *, norm: bool = True
    ) -> None:
        self.downsample = build_shortcut(
            options.shortcut,
            in_channels,
            out_channels,
            stride,
            pooled=options.pooled_projection,
            norm=norm,
            blur=options.blur_pool,
        )
        self.se = SqueezeExcitation(out_channels, options.se_ratio) if options.se_ratio else None
        self.drop_path = DropPath(options.drop_path) if options.drop_path else None
        self.gate = conv1x1_with_bias(in_channels, out_channels, stride) if options.gate else None
        self.shortcut_dropout = KeyedDropout(options.shortcut_dropout) if options.shortcut_dropout else None
        self._gates_residual = options.gate == "exclusive"
        self._scales = options.shortcut_scale, options.residual_scale

    def follow_stem(self) -> None:
        """Called on a net's first block, whose input the stem's ReLU has already passed."""

    def final_activation(self) -> nn.Module:
        """What stands between a net's last block and the pooling."""
        return nn.Identity()

    def join(self, x: Tensor, residual: Tensor) -> Tensor:
        """The block's input and its residual function's output -> their sum, before any activation.

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


def conv1x1_with_bias(in_channels: int, out_channels: int, stride: int) -> nn.Conv2d:
    gate = conv1x1(in_channels, out_channels, stride)
    gate.bias = nn.Parameter(torch.zeros(out_channels))
    return gate


# The building blocks of He et al. 2015, figure 5: one definition each, with any shortcut or, in plain nets, none.


class PostactivationBlock(ResidualBlock):
    """Each convolution is followed by a batch norm, all but the last of which by a ReLU.

    Where that last norm and the ReLU that is left stand beside the sum is `model.activation_order`: as in the paper, or
    one of the orders that He et al. 2016 tried (figure 4, a to d).
    """

    relu: nn.ReLU

    def __init__(self, in_channels: int, out_channels: int, stride: int, options: NetOptions) -> None:
        super().__init__()
        self.order = options.activation_order
        self.out_channels = out_channels
        if self.order == "relu_only_pre":
            self.preactivation = nn.ReLU()  # not in place: the shortcut may take what comes in
            # He et al. 2016, appendix: projections are with pre-activation too.
            self.shares_activation = stride > 1 or in_channels != out_channels

    def final_activation(self) -> nn.Module:
        return nn.ReLU(inplace=True) if self.order == "relu_only_pre" else nn.Identity()

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        raise NotImplementedError

    def convolved(self, x: Tensor) -> Tensor:
        """What the last convolution makes of the block's input."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if self.order == "bn_after_addition":
            return self.relu(self.last_norm(self.join(x, self.convolved(x))))
        if self.order == "relu_before_addition":
            # The sum is taken in place, and a ReLU's gradient needs what it put out.
            return self.join(x, self.relu(self.last_norm(self.convolved(x))).clone())
        if self.order == "relu_only_pre":
            activated = self.preactivation(x)
            return self.join(activated if self.shares_activation else x, self.last_norm(self.convolved(activated)))
        return self.relu(self.join(x, self.last_norm(self.convolved(x))))


class SingleBlock(PostactivationBlock):
    """[N, in_channels, H, W] -> [N, channels, H / stride, W / stride]: one 3x3 convolution (of He et al. 2016)."""

    def __init__(self, in_channels: int, channels: int, stride: int, *, options: NetOptions) -> None:
        super().__init__(in_channels, channels, stride, options)
        self.conv1 = conv3x3(in_channels, channels, stride, blur=options.blur_pool)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.add_shortcut(in_channels, channels, stride, options)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn1

    def convolved(self, x: Tensor) -> Tensor:
        return self.conv1(x)


class BasicBlock(PostactivationBlock):
    """[N, in_channels, H, W] -> [N, channels, H / stride, W / stride]: two 3x3 convolutions."""

    def __init__(self, in_channels: int, channels: int, stride: int, *, options: NetOptions) -> None:
        super().__init__(in_channels, channels, stride, options)
        self.conv1 = conv3x3(in_channels, channels, stride, blur=options.blur_pool)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.add_shortcut(in_channels, channels, stride, options)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn2

    def convolved(self, x: Tensor) -> Tensor:
        return self.conv2(self.relu(self.bn1(self.conv1(x))))


class Bottleneck(PostactivationBlock):
    """[N, in_channels, H, W] -> [N, 4 * channels, H / stride, W / stride]: 1x1 down, 3x3, 1x1 up.

    The stride is on the 3x3 convolution (torchvision, "v1.5") or, as in the paper, on the first 1x1, which NVIDIA
    measured about 5 % faster and 0.5 % of top-1 worse in ResNet-50.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, *, options: NetOptions) -> None:
        super().__init__(in_channels, 4 * channels, stride, options)
        first, second = (stride, 1) if options.bottleneck_stride == "1x1" else (1, stride)
        self.conv1 = conv1x1(in_channels, channels, first, blur=options.blur_pool)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels, second, blur=options.blur_pool)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = conv1x1(channels, self.out_channels)
        self.bn3 = nn.BatchNorm2d(self.out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.add_shortcut(in_channels, self.out_channels, stride, options)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn3

    def convolved(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.conv3(self.relu(self.bn2(self.conv2(out))))


# What stands before an ImageNet net's first stage: 224 px -> 56 px, 3 -> 64 channels.


WIDTH = 64


def first_convolution(options: NetOptions) -> nn.Module:
    """`conv1`: the paper's 7x7, or the D stem's three 3x3 (He et al. 2018, section 4.2), to half the size.

    Keys of the D stem are timm's (`conv1.0`, `.1`, `.3`, `.4`, `.6`).
    """
    if options.stem == "conv7":
        return nn.Conv2d(3, WIDTH, kernel_size=7, stride=2, padding=3, bias=False)
    half = WIDTH // 2
    return nn.Sequential(
        conv3x3(3, half, 2),
        nn.BatchNorm2d(half),
        nn.ReLU(inplace=True),
        conv3x3(half, half),
        nn.BatchNorm2d(half),
        nn.ReLU(inplace=True),
        conv3x3(half, WIDTH),
    )


def first_pooling(options: NetOptions) -> nn.Module:
    """To a quarter of size: 3x3 maximum, or with `deep_strided` a 3x3 convolution (ResNet-RS; Bello et al. 2021)."""
    if options.stem != "deep_strided":
        return nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
    conv = conv3x3(WIDTH, WIDTH, 2, blur=options.blur_pool)
    return nn.Sequential(conv, nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=True))


# A stage of blocks, and what is done to all blocks of a net once they stand: initialisation, drop-path by depth.


BlockFactory = Callable[[int, int, int], ResidualBlock]
"""(in_channels, channels, stride) -> block; `channels` is the width of its 3x3 convolutions."""


class Stage(nn.Sequential):
    """The blocks of one map size; the first of them takes the stride and the new width."""

    def __init__(
        self, make_block: BlockFactory, in_channels: int, channels: int, num_blocks: int, *, stride: int
    ) -> None:
        blocks = [make_block(in_channels, channels, stride)]
        while len(blocks) < num_blocks:
            blocks.append(make_block(blocks[-1].out_channels, channels, 1))
        super().__init__(*blocks)
        self.out_channels = blocks[-1].out_channels

    def follow_stem(self) -> None:
        """Called on a net's first stage."""
        cast(ResidualBlock, self[0]).follow_stem()

    def final_activation(self) -> nn.Module:
        return cast(ResidualBlock, self[-1]).final_activation()


def initialise(net: nn.Module, *, zero_init_residual: bool, gate_bias: float) -> None:
    """He initialisation of the convolutions (fan-out form, as torchvision); batch norms keep gamma = 1 and beta = 0.

    `zero_init_residual` sets the gamma that ends each residual function to 0, so that every block starts as its
    shortcut alone (Goyal et al. 2017, section 5.1). Gates start with the bias `gate_bias`.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, ResidualBlock):
            if module.gate is not None and module.gate.bias is not None:
                nn.init.constant_(module.gate.bias, gate_bias)
            if zero_init_residual and isinstance(module, PostactivationBlock):
                nn.init.zeros_(module.last_norm.weight)


def spread_drop_path(net: nn.Module) -> None:
    """Block i of L drops with i / (L - 1) of the rate it was made with: the first never (Huang et al. 2016, linear
    decay; as timm)."""
    blocks = [module for module in net.modules() if isinstance(module, ResidualBlock)]
    for number, block in enumerate(blocks):
        if block.drop_path is not None:
            block.drop_path.rate *= number / max(1, len(blocks) - 1)
