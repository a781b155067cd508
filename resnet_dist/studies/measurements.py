"""Studies that measure on batches of digits: `study gradients`, `study responses` and `study batchnorm`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median_high

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from data_prep.shown import markdown_table
from resnet_dist.config.profile import Profile
from resnet_dist.data.batch import Batch
from resnet_dist.studies.curves import draw_lines
from resnet_dist.studies.study import open_study, study_recipe, training_batches
from resnet_dist.training.model import build_classifier
from resnet_dist.weights.source import load_model

# ---- `study gradients`: the length of the first layer's gradient at initialisation, against depth --------------------
# He et al. 2015 say that plain nets with batch norm have "healthy norms". At the first step they do not: the gradient
# grows by a factor per layer, as mean-field theory says (Yang et al. 2019), while a ResNet's grows about linearly.

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
            study.tracker.metrics(
                {f"{kind}/first_block_gradient": norms[kind, depth, seeds[0]][0] for kind in KINDS}, depth
            )
        lines = {
            f"{kind}, {place} block": [(depth, _mean_length(norms, kind, depth, seeds, k)) for depth in sorted(depths)]
            for kind in KINDS
            for k, place in enumerate(("first", "last"))
        }
        figure = study.report_folder / "gradients.png"
        draw_lines(lines, figure, x_label="layers", y_label="length of the gradient", logarithmic=True)
        return study.publish(gradient_report(norms, sorted(depths), seeds))


def block_gradients(profile: Profile, net: str, seed: int) -> tuple[float, float]:
    """Lengths of the gradients of the first and the last block's first convolution, at initialisation."""
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
        "gradient explodes with depth; the last one's does not. He et al. 2015 call the norms healthy.\n"
        f"- ResNets: times {residual:.1f} from {low} to {high} layers in all.\n"
    )


def growth_per_layer(lengths: Sequence[tuple[int, float]]) -> float:
    """The factor by which each further layer lengthens the gradient, from the shallowest and the deepest net."""
    (low, short), (high, long) = lengths[0], lengths[-1]
    return math.exp((math.log(long) - math.log(short)) / (high - low)) if high > low else 1.0


def _mean_length(norms: Norms, kind: str, depth: int, seeds: Sequence[int], k: int) -> float:
    return sum(norms[kind, depth, seed][k] for seed in seeds) / len(seeds)


def _length(block: nn.Module) -> float:
    gradient = block.get_parameter("conv1.weight").grad
    assert gradient is not None
    return float(gradient.norm())


# ---- `study responses`: how strongly each layer responds (He et al. 2015, figure 7) ----------------------------------
# The response of a 3x3 layer is the standard deviation of its output after batch norm, before ReLU and addition. That
# is nearly |gamma|, which starts at 1. In a short run with little decay it stays there, and the figure shows nothing.
# With decay on gamma it shows the effect: that is the second setting.

NETS = ("plain20", "resnet20", "plain56", "resnet56")
_RESPONSES = "Standard deviations of layer responses, figure 7 of He et al. 2015, on trained nets."


SETTINGS: dict[str, tuple[str, ...]] = {
    "decay 1e-4, weights only, 308 steps": (),
    "decay 5e-3, gamma too, 1001 steps": (
        "optim.weight_decay=5e-3",
        "optim.decay=all",
        "train.total_epochs=91",
    ),
}
"""Overrides of the studies' recipe."""
Responses = Mapping[tuple[str, str], list[float]]
"""(setting, net) -> response of every 3x3 layer, in the order of layers."""


def responses(profile: Profile, nets: Sequence[str] = NETS) -> Path:
    """Trains what is missing, measures, and returns the report's path. Raises UserError, Fault."""
    torch.set_num_threads(1)
    found: dict[tuple[str, str], list[float]] = {}
    with open_study(profile, "responses", _RESPONSES) as study:
        (batch,) = training_batches(study_recipe(nets[0]), profile, 1)
        for number, (setting, overrides) in enumerate(SETTINGS.items()):
            for net in nets:
                run = study.train(net, lr=0.1, seed=0, overrides=overrides, name=f"{net}-setting{number}-seed0")
                net_module = load_model(str(run.prepared.run_dir), None).classifier
                found[setting, net] = layer_responses(net_module, batch)
            lines = {net: list(enumerate(found[setting, net], 1)) for net in nets}
            figure = study.report_folder / f"responses-{number}.png"
            draw_lines(lines, figure, x_label="layer", y_label="standard deviation", marker=None)
        return study.publish(response_report(found, nets))


@torch.no_grad()
def layer_responses(classifier: nn.Module, batch: Batch) -> list[float]:
    """The response of every 3x3 layer, with the batch's own statistics, in the order in which they are computed."""
    stds: list[float] = []

    def record(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        stds.append(float(output.std()))

    hooks = [norm.register_forward_hook(record) for norm in classifier.modules() if isinstance(norm, nn.BatchNorm2d)]
    try:
        classifier.train()(batch.images)
    finally:
        for hook in hooks:
            hook.remove()
        classifier.eval()
    return stds


def response_report(found: Responses, nets: Sequence[str]) -> str:
    """Markdown. Pure."""
    rows = [
        [setting, net, f"{fmean(found[setting, net]):.2f}", f"{median_high(found[setting, net]):.2f}"]
        for setting in SETTINGS
        for net in nets
    ]
    return (
        "# Layer responses\n\nWritten by `study responses`: digits at 8 px, seed 0. Standard deviation of "
        "each 3x3 layer's output after batch norm, before ReLU and addition, on one batch.\n\n"
        f"{markdown_table(['setting', 'net', 'mean over layers', 'median'], rows)}\n\n"
        "The paper's claim, weaker responses in ResNets than in their plain twins, shows only after long weight decay "
        "on gamma: without it a layer's response is its gamma, which starts at 1.\n"
    )


# ---- `study batchnorm`: its parameters, and the larger learning rates it allows (Ioffe, Szegedy 2015) ----------------

BASE_LR = 0.02
FACTORS = (1, 5, 30)
"""Multiples of the base rate, as in the paper: Inception's rate, BN-x5, BN-x30."""
STEPS = 110
_TARGET_LOSS = 0.1
_BATCHNORM = "Batch norm: its parameters, its output's statistics, and training with and without it at larger rates."
Losses = Mapping[tuple[bool, int], list[float]]
"""(with batch norm, factor) -> training loss of every step up to the first that is not finite."""


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
    """How many parameters a batch norm has: gamma and beta of each map."""
    return sum(parameter.numel() for parameter in nn.BatchNorm2d(num_maps).parameters())


def statistics() -> tuple[float, float]:
    """Largest distance of a map's mean from beta, and of its standard deviation from gamma, in training mode.

    For input [16, 128, 32, 32] with a different scale in every map; the difference is eps and rounding.
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
    """Losses of plain SGD with momentum, up to the first that is NaN or infinite.

    Not the training loop, because every net of this project has batch norm and nothing here needs a checkpoint.
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
    """The report in Markdown. Pure, except that it counts parameters."""
    rows = [
        [
            "with" if normalised else "without",
            f"x{factor} ({BASE_LR * factor:g})",
            str(steps_to(values, _TARGET_LOSS) or "not reached"),
            f"{sum(values[-11:]) / 11:.4f}" if len(values) == STEPS else f"not finite after {len(values)} steps",
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
