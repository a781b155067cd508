"""What a recipe may choose about a net beyond its name, with the neutral value of each choice."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from resnet_dist.models.shortcuts import Shortcut

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
