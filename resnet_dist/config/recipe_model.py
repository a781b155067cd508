"""A recipe's model section: which net, and what is chosen about it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt

from resnet_dist.config.base import Section

ActivationOrder = Literal["original", "bn_after_addition", "relu_before_addition", "relu_only_pre", "pre"]
Rate = Annotated[float, Field(ge=0, lt=1)]


class ModelConfig(Section):
    name: str
    """A name of `resnet_dist.models.MODEL_NAMES`: resnet18 .. resnet200 (ImageNet), resnet20 .. resnet1202 (CIFAR),
    plain18 .., vgg16, vgg19, googlenet."""
    num_classes: PositiveInt
    """Must equal the number of classes in the betons' manifests."""
    zero_init_residual: bool = False
    """Start the last batch norm of every block at gamma = 0 (Goyal et al. 2017, section 5.1)."""
    shortcut: Literal["A", "B", "C"] | None = None
    """A zero-padding, B projection where dimensions grow, C all projections (He et al. 2015, section 3.3); null: the
    net's own default."""
    bottleneck_stride: Literal["3x3", "1x1"] = "3x3"
    """Which convolution of a bottleneck takes the stride: 3x3 as torchvision ("v1.5"), 1x1 as the paper."""
    activation_order: ActivationOrder = "original"
    """Where batch norm and ReLU stand around a block's sum (He et al. 2016, "Identity Mappings", figure 4, a to e).
    pre: both before each convolution, the best of them; the three in the middle are there to be compared."""
    stem: Literal["conv7", "deep", "deep_strided"] = "conv7"
    """ImageNet nets: the paper's 7x7; deep, three 3x3 (ResNet-D); deep_strided, also a strided 3x3 instead of the
    maximum (ResNet-RS)."""
    pooled_projection: bool = False
    """Projections take their stride by a 2x2 average (ResNet-D)."""
    se_ratio: Rate = 0.0
    """Squeeze-and-excitation: width of the narrow layer as a share of the block's output channels; 0: none."""
    blur_pool: bool = False
    """A 3x3 binomial blur before every strided convolution of a block (Zhang 2019, as in ffcv-imagenet)."""
    drop_path: Rate = 0.0
    """Rate at which the last block's residual function is left out for a sample; grows linearly from 0 at the first."""
    dropout: Rate = 0.0
    """Of the pooled features, before the classifier."""
    gate: Literal["exclusive", "shortcut_only"] | None = None
    """g = sigmoid(Wx + b), 1x1 (He et al. 2016, table 1). exclusive: (1 - g) * shortcut + g * residual, as in highway
    networks; shortcut_only: (1 - g) * shortcut + residual."""
    gate_bias: float = 0.0
    """What b starts with; below 0 the shortcut is open."""
    shortcut_scale: Annotated[float, Field(ge=0)] = 1.0
    """Factor on the shortcut (He et al. 2016, table 1: 0.5)."""
    residual_scale: Annotated[float, Field(ge=0)] = 1.0
    """Factor on the residual function's output."""
    shortcut_dropout: Rate = 0.0
    """Dropout on the shortcut (He et al. 2016, table 1: 0.5, which fails)."""

    def build_options(self) -> dict[str, Any]:
        """The arguments of `models.build_model`."""
        return self.model_dump()
