"""`study gradients`: how long the first layer's gradient is at initialisation, against depth.

He et al. 2015 say that plain nets with batch norm show "healthy norms". At the first step they do not: the gradient
grows by a factor a layer, as mean-field theory says (Yang et al. 2019), while a ResNet's grows about linearly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from resnet_dist.config.profile import Profile
from resnet_dist.studies.batch import training_batches
from resnet_dist.studies.plots import draw_lines
from resnet_dist.studies.record import open_study, study_recipe
from resnet_dist.studies.tables import markdown_table
from resnet_dist.training.model import build_classifier

DEPTHS = (8, 20, 32, 44, 56)
GRADIENT_SEEDS = (0, 1, 2)
KINDS = ("plain", "resnet")
_GRADIENTS = "Length of the first and the last block's gradient at initialisation, on a batch of digits, by depth."
Norms = Mapping[tuple[str, int, int], tuple[float, float]]
"""(kind, depth, seed) -> length of the gradient of the first and of the last block's first convolution."""


def gradients(profile: Profile, depths: Sequence[int] = DEPTHS, seeds: Sequence[int] = GRADIENT_SEEDS) -> Path:
    """Measures and returns the report's path. Raises UserError, Fault."""
    torch.set_num_threads(1)
    norms: dict[tuple[str, int, int], tuple[float, float]] = {}
    with open_study(profile, "gradients", _GRADIENTS) as study:
        for seed in seeds:
            for depth in depths:
                for kind in KINDS:
                    norms[kind, depth, seed] = block_gradients(profile, f"{kind}{depth}", seed)
        for depth in sorted(depths):
            study.metrics({f"{kind}/first_block_gradient": norms[kind, depth, seeds[0]][0] for kind in KINDS}, depth)
        lines = {
            f"{kind}, {place} block": [(depth, _mean_length(norms, kind, depth, seeds, k)) for depth in sorted(depths)]
            for kind in KINDS
            for k, place in enumerate(("first", "last"))
        }
        figure = study.report_folder / "gradients.png"
        draw_lines(lines, figure, x_label="layers", y_label="length of the gradient", logarithmic=True)
        return study.publish(gradient_report(norms, sorted(depths), seeds))


def block_gradients(profile: Profile, net: str, seed: int) -> tuple[float, float]:
    """Of the first and the last block's first convolution, at initialisation."""
    recipe = study_recipe(net, seed=seed)
    (batch,) = training_batches(recipe, profile, 1)
    classifier = build_classifier(recipe).train()
    cross_entropy(classifier(batch.images), batch.labels).backward()
    blocks = [block for name in ("layer1", "layer3") for block in classifier.net.get_submodule(name).children()]
    return _length(blocks[0]), _length(blocks[-1])


def gradient_report(norms: Norms, depths: Sequence[int], seeds: Sequence[int]) -> str:
    """Markdown. Pure."""

    def cell(kind: str, depth: int, k: int) -> str:
        return " / ".join(f"{norms[kind, depth, seed][k]:.3g}" for seed in seeds)

    rows = [[str(depth), *(cell(kind, depth, k) for k in (0, 1) for kind in KINDS)] for depth in depths]
    header = ["layers", "plain: first block", "ResNet: first block", "plain: last block", "ResNet: last block"]
    factor = growth_per_layer([(depth, _mean_length(norms, "plain", depth, seeds, 0)) for depth in depths])
    low, high = depths[0], depths[-1]
    residual = _mean_length(norms, "resnet", high, seeds, 0) / _mean_length(norms, "resnet", low, seeds, 0)
    return (
        "# Gradients at initialisation\n\nWritten by `study gradients`. Length of the gradient of a "
        f"block's first convolution, one batch of 128 digits at 8 px, seeds {', '.join(map(str, seeds))}.\n\n"
        f"{markdown_table(header, rows)}\n\n"
        f"- Plain nets: times {factor:.3f} a layer (geometric mean over depths {low} to {high}): the first block's "
        "gradient explodes with depth, the last one's does not. He et al. 2015 call the norms healthy.\n"
        f"- ResNets: times {residual:.1f} from {low} to {high} layers in all.\n"
    )


def growth_per_layer(lengths: Sequence[tuple[int, float]]) -> float:
    """The factor by which a layer more lengthens the gradient, from the shallowest and the deepest net."""
    (low, short), (high, long) = lengths[0], lengths[-1]
    return math.exp((math.log(long) - math.log(short)) / (high - low)) if high > low else 1.0


def _mean_length(norms: Norms, kind: str, depth: int, seeds: Sequence[int], k: int) -> float:
    return sum(norms[kind, depth, seed][k] for seed in seeds) / len(seeds)


def _length(block: nn.Module) -> float:
    gradient = block.get_parameter("conv1.weight").grad
    assert gradient is not None
    return float(gradient.norm())
