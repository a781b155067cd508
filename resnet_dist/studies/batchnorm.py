"""`study batchnorm`: what batch norm is made of, and the larger learning rates it allows (Ioffe, Szegedy 2015)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from resnet_dist.config.profile import Profile
from resnet_dist.data.batch import Batch
from resnet_dist.studies.batch import training_batches
from resnet_dist.studies.plots import draw_lines
from resnet_dist.studies.record import open_study, study_recipe
from resnet_dist.studies.tables import markdown_table
from resnet_dist.training.model import build_classifier

BASE_LR = 0.02
FACTORS = (1, 5, 30)
"""The paper's: Inception's rate, BN-x5, BN-x30."""
STEPS = 110
_TARGET_LOSS = 0.1
_BATCHNORM = "Batch norm: its parameters, its output's statistics, and training with and without it at larger rates."
Losses = Mapping[tuple[bool, int], list[float]]
"""(with batch norm, factor) -> training loss of every step, as far as it was finite."""


def batchnorm(profile: Profile) -> Path:
    """Measures, trains ten epochs six times, and returns the report's path. Raises UserError, Fault."""
    torch.set_num_threads(1)
    losses: dict[tuple[bool, int], list[float]] = {}
    with open_study(profile, "batchnorm", _BATCHNORM) as study:
        batches = training_batches(study_recipe("plain8"), profile, STEPS)
        for normalised in (True, False):
            for factor in FACTORS:
                losses[normalised, factor] = train(_net(normalised), batches, BASE_LR * factor)
        lines = {
            f"{'with' if normalised else 'without'} batch norm, x{factor}": _epoch_means(values)
            for (normalised, factor), values in losses.items()
        }
        draw_lines(
            lines, study.report_folder / "batchnorm.png", x_label="step", y_label="training loss", logarithmic=True
        )
        return study.publish(batchnorm_report(losses, *statistics()))


def parameters_of(num_maps: int) -> int:
    """gamma and beta of each map."""
    return sum(parameter.numel() for parameter in nn.BatchNorm2d(num_maps).parameters())


def statistics() -> tuple[float, float]:
    """Largest distance of a map's mean from beta, and of its standard deviation from gamma, in training mode.

    For input [16, 128, 32, 32] with a scale of its own in every map; what is off is eps and rounding.
    """
    generator = torch.Generator().manual_seed(0)
    norm = nn.BatchNorm2d(128)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0, generator=generator)
        norm.bias.normal_(generator=generator)
        scales = torch.empty(128, 1, 1).uniform_(0.1, 10.0, generator=generator)
        out = norm(3 + scales * torch.randn((16, 128, 32, 32), generator=generator))
        means, stds = out.mean(dim=(0, 2, 3)), out.std(dim=(0, 2, 3), correction=0)
        return float((means - norm.bias).abs().max()), float((stds - norm.weight).abs().max())


def train(net: nn.Module, batches: Sequence[Batch], lr: float) -> list[float]:
    """Losses of plain SGD with momentum, up to the first that is no number.

    Not the training loop: no net of this project goes without batch norm, and nothing here needs a checkpoint.
    """
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    losses: list[float] = []
    for batch in batches:
        optimizer.zero_grad()
        loss: Tensor = cross_entropy(net(batch.images), batch.labels)
        value = float(loss.detach())
        if not math.isfinite(value):
            break
        losses.append(value)
        loss.backward()
        optimizer.step()
    return losses


def batchnorm_report(losses: Losses, mean_error: float, std_error: float) -> str:
    """Markdown. Pure but for the counts."""
    rows = [
        [
            "with" if normalised else "without",
            f"x{factor} ({BASE_LR * factor:g})",
            str(steps_to(values, _TARGET_LOSS) or "not reached"),
            f"{sum(values[-11:]) / 11:.4f}" if len(values) == STEPS else f"no number after {len(values)} steps",
        ]
        for (normalised, factor), values in losses.items()
    ]
    header = ["batch norm", "learning rate", f"steps to a loss of {_TARGET_LOSS:g}", "loss over the last 11 steps"]
    return (
        "# Batch norm\n\nWritten by `study batchnorm`.\n\n"
        f"- Two parameters a map: {parameters_of(128)} for 128 maps, whatever the map's size: input [N, 128, 32, 32].\n"
        "- In training mode a map's mean is beta and its standard deviation gamma: off by at most "
        f"{mean_error:.1e} and {std_error:.1e} over 128 maps.\n\n"
        f"Plain 8-layer net on digits at 8 px, {STEPS} steps of 128 images at a constant rate, with batch norm and "
        "with every one left out; the factors are those of the batch-norm paper (BN-x5, BN-x30):\n\n"
        f"{markdown_table(header, rows)}\n"
    )


def steps_to(values: Sequence[float], target: float) -> int | None:
    """Steps until the mean of the last 11 (an epoch) is below `target`; None if it never is."""
    for end in range(11, len(values) + 1):
        if sum(values[end - 11 : end]) / 11 < target:
            return end
    return None


def _net(normalised: bool) -> nn.Module:
    classifier = build_classifier(study_recipe("plain8")).train()
    if not normalised:
        for module in list(classifier.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.BatchNorm2d):
                    setattr(module, name, nn.Identity())
    return classifier


def _epoch_means(values: Sequence[float]) -> list[tuple[float, float]]:
    return [(end, sum(values[end - 11 : end]) / 11) for end in range(11, len(values) + 1, 11)]
